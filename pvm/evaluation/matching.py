"""When an answer is correct: the same text, the same option, the same number, the same mathematical object."""

import re
from collections.abc import Callable
from enum import Enum
from typing import TypeVar

from pvm.errors import UserError
from pvm.evaluation.mathematics import expressions, is_expression, is_installed, same_expression
from pvm.evaluation.numerals import Quantity, quantities
from pvm.evaluation.options import options, plain
from pvm.evaluation.stated import MOST, clean, places


Value = TypeVar("Value")

TOLERANCE = 1e-4  # relative, of --match number


class Verdict(str, Enum):
    """
    `CORRECT`: the answer commits to the reference. `WRONG`: it commits to something else, or to nothing. `AMBIGUOUS`:
    it commits to several things ("B or C", two different `\\boxed{}`); a metric counts it as wrong.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    AMBIGUOUS = "ambiguous"


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".")


def final_values(text: str, read: Callable[[str], list[Value]], same: Callable[[Value, Value], bool]) -> list[Value]:
    """
    The different values of the most explicit place that has any, see [`places`]; the last ones if they correct those
    before. `read` finds the values in a phrase.
    """
    for group in places(text):
        found: list[Value] = []
        for place in group:
            values = read(place.text)
            if place.corrects and values:
                found = []
            for value in values:
                if len(found) < MOST and not any(same(value, other) for other in found):
                    found.append(value)
        if found:
            return found
    return []


def _option(reference: str) -> tuple[str | None, str]:
    """The letter of a reference, and its text."""
    found = re.match(r"\s*\(?([A-Za-z])(?:\)|[.:)]|\s*$)\s*(.*)", clean(reference), re.DOTALL)
    if found:
        return found[1].upper(), normalise(found[2])
    letters = final_values(reference, options, str.__eq__)
    return (letters[0] if len(letters) == 1 else None), ""


SUBJECT = re.compile(r".*\b(?:is|are|was|were|be|shows?)\s+")


def _judge_exact(answer: str, reference: str) -> Verdict:
    return _verdict([normalise(answer) == normalise(reference)])


def _judge_choice(answer: str, reference: str) -> Verdict:
    wanted, text = _option(reference)
    letters = final_values(answer, options, str.__eq__)
    if letters or not text:
        return _verdict([letter == wanted for letter in letters])

    def reads_text(phrase: str) -> list[str]:
        phrase = normalise(plain(phrase))
        return [text] if text in (phrase, SUBJECT.sub("", phrase)) else []

    return _verdict([True] if final_values(answer, reads_text, str.__eq__) else [])


def _numbers(text: str) -> list[Quantity]:
    return final_values(text, quantities, Quantity.restates)


def _judge_number(answer: str, reference: str, tolerance: float = TOLERANCE) -> Verdict:
    wanted, given = _numbers(reference), _numbers(answer)
    return _verdict([len(wanted) == 1 and quantity.equals(wanted[0], tolerance) for quantity in given])


# References that are numbers are compared as numbers first, which also reads words and units.
NUMERIC = re.compile(r"(?:[-\d.,%/^{}\s$]|\\[dtc]?frac|\\circ|\\,|°)+")
LEFT_SIDE = re.compile(r".*=\s*(?=\S)", re.DOTALL)
COLLECTION = re.compile(r".*\\pm|(?:\\left)?\\?[({\[]")


def _judge_math(answer: str, reference: str) -> Verdict:
    if normalise(answer) == normalise(reference):
        return Verdict.CORRECT
    if NUMERIC.fullmatch(clean(reference)):
        verdict = _judge_number(answer, reference, 1e-9)
        if verdict is not Verdict.WRONG:
            return verdict
    wanted = final_values(reference, expressions, str.__eq__)
    given = final_values(answer, expressions, str.__eq__)
    values = given if any("=" in part for part in wanted) else [LEFT_SIDE.sub("", part) for part in given]
    if same_expression(wanted, values) or (values != given and same_expression(wanted, given)):
        return Verdict.CORRECT
    is_single = len(wanted) == 1 and not COLLECTION.match(wanted[0])
    is_several = len(given) > 1 or any("\\pm" in expression for expression in given)
    return Verdict.AMBIGUOUS if is_single and is_several else Verdict.WRONG


def _verdict(matches: list[bool]) -> Verdict:
    if len(matches) > 1 and not all(matches):
        return Verdict.AMBIGUOUS
    return Verdict.CORRECT if matches and all(matches) else Verdict.WRONG


MATCHES = {"exact": _judge_exact, "choice": _judge_choice, "number": _judge_number, "math": _judge_math}


def judge(match: str, answer: str, reference: str) -> Verdict:
    """
    What an answer is worth. Deterministic, never raises whatever the answer, and may be called from any thread or
    process. It takes milliseconds, with `math` at most a second of processor time, after which an answer is wrong.

    Args:
        match (`str`): "exact", "choice", "number" or "math".
        answer (`str`): as the model wrote it.
        reference (`str`): one that [`check_reference`] accepts; with another no answer is correct.
    """
    return MATCHES[match](answer, reference)


def check_reference(match: str, reference: str) -> None:
    """
    Raises:
        UserError: if answers cannot be compared with the reference, or math-verify is needed and not installed.
    """
    if match == "choice" and _option(reference)[0] is None:
        needs = "not an option such as B, (B) or `B. a cat`"
    elif match == "number" and len(_numbers(reference)) != 1:
        needs = "not a number"
    elif match == "math" and not is_installed():
        raise UserError("--match math needs math-verify: pip install math-verify")
    elif match == "math" and not is_expression(final_values(reference, expressions, str.__eq__)):
        needs = "not a mathematical object"
    else:
        return
    raise UserError(f"The reference {reference[:60]!r} is {needs}: choose another --match.")
