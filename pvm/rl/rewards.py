"""
What an answer is worth. The default is the paper's: 0.9 for a correct answer, 0.1 for the format.

A function of one's own, in any Python file:

    def brevity(completions, answer, **kwargs):
        '''A reward for each completion. `answer` has the references, `kwargs` all else that trl's trainer knows.'''
        return [float(len(completion[0]["content"]) < 200) for completion in completions]

is named as `--reward_functions accuracy_reward my_rewards.py:brevity --reward_weights 0.9 0.1`.
"""

import hashlib
import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pvm.errors import UserError
from pvm.evaluation.matching import Verdict, judge


# Exactly one thought and then one answer; what surrounds them is blank.
INSIDE = r"((?!</?(?:think|answer)>).)*"
FORMAT = re.compile(rf"\s*<think>{INSIDE}</think>\s*<answer>{INSIDE}</answer>\s*", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

RewardFunction = Callable[..., list[float]]


def accuracy_function(match: str) -> RewardFunction:
    """The reward 1 for an answer that is correct by `match`, else 0. Where there is an <answer>, only that counts."""

    def accuracy_reward(completions: Sequence[list[dict]], answer: Sequence[str], **kwargs) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        stated = [(ANSWER.findall(text) or [text])[-1] for text in texts]
        return [float(judge(match, text, reference) is Verdict.CORRECT) for text, reference in zip(stated, answer)]

    return accuracy_reward


def format_reward(completions: Sequence[list[dict]], **kwargs) -> list[float]:
    """The reward 1 for `<think>...</think><answer>...</answer>`, else 0."""
    return [float(FORMAT.fullmatch(completion[0]["content"]) is not None) for completion in completions]


def load_rewards(names: Sequence[str], match: str) -> list[RewardFunction]:
    """
    The reward functions of a command line: `accuracy_reward`, `format_reward` or `FILE.py:FUNCTION`, which runs the
    file.

    Raises:
        UserError: if there is no such function.
    """
    own = {"accuracy_reward": accuracy_function(match), "format_reward": format_reward}
    return [own[name] if name in own else _load(name) for name in names]


def _load(name: str) -> RewardFunction:
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"--reward_functions {name}: name accuracy_reward, format_reward, or FILE.py:FUNCTION.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"--reward_functions {name}: {type(error).__name__}: {error}") from error
    if not callable(vars(module).get(function)):
        raise UserError(f"--reward_functions {name}: {path} has no function {function!r}.")
    return vars(module)[function]


def code_of_rewards(names: Sequence[str]) -> str:
    """A hash of the files of reward functions."""
    files = [Path(name.rpartition(":")[0]) for name in names if ":" in name]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def check_rewards(functions: Sequence[RewardFunction], names: Sequence[str], row: dict[str, Any]) -> None:
    """
    Call each function once as the trainer does, with two answers to a `row` of [`pvm.rl.prompts.as_prompts`].

    Raises:
        UserError: if one fails, or does not return a number for each answer.
    """
    completions = [[{"role": "assistant", "content": text}] for text in (row["answer"], "")]
    columns = {"prompts": [row["prompt"]] * 2, "images": [row["images"]] * 2, "answer": [row["answer"]] * 2}
    for function, name in zip(functions, names):
        try:
            values = function(completions=completions, **columns)
            numbers = [float(value) for value in values]
        except Exception as error:
            raise UserError(f"--reward_functions {name}: {type(error).__name__}: {error}") from error
        if len(numbers) != 2 or not all(map(math.isfinite, numbers)):
            raise UserError(f"--reward_functions {name}: for two completions it returned {values!r}, not two numbers.")
