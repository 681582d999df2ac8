"""When an answer is right: the same text, the same option, the same number, the same mathematical object."""

import math
import re

from ..errors import UserError


# What an answer's final statement looks like; the last one counts.
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
STATED = re.compile(r"\b(?:final\s+)?answer\b\s*(?:is|:|=)?\s*[:=]?\s*", re.IGNORECASE)
OPTION = re.compile(r"\(([A-Z])\)|(?<![A-Za-z])([A-Z])(?=[.:)\]]|\s*$)")
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")
FRACTION = re.compile(rf"({NUMBER.pattern})\s*/\s*({NUMBER.pattern})")


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".")


def is_exact_match(prediction: str, reference: str) -> bool:
    """Whether the two are the same after [`normalise`]."""
    return normalise(prediction) == normalise(reference)


def final_statement(text: str) -> str:
    """What a text gives as its answer: in the last `\\boxed{}`, else after the last "answer is", else all of it."""
    if boxed := BOXED.findall(text):
        return re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", boxed[-1])
    return STATED.split(text)[-1].strip().strip("*")


def chosen_option(text: str) -> str | None:
    """
    The letter of the option that a text chooses: `B`, `(B)`, `B.`, `B: a cat`, "The answer is (B), because ...".
    `None` if there is none, or several and no telling which.
    """
    statement = final_statement(text)
    if re.fullmatch(r"[A-Za-z]", statement):
        return statement.upper()
    first = OPTION.match(statement)
    letters = {first[1] or first[2]} if first else {found[1] or found[2] for found in OPTION.finditer(statement)}
    return letters.pop() if len(letters) == 1 else None


def is_same_option(prediction: str, reference: str) -> bool:
    """
    Whether the prediction chooses the option that the reference is.

    Raises:
        UserError: if the reference is no option.
    """
    wanted = chosen_option(reference)
    if wanted is None:
        raise UserError(
            f"The reference {reference[:60]!r} is no option like B, (B) or `B. a cat`: choose another --match."
        )
    return chosen_option(prediction) == wanted


def stated_number(text: str) -> float | None:
    """The last number in what a text gives as its answer; a fraction is one, and with a per cent sign a hundredth."""
    statement = final_statement(text)
    numbers = list(NUMBER.finditer(statement))
    if not numbers:
        return None
    last = numbers[-1]
    value = float(last[0].replace(",", ""))
    for fraction in FRACTION.finditer(statement):
        if fraction.end() == last.end() and value != 0:
            value = float(fraction[1].replace(",", "")) / value
    return value / 100 if statement[last.end() :].lstrip(" \\").startswith("%") else value


def is_same_number(prediction: str, reference: str) -> bool:
    """
    Whether both give the same number, to a ten-thousandth of it.

    Raises:
        UserError: if the reference has no number.
    """
    wanted, given = stated_number(reference), stated_number(prediction)
    if wanted is None:
        raise UserError(f"The reference {reference[:60]!r} has no number in it: choose another --match.")
    return given is not None and math.isclose(given, wanted, rel_tol=1e-4, abs_tol=1e-12)


def is_same_math(prediction: str, reference: str) -> bool:
    """
    Whether both are the same mathematical object, written in LaTeX or plainly, as math-verify sees it.

    Raises:
        UserError: if math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError("--match math needs math-verify: pip install math-verify") from error
    wanted = parse(reference) or parse(f"${reference}$")
    return verify(wanted, parse(prediction))


MATCHES = {"exact": is_exact_match, "choice": is_same_option, "number": is_same_number, "math": is_same_math}
