"""Commands for checkpoints and studies."""

import importlib
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter

from pvm.errors import ends_in_a_sentence


# The module whose `main` is called, and what the command does. Only the chosen one is imported.
COMMANDS = {
    "inspect": ("pvm.checkpoints.inspect", "show what a checkpoint is, here or on the Hub, and what is wrong with it"),
    "convert": ("pvm.checkpoints.convert", "convert a checkpoint: whole, adapter, the authors' form"),
    "card": ("pvm.evaluation.card", "put the results of evaluations into a model card"),
    "serve": ("pvm.serve", "serve a checkpoint with an OpenAI-compatible API, by transformers' own server"),
    "study": ("pvm.study", "compare training methods over learning rates and seeds"),
}


def main(arguments: list[str] | None = None) -> None:
    commands = "\n".join(f"  {name:<10}{purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = ArgumentParser(
        "python -m pvm",
        usage="%(prog)s COMMAND ...",
        description=f"{__doc__}\n\n{commands}\n\n`python -m pvm COMMAND --help` explains a command.",
        formatter_class=RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("command", choices=COMMANDS, help=SUPPRESS)
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(parser.format_help())
        return
    command = parser.parse_args(arguments[:1]).command
    module, _ = COMMANDS[command]
    with ends_in_a_sentence(f"pvm {command}"):
        importlib.import_module(module).main(arguments[1:])


if __name__ == "__main__":
    main()
