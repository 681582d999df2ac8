"""When an answer is correct: the same text, the same option, the same number, the same mathematical object."""

import math
import re

from pvm.errors import UserError


# Where an answer states its result; the last one counts.
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
STYLE = re.compile(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}")
IS = r"(?:\s*[:=]|\s+(?:is|should be|must be|would be)\b)[\s:=]*"
STATED = re.compile(rf"\banswer\b{IS}", re.IGNORECASE)
SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")

# An option is a capital letter by itself, but not the A of "A cat".
QUOTES = str.maketrans("", "", "*_`\"'“”‘’")  # noqa: RUF001
LETTER = r"(?:\(([A-Z])\)|([A-Z])(?![\w-])(?!(?<=[AI])\s+(?!(?:because|since|as|and|or|is)\b)\w))"
CHOSEN = re.compile(rf"\b(?i:answer|option|choice)\b{IS}(?:(?i:option|choice)\s+)?{LETTER}")
PRAISED = re.compile(rf"(?<!\w){LETTER}\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b")
AT_FIRST = re.compile(r"\(([A-Z])\)|([A-Z])(?=[.:)]|\s*\n|\s*$)")
ANYWHERE = re.compile(r"\(([A-Z])\)|(?<!\w)([A-Z])(?=[.:),]|\s*$)")
ONE_MORE = re.compile(r"\s*(?:or|and|/|&|,)\s*\(?[A-Z]\b(?!\s+[a-z])")

# Digits inside a word (H2O) are not a number, and the minus in "3-4" is not a sign.
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(rf"(?:(?<![\w)])[-+])?(?<![\w.]){DIGITS}(?:[eE][-+]?\d+)?")
FRACTION = re.compile(rf"(?:(?<![\w.])(\d+)\s+)?(?<![\w.])({DIGITS})\s*/\s*([-+]?{DIGITS})")
LATEX_FRACTION = re.compile(r"\s*\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
TIMES_TEN = re.compile(r"(?<=\d)\s*(?:x|×|\*|\\times|\\cdot)\s*10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?")  # noqa: RUF001
POWER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*\^\s*\{?\s*([-+]?\d+)\s*\}?")
EXPONENT = re.compile(r"\^\s*(?:\{[^{}]*\}|[-+]?\w+)")

# Delimiters between which math-verify looks for mathematics, and how mathematics is told from prose without them.
DELIMITED = re.compile(r"\$[^$]+\$|\\\(|\\\[|\\boxed|\\begin")
LATEX = re.compile(r"\\[A-Za-z]|\^")
FUNCTION = re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|log|ln|exp|pi)(?![A-Za-z])")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".")


def is_exact_match(prediction: str, reference: str) -> bool:
    """Whether the two are the same after [`normalise`]."""
    return normalise(prediction) == normalise(reference)


def final_statement(text: str) -> str | None:
    """The answer that a text states: in the last `\\boxed{}`, else the rest of the sentence after "answer is"."""
    if boxed := BOXED.findall(text):
        return STYLE.sub(r"\1", boxed[-1])
    parts = STATED.split(text.replace("**", ""))
    return SENTENCE_END.split(parts[-1])[0] if len(parts) > 1 else None


def chosen_option(text: str) -> str | None:
    """
    The letter of the option that a text chooses: `B`, `(b)`, `B. a cat`, "The correct option is **B**, because ...",
    "B is right", or the only letter that it names. `None` if there is none, or several without a choice.
    """
    if boxed := BOXED.findall(text):
        text = STYLE.sub(r"\1", boxed[-1])
    text = text.translate(QUOTES).strip()
    if alone := re.search(rf"(?:\A|\n\s*|\banswer{IS})\(?([A-Za-z])\)?[.)]?\Z", text, re.IGNORECASE):
        return alone[1].upper()
    for pattern in (CHOSEN, PRAISED):
        if stated := list(pattern.finditer(text)):
            return None if ONE_MORE.match(text, stated[-1].end()) else _letter(stated[-1])
    if first := AT_FIRST.match(text):
        line, *others = text[first.end() :].split("\n")
        listed = {_letter(found) for other in others if (found := AT_FIRST.match(other.strip()))}
        # "B. a dog" is a choice, a list of all options is not.
        return None if line.strip(" .:)") and listed - {_letter(first)} else _letter(first)
    letters = {_letter(found) for found in ANYWHERE.finditer(text)}
    return letters.pop() if len(letters) == 1 else None


