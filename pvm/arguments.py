"""Command lines from dataclasses, with values from a YAML recipe, from flags, or from both."""

import difflib
import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_arguments(dataclasses: Sequence[type], description: str, arguments: Sequence[str] | None = None) -> tuple:
    """
    Parse a command line into dataclasses. `--config FILE` names a YAML recipe whose keys are the fields; flags on the
    command line win over it.

    Args:
        dataclasses (`Sequence[type]`): one group of fields each.
        description (`str`): what `--help` says first.
        arguments (`Sequence[str]`, *optional*): the command line, `sys.argv[1:]` by default.

    Returns:
        `tuple`: one instance of each dataclass.

    Raises:
        SystemExit: with a sentence on stderr, for a recipe that cannot be read, unknown keys and flags, and values of
            a wrong type.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(
        dataclasses,
        description=description,
        usage="%(prog)s [--config FILE] [--field value ...]   (--help explains the fields)",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML recipe with any of these fields; flags win over it.")

    if arguments.count("--config") > 1:
        parser.error("--config is there twice, and only one recipe can be meant")
    config_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config, flags = config_parser.parse_known_args(arguments)
    if config.config is not None:
        flags = _recipe_as_flags(parser, Path(config.config)) + flags
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(args=flags, return_remaining_strings=True)
    except ValueError as error:  # flags that contradict one another
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown argument {unknown[0]}{_did_you_mean(parser, unknown[0])}")
    return tuple(parsed)


def _recipe_as_flags(parser: HfArgumentParser, path: Path) -> list[str]:
    try:
        recipe = yaml.safe_load(path.read_text())
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror}")
    except yaml.YAMLError as error:
        parser.error(f"--config {path} is not valid YAML: {error}")
    if not isinstance(recipe, dict):
        parser.error(f"--config {path} must hold `field: value` lines")

    known = {option for action in parser._actions for option in action.option_strings}
    flags = []
    for key, value in recipe.items():
        if f"--{key}" not in known:
            parser.error(f"{path}: unknown key `{key}`{_did_you_mean(parser, f'--{key}')}")
        if value is not None:
            flags += [f"--{key}", *_as_strings(value)]
    return flags


def _as_strings(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]


def _did_you_mean(parser: HfArgumentParser, option: str) -> str:
    known = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(option.partition("=")[0], known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
