"""
A tiny Qwen3-VL reads handwritten digits from a board, and forgets them as text follows. PVM branches with image
dropout, the same branches as published, and LoRA are trained on the same conversations and evaluated on unseen digits,
up to 4,096 tokens away from the image. No GPU and no network; about 9 minutes on two CPU cores.

    pvm demo

works in the current folder: recipes/ and assets/ come from the package, unless they are there, and data/ and runs/ are
made. The result is runs/digits_eval/report.html. The same command resumes an interrupted demo.
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from pvm.files import locked
from pvm.runs import RunCommand, run_command, train
from pvm.shipped import put_here
from pvm.terminal import Terminal
from pvm.worlds.data import write


DATA = Path("data/digits")
CONTROLS = ("digits_lora", "digits_published")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # nothing here needs the Hub
    "OMP_NUM_THREADS": "1",  # the models are so small that a second thread costs more than it brings
    # Freed memory is kept, and not given back to the system and asked for again in every step.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}


def main(arguments: list[str] | None = None, run_command: RunCommand = run_command) -> None:
    """
    Args:
        run_command: runs `pvm train` and `pvm eval`.

    Raises:
        SystemExit: with the exit status of `pvm eval`, if it is not 0.
        UserError: if a training fails.
    """
    ArgumentParser("pvm demo", description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args(arguments)
    os.environ.update(ENVIRONMENT | os.environ)  # read by the processes when they start
    console = Terminal()
    for name in ("recipes", "assets"):
        put_here(name, console)
    with locked(Path("runs")):
        if not DATA.is_dir():
            DATA.parent.mkdir(exist_ok=True)
            with TemporaryDirectory(dir=DATA.parent, prefix=".") as temporary:
                write(Path(temporary, DATA.name))
                os.replace(Path(temporary, DATA.name), DATA)
        train_all(console, run_command)
        if status := run_command("eval", ["--config", "recipes/digits_eval.yaml", "--overwrite", "true"], None):
            sys.exit(status)


def train_all(console: Terminal, run_command: RunCommand) -> None:
    """
    PVM in sight, and the controls beside it, whose output goes to files.

    Raises:
        UserError: if one fails, after all have ended.
    """

    def start(name: str, log: Path | None) -> None:
        folder = Path("runs", name)
        train(folder, ["--config", f"recipes/{name}.yaml", "--output_dir", str(folder)], log, run_command)

    logs = {name: Path("runs", f"{name}.log") for name in CONTROLS}
    console.print(f"The controls train in parallel; their progress is in {' and '.join(map(str, logs.values()))}")
    with ThreadPoolExecutor(len(logs)) as pool:
        controls = [pool.submit(start, name, log) for name, log in logs.items()]
        start("digits_pvm", None)
        for control in controls:
            control.result()
