"""Command lines from dataclasses, with values from flags, a YAML recipe, or both."""

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
from pvm.terminal import printable


class Parser(HfArgumentParser):
    """Errors may quote a recipe."""

    def error(self, message: str):
        super().error(printable(message))


def parse_arguments(
    dataclasses: Sequence[type], description: str, arguments: Sequence[str] | None = None, command: str | None = None
) -> tuple:
    """
    Parse a command line into dataclasses. `--config FILE` names a YAML recipe with fields as keys; flags override it.

    Args:
        dataclasses (`Sequence[type]`): each a group of fields.
        description (`str`): the start of `--help`.
        arguments (`Sequence[str]`, *optional*): the command line, `sys.argv[1:]` by default.
        command (`str`, *optional*): what help and errors call it, the name of the script by default.

    Returns:
        `tuple`: one instance of each dataclass.

    Raises:
        SystemExit: with a sentence on stderr, for a recipe that cannot be read, an unknown key or flag, or a value of
            the wrong type.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(
        dataclasses,
        prog=command,
        description=description,
        usage="%(prog)s [--config FILE] [--field value ...]   (--help explains the fields)",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.register("type", float, _number)
    parser.add_argument("--config", metavar="FILE", help="YAML recipe with any of these fields; flags override it.")

    config_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", action="append", default=[])
    config, flags = config_parser.parse_known_args(arguments)
    if len(config.config) > 1:
        parser.error("--config is given twice; give one recipe")
    for recipe in config.config:
        flags = _recipe_as_flags(parser, Path(recipe)) + flags
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            args=flags, return_remaining_strings=True, look_for_args_file=False
        )
    except json.JSONDecodeError as error:
        parser.error(f"{error.doc} is not valid JSON: {error}")
    except REFUSALS as error:  # flags that contradict each other, or need a package that is not installed
        parser.error(" ".join(str(error).split()))
    if unknown:
        parser.error(f"unknown argument {unknown[0]}{_did_you_mean(parser, unknown[0])}")
    return tuple(parsed)


def refuse_flags(arguments: Any, used: Sequence[str], reason: str) -> None:
    """
    Refuse flags that would have no effect.

    Args:
        arguments: a dataclass of flags.
        used (`Sequence[str]`): the flags that are allowed.
        reason (`str`): why the others are not, as the rest of a sentence that starts with the flag.

    Raises:
        UserError: naming the first flag that is neither at its default nor in `used`.
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
        parser.error(f"--config {path} must contain `field: value` lines")

    known = {option: action for action in parser._actions for option in action.option_strings}
    flags = {}
    for key, value in recipe.value:
        action = known.get(f"--{key.value}")
        if action is None:
            parser.error(f"{path}: unknown key `{key.value}`{_did_you_mean(parser, f'--{key.value}')}")
        if action.dest in ("config", "help"):
            parser.error(f"{path}: `{key.value}` belongs on the command line")
        if action.dest in flags:
            parser.error(f"{path}: `{key.value}` is given twice")
        if _is_none(value, action):
            flags[action.dest] = []
        elif isinstance(value, yaml.SequenceNode):
            flags[action.dest] = [f"--{key.value}", *(_text(item, action) for item in value.value)]
        else:
            flags[action.dest] = [f"--{key.value}={_text(value, action)}"]  # "=", because it may start with a dash
    return [word for words in flags.values() for word in words]


def _text(value: yaml.Node, action: Action) -> str:
    """A value as written in the file: YAML reads `no` as false, but in `save_strategy: no` it is a word."""
    if not isinstance(value, yaml.ScalarNode):
        return json.dumps(_nested(value))
    return str(yaml.safe_load(value.value)) if action.type is string_to_bool else value.value


def _nested(value: yaml.Node) -> Any:
    """The value of a flag that takes JSON. Numbers are parsed as JSON, because YAML reads 1e-4 as text."""
    if isinstance(value, yaml.MappingNode):
        return {key.value: _nested(item) for key, item in value.value}
    if isinstance(value, yaml.SequenceNode):
        return [_nested(item) for item in value.value]
    try:
        return json.loads(value.value)
    except ValueError:
        return value.value


def _is_none(value: yaml.Node, action: Action) -> bool:
    """Whether the value means "none": `null`, or false (as in `report_to: off`) for a field that takes any text."""
    if value.tag == "tag:yaml.org,2002:bool" and action.type is str and action.choices is None and action.nargs != "+":
        return not yaml.safe_load(value.value)
    return value.tag == "tag:yaml.org,2002:null"


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # nan would pass every check, because all comparisons with it are false
        raise ValueError(text)
    return number


def _did_you_mean(parser: HfArgumentParser, option: str) -> str:
    known = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(option.partition("=")[0], known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
