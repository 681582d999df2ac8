"""
Compares methods fairly: trains each at several learning rates and seeds on the same data, then evaluates all of them.

    python -m pvm.study --config recipes/digits_study.yaml

The recipe says what is trained and how; a run that was interrupted, or the whole study, goes on with the same line.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers.trainer_utils import get_last_checkpoint

from pvm.errors import UserError
from pvm.training.methods import METHODS


ROOT = Path(__file__).resolve().parent.parent  # where train.py and eval.py are
LAST_SHARE = 0.2  # of the logged losses, over which learning rates are compared
# What a finished training leaves in its folder.
FINISHED = ("model.pvm.safetensors", "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


@dataclass
class Study:
    """
    A recipe.

    output_dir (`str`): where runs, logs and the report go.
    seeds (`list[int]`): of the trainings. Learning rates are chosen at the first.
    train (`dict`): train.py's fields that all runs share.
    methods (`dict[str, dict]`): by its name in the report, what train.py is told besides; `learning_rates` is a list
        of those to choose from.
    evaluate (`dict`): eval.py's fields; model and names are the base, "base", and all chosen runs.
    """

    output_dir: str
    seeds: list[int]
    train: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    evaluate: dict[str, Any]

    @classmethod
    def load(cls, path: str) -> "Study":
        """
        Raises:
            UserError: if the file is no recipe of a study.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--config {path}: {' '.join(str(error).split())}") from error
        wanted = {field.name for field in fields(cls)}
        found = set(content) if isinstance(content, dict) else set()
        if found != wanted:
            wrong = ", ".join(sorted(f"`{key}`" for key in found ^ wanted))
            raise UserError(f"{path}: a study has the keys {', '.join(sorted(wanted))}; missing or unknown: {wrong}.")
        study = cls(**content)
        seeds, methods = study.seeds, study.methods
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
            raise UserError(f"{path}: `seeds` must be a list of whole numbers, e.g. [0, 1, 2].")
        for key, value in (("train", study.train), ("methods", methods), ("evaluate", study.evaluate)):
            if not isinstance(value, dict) or not value:
                raise UserError(f"{path}: `{key}` must hold `name: value` lines.")
        if "model_name_or_path" not in study.train:
            raise UserError(f"{path}: `train` lacks `model_name_or_path`, the base of all.")
        for name, method in methods.items():
            rates = method.get("learning_rates") if isinstance(method, dict) else None
            if not isinstance(rates, list) or not rates:
                raise UserError(f"{path}: methods: {name} has no `learning_rates`. Give a list of one or more.")
            if method.get("method") not in METHODS:
                raise UserError(f"{path}: methods: {name}: `method` must be one of {', '.join(METHODS)}.")
            for rate in rates:
                if not isinstance(rate, float):
                    raise UserError(f"{path}: methods: {name}: the learning rate {rate!r} is no number: write 1.0e-3.")
        return study


@dataclass
class Run:
    """One training: its method's name in the report, its learning rate and its seed."""

    study: Study
    name: str
    learning_rate: float
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.study.output_dir) / self.name / f"learning_rate_{self.learning_rate}-seed_{self.seed}"

    @property
    def finished(self) -> bool:
        return any((self.folder / file).is_file() for file in FINISHED)

    @property
    def settings(self) -> dict[str, Any]:
        """What train.py is told."""
        method = {key: value for key, value in self.study.methods[self.name].items() if key != "learning_rates"}
        return {**self.study.train, **method, "learning_rate": self.learning_rate, "seed": self.seed}

    def check(self) -> None:
        """
        Raises:
            UserError: if the run was begun with other settings.
        """
        file = self.folder.with_name(f"{self.folder.name}.json")
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else self.settings
        different = sorted(key for key in {*before, *self.settings} if before.get(key) != self.settings.get(key))
        if different:
            raise UserError(
                f"{self.folder} was trained with another {', '.join(different)} than the recipe has now. Choose "
                "another `output_dir`, or delete that folder and the .json file beside it."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.settings) + "\n", encoding="utf-8")

    def train(self) -> None:
        """
        Run train.py, or what is left of it.

        Raises:
            UserError: if it ends with an error, or was begun with other settings.
        """
        if self.finished:
            return
        settings = self.settings
        if self.folder.is_dir() and get_last_checkpoint(self.folder):
            settings["resume_from_checkpoint"] = "last"
        log = self.folder.with_name(f"{self.folder.name}.log")
        command = [sys.executable, str(ROOT / "train.py"), *_flags(settings), "--output_dir", str(self.folder)]
        with open(log, "a", encoding="utf-8") as output:
            result = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
        if result.returncode:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise UserError(f"The training {self.folder} ended with an error, see {log}: {' '.join(last)}")

    @property
    def loss(self) -> float:
        """The mean of the last fifth of the logged training losses: in a first epoch, those of unseen rows."""
        state = json.loads((self.folder / "trainer_state.json").read_text(encoding="utf-8"))
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        last = losses[-max(round(LAST_SHARE * len(losses)), 1) :]
        return sum(last) / len(last)