def _letter(found: re.Match) -> str:
    return found[1] or found[2]


def is_same_option(prediction: str, reference: str) -> bool:
    """
    Whether the prediction chooses the same option as the reference.

    Raises:
        UserError: if the reference is not an option.
    """
    wanted = chosen_option(reference)
    if wanted is None:
        raise UserError(
            f"The reference {reference[:60]!r} is not an option such as B, (B) or `B. a cat`: choose another --match."
        )
    return chosen_option(prediction) == wanted


def stated_number(text: str) -> tuple[float, bool] | None:
    """
    The number that a text gives as its answer, and whether a per cent sign follows: the first one after "answer is"
    (after the last "=" of that sentence), else the last number of the text. Fractions, mixed numbers, powers and
    scientific notation are one number; exponents of units are ignored. `None` if there is no number.
    """
    statement = final_statement(text)
    plain = _plain_numbers(text if statement is None else statement.rpartition("=")[2])
    numbers = list(NUMBER.finditer(plain))
    if not numbers:  # "12 is the answer: ..."
        before = STATED.search(text)
        return before and stated_number(text[: before.start()])
    found = numbers[-1 if statement is None else 0]
    return float(found[0].replace(",", "")), plain[found.end() :].lstrip(" \\").startswith("%")


def _plain_numbers(text: str) -> str:
    """The text with fractions and powers as decimal numbers."""
    text = text.replace("−", "-").replace("{,}", ",").replace("\\,", "").replace("**", "")  # noqa: RUF001
    text = LATEX_FRACTION.sub(r" \1/\2", text)
    text = TIMES_TEN.sub(r"e\1", text)
    text = EXPONENT.sub("", POWER.sub(_power, text))
    return FRACTION.sub(_quotient, text)


def _power(found: re.Match) -> str:
    try:
        return repr(float(found[1]) ** int(found[2]))
    except ArithmeticError:  # too large, or a power of 0
        return found[0]


def _quotient(found: re.Match) -> str:
    above, below = (float(part.replace(",", "")) for part in (found[2], found[3]))
    return found[0] if below == 0 else repr(float(found[1] or 0) + above / below)


def is_same_number(prediction: str, reference: str) -> bool:
    """
    Whether both give the same number, within a relative error of 1e-4. If only one of them has a per cent sign, 50 %
    equals both 50 and 0.5.

    Raises:
        UserError: if the reference has no number.
    """
    wanted, given = stated_number(reference), stated_number(prediction)
    if wanted is None:
        raise UserError(f"The reference {reference[:60]!r} contains no number: choose another --match.")
    if given is None:
        return False
    (value, is_share), (other, is_other_share) = given, wanted
    readings = [(value, other)]
    if is_share != is_other_share:
        readings.append((value / 100, other) if is_share else (value, other / 100))
    return any(math.isclose(*reading, rel_tol=1e-4, abs_tol=1e-12) for reading in readings)


def is_same_math(prediction: str, reference: str) -> bool:
    """
    Whether both are the same text or, according to math-verify, the same mathematical object, in LaTeX or plain text.

    Raises:
        UserError: if math-verify is not installed, or cannot parse the reference.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError("--match math needs math-verify: pip install math-verify") from error
    wanted = parse(_delimited(reference))
    if not wanted:
        raise UserError(f"The reference {reference[:60]!r} is not a mathematical object: choose another --match.")
    return is_exact_match(prediction, reference) or verify(wanted, parse(_delimited(prediction)))


def _delimited(text: str) -> str:
    """The text with its mathematics between dollars, without which math-verify only finds plain numbers."""
    if DELIMITED.search(text):
        return text
    statement = (final_statement(text) or text).strip().rstrip(".").replace("$", "")
    statement = FUNCTION.sub(r"\\\1", statement)
    if WORD.search(statement) and not LATEX.search(statement):
        return text  # prose, in which math-verify finds plain numbers
    return f"${WORD.sub(' ', statement)}$"


MATCHES = {"exact": is_exact_match, "choice": is_same_option, "number": is_same_number, "math": is_same_math}
