"""Persistent Visual Memory for Qwen3-VL: training, evaluation, checkpoints."""

import importlib
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from typing import NamedTuple

from pvm import __version__
from pvm.errors import ends_in_a_sentence


class Command(NamedTuple):
    """`main` of `module` is called; `interrupted` is printed after Ctrl-C."""

    module: str
    purpose: str
    interrupted: str = "interrupted."


CONTINUES = "interrupted. If there is a checkpoint, --resume_from_checkpoint last continues from it."
RESUMES = "interrupted. The same command resumes it."
# Only the chosen one is imported.
COMMANDS = {
    "demo": Command("pvm.demo", "train, evaluate and draw the embedded default: no GPU, no network", RESUMES),
    "recipes": Command("pvm.shipped", "put the recipes of trainings and evaluations into ./recipes"),
    "filter": Command("pvm.filter", "choose the rows of data sets that need their images", RESUMES),
    "train": Command("pvm.train", "train branches in a frozen Qwen3-VL, or a control", CONTINUES),
    "grpo": Command("pvm.grpo", "train a checkpoint further with rewards", CONTINUES),
    "eval": Command("pvm.eval", "evaluate checkpoints on the same questions, and write a report", RESUMES),
    "study": Command("pvm.study", "compare training methods over learning rates and seeds", RESUMES),
    "inspect": Command("pvm.checkpoints.inspect", "show what a checkpoint is, here or on the Hub, and what is wrong"),
    "convert": Command("pvm.checkpoints.convert", "convert a checkpoint: whole, adapter, the authors' form"),
    "card": Command("pvm.evaluation.card", "put the results of evaluations into a model card"),
    "zoo": Command("pvm.checkpoints.zoo", "a table of checkpoints, from their cards and records"),
    "app": Command("pvm.app.command", "ask checkpoints in the browser, and see what each token saw of the image"),
    "serve": Command("pvm.serve", "serve a checkpoint with an OpenAI-compatible API, by transformers' own server"),
}


def main(arguments: list[str] | None = None) -> None:
    """The command `pvm`, also `python -m pvm`."""
    commands = "\n".join(f"  {name:<10}{command.purpose}" for name, command in COMMANDS.items())
    parser = ArgumentParser(
        "pvm",
        usage="%(prog)s COMMAND ...",
        description=f"{__doc__}\n\n{commands}\n\n`pvm COMMAND --help` explains a command.",
        formatter_class=RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("--version", action="version", version=f"pvm {__version__}")
    parser.add_argument("command", choices=COMMANDS, help=SUPPRESS)
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(parser.format_help())
        return
    name = parser.parse_args(arguments[:1]).command
    command = COMMANDS[name]
    with ends_in_a_sentence(f"pvm {name}", command.interrupted):
        importlib.import_module(command.module).main(arguments[1:])


if __name__ == "__main__":
    main()
