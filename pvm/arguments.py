"""Command lines from dataclasses, with values from a YAML recipe, from flags, or from both."""

import difflib
import json
import math
import sys
from argparse import Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from pvm.errors import REFUSALS, UserError


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
    parser.register("type", float, _number)
    parser.add_argument("--config", metavar="FILE", help="YAML recipe with any of these fields; flags win over it.")

    config_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", action="append", default=[])
    config, flags = config_parser.parse_known_args(arguments)
    if len(config.config) > 1:
        parser.error("--config is there twice, and only one recipe can be meant")
    for recipe in config.config:
        flags = _recipe_as_flags(parser, Path(recipe)) + flags
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            args=flags, return_remaining_strings=True, look_for_args_file=False
        )
    except json.JSONDecodeError as error:
        parser.error(f"{error.doc} is not valid JSON: {error}")
    except REFUSALS as error:  # flags that contradict one another, or ask for what is not installed
        parser.error(" ".join(str(error).split()))
    if unknown:
        parser.error(f"unknown argument {unknown[0]}{_did_you_mean(parser, unknown[0])}")
    return tuple(parsed)


def refuse_flags(arguments: Any, used: Sequence[str], reason: str) -> None:
    """
    Raises:
        UserError: naming the first field of a dataclass of flags that is not its default and not in `used`.
    """
    defaults = type(arguments)(**{name: value for name, value in vars(arguments).items() if name in used})
    for flag in fields(arguments):
        if vars(arguments)[flag.name] != vars(defaults)[flag.name]:
            raise UserError(f"--{flag.name} {reason}. Leave it out.")


def _recipe_as_flags(parser: HfArgumentParser, path: Path) -> list[str]:
    try:
        recipe = yaml.compose(path.read_bytes(), yaml.SafeLoader)
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror}")
    except yaml.YAMLError as error:
        parser.error(f"--config {path} is not valid YAML: {' '.join(str(error).split())}")
    if not isinstance(recipe, yaml.MappingNode):
        parser.error(f"--config {path} must hold `field: value` lines")

    known = {option: action for action in parser._actions for option in action.option_strings}
    flags = {}
    for key, value in recipe.value:
        action = known.get(f"--{key.value}")
        if action is None:
            parser.error(f"{path}: unknown key `{key.value}`{_did_you_mean(parser, f'--{key.value}')}")
        if action.dest in ("config", "help"):
            parser.error(f"{path}: `{key.value}` belongs on the command line")
        if action.dest in flags:
            parser.error(f"{path}: `{key.value}` is there twice, and only one can be meant")
        if _is_none(value, action):
            flags[action.dest] = []
        elif isinstance(value, yaml.SequenceNode):
            flags[action.dest] = [f"--{key.value}", *(_text(item, action) for item in value.value)]
        else:
            flags[action.dest] = [f"--{key.value}={_text(value, action)}"]  # with "=", it may start with a dash
    return [word for words in flags.values() for word in words]


def _text(value: yaml.Node, action: Action) -> str:
    """A value as it stands in the file: to YAML `no` is a truth value, and in `save_strategy: no` it is a word."""
    if not isinstance(value, yaml.ScalarNode):
        return json.dumps(_nested(value))
    return str(yaml.safe_load(value.value)) if action.type is string_to_bool else value.value


def _nested(value: yaml.Node) -> Any:
    """What a flag takes as JSON; its numbers are JSON's, too, because 1e-4 is none to YAML."""
    if isinstance(value, yaml.MappingNode):
        return {key.value: _nested(item) for key, item in value.value}
    if isinstance(value, yaml.SequenceNode):
        return [_nested(item) for item in value.value]
    try:
        return json.loads(value.value)
    except ValueError:
        return value.value


def _is_none(value: yaml.Node, action: Action) -> bool:
    """Whether it says that there is nothing: `null`, and `report_to: off`, where any one text could stand."""
    if value.tag == "tag:yaml.org,2002:bool" and action.type is str and action.choices is None and action.nargs != "+":
        return not yaml.safe_load(value.value)
    return value.tag == "tag:yaml.org,2002:null"


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # nan compares as false with everything, so that no check would find it
        raise ValueError(text)
    return number


def _did_you_mean(parser: HfArgumentParser, option: str) -> str:
    known = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(option.partition("=")[0], known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