def _flags(settings: dict[str, Any]) -> list[str]:
    flags = []
    for key, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        else:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def train_all(runs: list[Run], jobs: int, description: str) -> None:
    """
    Train what is not trained yet, `jobs` at a time.

    Raises:
        UserError: if any ends with an error (those that have begun are finished first), or was begun otherwise.
    """
    for run in runs:
        run.check()
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), desc=description, unit="run") as bar:
        futures = [pool.submit(run.train) for run in runs]
        try:
            for future in futures:
                future.result()
                bar.update()
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise


def choose(study: Study, runs: list[Run]) -> dict[str, float]:
    """For each method the learning rate whose loss is lowest. All are written to learning_rates.json."""
    losses: dict[str, dict[float, float]] = {}
    for run in runs:
        losses.setdefault(run.name, {})[run.learning_rate] = run.loss
    Path(study.output_dir, "learning_rates.json").write_text(json.dumps(losses, indent=2) + "\n", encoding="utf-8")
    return {name: min(tried, key=tried.get) for name, tried in losses.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser("python -m pvm.study", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the recipe of the study")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give a number from 1")
    study = Study.load(args.config)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    tries = [
        Run(study, name, rate, study.seeds[0])
        for name, method in study.methods.items()
        for rate in method["learning_rates"]
    ]
    train_all(tries, args.jobs, "learning rates")
    rates = choose(study, tries)
    chosen = [Run(study, name, rates[name], seed) for name in study.methods for seed in study.seeds]
    train_all(chosen, args.jobs, "seeds")

    table = Table(title="learning rates, chosen by the loss of the last fifth of the training")
    for heading in ("method", "tried: loss", "chosen"):
        table.add_column(heading)
    for name in study.methods:
        losses = {run.learning_rate: run.loss for run in tries if run.name == name}
        at_edge = len(losses) > 1 and rates[name] in (min(losses), max(losses))
        tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
        table.add_row(name, tried, f"{rates[name]:g}{' (the outermost that was tried)' if at_edge else ''}")
    console = Console(soft_wrap=True)
    console.print(table)

    models = [study.train["model_name_or_path"], *(str(run.folder) for run in chosen)]
    settings = {"output_dir": str(Path(study.output_dir) / "report"), **study.evaluate}
    settings |= {"model": models, "names": ["base", *(run.name for run in chosen)]}
    file = Path(settings["output_dir"]) / "report.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))["arguments"]
        different = [key for key, value in settings.items() if before[key] != value]
        if different:
            raise UserError(f"{file} is a report with another {', '.join(different)}. Move it away to make a new one.")
        console.print(f"The report is written: {file.with_name('report.html')}")
        return
    sys.exit(subprocess.run([sys.executable, str(ROOT / "eval.py"), *_flags(settings)]).returncode)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"pvm.study: error: {error}")
    except KeyboardInterrupt:
        sys.exit("pvm.study: interrupted. The same line goes on with it.")
