# ruff: noqa: RUF001  (characters that look like others are what is looked for)
"""The numbers that a phrase states: digits, fractions, powers, roots (plain or LaTeX), English and Chinese words."""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """
    values (`tuple[float, ...]`): one number, or several for a quantity such as 5 ft 6 in. Units are not kept.
    percent (`bool`): whether a per cent sign follows.
    """

    values: tuple[float, ...]
    percent: bool = False

    def equals(self, other: "Quantity", tolerance: float) -> bool:
        """
        Whether both are the same within a relative error. If only one has a per cent sign, 50 % equals 50 and 0.5.
        """
        shares = [1.0, 100.0] if self.percent != other.percent else [1.0]
        mine, others = (self, other) if self.percent or not other.percent else (other, self)
        return len(self.values) == len(other.values) and any(
            all(
                math.isclose(value / share, wanted, rel_tol=tolerance, abs_tol=1e-12)
                for value, wanted in zip(mine.values, others.values)
            )
            for share in shares
        )

    def restates(self, other: "Quantity") -> bool:
        """Whether this is the other one, or the other rounded to a decimal fraction ("2/3, or about 0.667")."""
        return self.equals(other, 1e-9) or (
            len(self.values) == len(other.values)
            and all(
                not value.is_integer() and value == round(exact, len(repr(value).partition(".")[2]))
                for value, exact in zip(self.values, other.values)
            )
        )


# --- words

SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
SMALL = {word: k for k, word in enumerate(f"{SMALL} eighteen nineteen".split())}
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
TENS = {word: 10 * k for k, word in enumerate(TENS.split(), start=2)}
SCALES = {"hundred": 100, "thousand": 1e3, "k": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12, "dozen": 12}
PARTS = {"half": 0.5, "halves": 0.5, "third": 1 / 3, "thirds": 1 / 3, "quarter": 0.25, "quarters": 0.25}
PARTS |= {
    f"{word}{s}": 1 / k for k, word in {4: "fourth", 5: "fifth", 8: "eighth", 10: "tenth"}.items() for s in ("", "s")
}
WORD = "|".join(sorted([*SMALL, *TENS, *SCALES], key=len, reverse=True))
PART = "|".join(sorted(PARTS, key=len, reverse=True))
IN_WORDS = re.compile(
    rf"(?P<whole>(?:a\s+)?(?:{WORD})(?:(?:[ -]|\s+and\s+)(?:{WORD})\b)*)\b"
    rf"(?:(?P<and>\s+and)?(?:\s+an?)?[ -](?P<part>{PART})\b)?"
    rf"|(?:a\s+)?(?P<only>half|quarter)\b(?:\s+an?\b)?",
    re.IGNORECASE,
)
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth"
ORDINALS = {word: k for k, word in enumerate(f"{ORDINALS} fifteenth sixteenth".split(), start=1)}
CHINESE = {character: k for k, character in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
CHINESE_SCALES = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
NUMERAL = f"(?!一[共起样些定直般])[{''.join([*CHINESE, *CHINESE_SCALES])}]{{1,20}}"
IN_CHINESE = re.compile(rf"(?P<share>百分之)?({NUMERAL})(?:分之({NUMERAL}))?")


def _english(found: re.Match) -> float:
    if found["only"]:
        return PARTS[found["only"].lower()]
    total, group = 0.0, 0.0
    words = re.findall(r"[a-z]+", found["whole"].lower())
    for word in words:
        if word in SCALES:
            group = (group or 1) * SCALES[word]
            if SCALES[word] > 100:
                total, group = total + group, 0.0
        elif word not in ("a", "and"):
            group += SMALL.get(word, TENS.get(word, 0))
    value = total + group
    if found["part"]:
        part = PARTS[found["part"].lower()]
        return value + part if found["and"] else value * part
    return value


def _chinese(numeral: str) -> float:
    total, group, digit = 0, 0, 0
    for character in numeral:
        if character in CHINESE:
            digit = 10 * digit + CHINESE[character]
        elif (scale := CHINESE_SCALES[character]) < 10**4:
            group, digit = group + (digit or 1) * scale, 0
        else:
            total, group, digit = (total + group + digit) * scale, 0, 0
    return float(total + group + digit)


# --- expressions

DIGITS = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+[.,]\d+|\d+|\.\d+)(?:[eE][-+]?\d{1,4}(?![\w.]))?")
THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;! ]|\{,\}| )(?=\d{3}(?!\d))")
TIMES = re.compile(r"\s*(?:\*(?!\*)|×|·|\\(?:times|cdot)(?![a-z])|[x](?=\s*10\s*(?:\^|\*\*)))\s*")
OVER = re.compile(r"\s*(?:/|÷|\\div(?![a-z]))\s*")
POWER = re.compile(r"\s*(?:\^|\*\*)\s*(?!\{?\\circ)")
MINUS = re.compile(r"(?:[-–－]|minus\b|negative\b|负)\s*", re.IGNORECASE)
FRACTION = re.compile(r"\s*\\[dtc]?frac\s*")
ROOT = re.compile(r"\s*(?:\\?sqrt|√)\s*")
PI = re.compile(r"\s*(?:\\pi|π|pi)(?![a-z])")
PERCENT = re.compile(r"\s*(?:\\?%|percent\b|per cent\b)", re.IGNORECASE)
SCALE = re.compile(
    r"(?:\s*(hundred|thousand|k|million|bn|billion|trillion|dozen|[十百千万亿])|(?-i:(?<=\d)([MB])))(?![a-z])",
    re.IGNORECASE,
)
SCALE_OF = SCALES | CHINESE_SCALES | {"m": 1e6, "b": 1e9, "bn": 1e9}
# What makes another thing of the number before it: a variable, an imaginary unit, a time of day.
OTHERWISE = re.compile(r"(?:\s*[*·]\s*)?(?:[a-ej-lnp-rt-z](?![a-z])|i(?![a-z])|:\d|\\[a-z]+(?<!\\circ)(?<!\\text))")
START = re.compile(
    rf"(?<![\w.\\^_])(?<!\^\{{)(?:(?<![\d)}}]){MINUS.pattern})?(?=\.?\d|[(√π{{]|\\[dtc]?frac|\\sqrt|sqrt|\\pi|(?:{WORD}|half|quarter)\b)"
    rf"|(?:{MINUS.pattern})?(?={NUMERAL}|百分之)"
    r"|(?<=[\u4e00-\u9fff])(?=\d)|(?<![\w.])[-–](?=\s?[\d\\√π])",
    re.IGNORECASE,
)
DEEPEST = 12


class _Parser:
    """Recursive descent from a position of a text. All methods raise `ValueError` where there is no number."""

    def __init__(self, text: str, at: int):
        self.text, self.at = text, at

    def take(self, pattern: re.Pattern) -> re.Match | None:
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def sum(self, depth: int = 0) -> float:
        value = self.product(depth)
        while operator := self.take(re.compile(r"\s*\+\s*|\s*plus\s+|\s+[-–]\s+|(?<=[)}])\s*-\s*|-(?=\d+\s*=)")):
            before = self.at
            try:
                other = self.product(depth)
            except ValueError:
                self.at = before - len(operator[0])
                break
            value += other if "+" in operator[0] or "plus" in operator[0] else -other
        return value

    def product(self, depth: int) -> float:
        value = self.power(depth)
        while True:
            before = self.at
            try:
                if self.take(TIMES):
                    value *= self.power(depth)
                elif self.take(OVER):
                    value /= self.power(depth)
                elif re.compile(r"\s*(?:√|\\sqrt|sqrt|\\pi|π|pi(?![a-z])|\\[dtc]?frac|\((?=\d))").match(
                    self.text, self.at
                ):
                    value *= self.power(depth)
                else:
                    return value
            except ValueError:
                self.at = before
                return value

    def power(self, depth: int) -> float:
        sign = -1 if self.take(MINUS) else 1
        self.take(re.compile(r"\+"))
        value = self.atom(depth + 1)
        if self.take(POWER):
            value = math.pow(value, self.argument(depth + 1))
        return sign * value

    def argument(self, depth: int) -> float:
        r"""What follows `\frac`, `\sqrt` or `^`: braces, or a single digit."""
        if self.take(re.compile(r"\s*[{(]")):
            value = self.sum(depth)
            if not self.take(re.compile(r"\s*[})]")):
                raise ValueError("not closed")
            return value
        if found := self.take(re.compile(r"\s*-?\d+" if self.text[self.at - 1 : self.at] in "^*√" else r"\s*\d")):
            return float(found[0])
        return self.atom(depth)

    def atom(self, depth: int) -> float:
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
        if self.take(FRACTION):
            above = self.argument(depth + 1)
            return above / self.argument(depth + 1)
        if self.take(ROOT):
            return math.sqrt(self.argument(depth + 1))
        if self.take(PI):
            return math.pi
        if self.take(re.compile(r"\s*[({]")):
            value = self.sum(depth + 1)
            if not self.take(re.compile(r"\s*[)}]")):
                raise ValueError("not closed")
            return value
        if found := self.take(DIGITS):
            digits = found[0].replace(",", "" if re.match(r"\d{1,3}(?:,\d{3})+(?!\d)", found[0]) else ".")
            value = float(digits)
            if value.is_integer() and not re.search(r"[.eE]", digits):
                value += self.mixed(depth)
            return value
        if found := self.take(IN_CHINESE):
            if found["share"]:
                return _chinese(found[2]) / 100
            return _chinese(found[3]) / _chinese(found[2]) if found[3] else _chinese(found[2])
        if found := self.take(IN_WORDS):
            return _english(found)
        raise ValueError("no number")

    def mixed(self, depth: int) -> float:
        """The fraction of a mixed number, or 0."""
        if found := self.take(re.compile(r"\s+(\d+)\s*/\s*(\d+)(?![\d/])")):
            return float(found[1]) / float(found[2])
        if re.compile(r"\s*\\[dtc]?frac\s*\{?\d").match(self.text, self.at):
            return self.atom(depth + 1)
        return 0.0


def _quantity(text: str, at: int) -> tuple[Quantity | None, int]:
    """The quantity at a position, and where it ends; `None` for what looks like a number and is another thing."""
    parser = _Parser(text, at)
    try:
        value = parser.sum()
        while scale := parser.take(SCALE):
            value *= SCALE_OF[(scale[1] or scale[2]).lower()]
    except (ArithmeticError, ValueError):
        return None, max(parser.at, at + 1)
    if not math.isfinite(value) or parser.take(OTHERWISE):
        return None, max(parser.at, at + 1)
    return Quantity((value,), bool(parser.take(PERCENT))), parser.at


# --- phrases

LATEX_TEXT = re.compile(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}|\$|\\[()\[\],;:! ]")
LABEL = re.compile(r"^(?:step|question|q|fig(?:ure)?|table)\.?\s*\d+\s*[:.)]?", re.IGNORECASE)
EXPLANATION = re.compile(
    r"(?:,?\s*\b(?:because|since|where|given that|while|whereas)\b|;|,?\s\((?!or\b)|:(?=\s|$)|[,，]?因为|，).*",
    re.IGNORECASE,
)
ALTERNATIVES = re.compile(r"\s*,?\(?\s*\bor\b\s*|\s*(?:或者?|还是)\s*|,\s*(?=[a-z]\s*=)", re.IGNORECASE)
ORDINAL = re.compile(
    rf"(?<!\ba )(?<!one[ -])\b(?:(?:(?P<tens>{'|'.join(TENS)})[ -])?(?P<ordinal>{'|'.join(ORDINALS)})"
    r"|\d+(?:st|nd|rd|th))\b(?:\s+one\b)?",
    re.IGNORECASE,
)
PLACE = re.compile(rf"(?:.*\b(?:is|was|in|on|at)\s+)?(?:the\s+)?(?:{ORDINAL.pattern})(?:\s+\w+)?", re.IGNORECASE)
# "After 3 of them left, ...": not the result, if a number follows.
INTRODUCTION = re.compile(r"^(?:after|when|if|once|in|of|out of|from)\b[^,:=]*,\s(?=.*\d)", re.IGNORECASE)
# Of things that can be counted: that there are no solutions, or is no information, is not 0.
ZERO = re.compile(
    r"none(?:\s+of\s+(?!the\s+(?:above|answers|choices|options|other)\b).*)?"
    r"|there\s+(?:is|are|was|were)\s+(?:none\b|(?:not\s+any|no)\s+(?!(?:\w+\s+)?(?:answer|evidence|data|image|indication"
    r"|info\w*|integer|mention|number|root|solution|value|way)s?\b)).*"
    r"|(?:no\s?one|nobody|no(?:\s\w+){1,2})\s+(?:is|are|was|were)\s+(?:visible|present|shown|left|there|\w+ing)\b.*",
    re.IGNORECASE,
)
CUES = (
    re.compile(
        r".*\b(?:so|therefore|thus|hence|a (?:difference|number|sum|total) of(?=\D*[\d.]+\W*$)|totall?ing"
        r"|total(?=\s*[:=]))\b|.*(?:因此|所以)",
        re.IGNORECASE | re.DOTALL,
    ),
    re.compile(
        r".*(?:=|≈|\\approx\b|\b(?:is|are|was|were|be|equals?|mak(?:es?|ing)|gives?|gets?)\b|[是为])",
        re.IGNORECASE | re.DOTALL,
    ),
)
# "2019 was the best year, with 5 ...": the result.
SUBJECT = re.compile(r"^(\S*\d\S*)\s+(?:is|was|are|were)\s+(?:the|when|where|how)\b.*", re.IGNORECASE)
NEGATED = re.compile(
    r"(?:\b(?:(?:can)?not(?: been?)?|never|rather than|instead of)|不是|[≠])\s*(?:about\s*|just\s*)?$", re.IGNORECASE
)
BOUND = re.compile(
    r"(?:[<>≤≥]|\\[gl](?:t|eq?)|\b(?:(?:more|less|fewer|greater|higher|lower|larger|smaller) than|at (?:least|most)|"
    r"up to|over|under|above|below|exceeds?))\s*$",
    re.IGNORECASE,
)
EITHER_SIGN = re.compile(r"±|\\pm\b")
UNIT = r"(?:\s*\^?\{?\\circ\}?|\s*°)?\s*(?:[^\W\d]+\.?(?:\s[^\W\d]+)?)?(?:\^\{?\d\}?)?"
JOINED = re.compile(
    rf"{UNIT}\s*,?\s*(?:\band\b|&|[和与])\s*$|\s*(?:,|、)\s*(?:(?:maybe|perhaps|possibly)\s*)?$"
    rf"|{UNIT}\s*(?:\bto\b|[-–~/到至])\s*$",
    re.IGNORECASE,
)
COMPOUND = re.compile(
    r"\s*(?:ft|feet|foot|'|′|yd|yards?|miles?|h|hrs?|hours?|min|minutes?|lbs?|pounds?|km|m|cm|°)\.?,?\s*(?:and\s*)?$",
    re.IGNORECASE,
)


def quantities(phrase: str) -> list[Quantity]:
    """
    The different quantities that a phrase states as its result: one where it is clear, several if they are coordinated
    ("5 or 6", "4-5", "5 dogs and 3 cats"), none if there is no number, or the number is negated or a bound.

    The result is what follows "so", the last "=" or the last "is", in its absence the first quantity.
    """
    if "\n" in phrase:
        return []
    phrase = THOUSANDS.sub(",", LABEL.sub("", phrase.strip()))
    phrase = LATEX_TEXT.sub(r" \1 ", phrase)
    phrase = INTRODUCTION.sub("", " ".join(phrase.split()), count=1)
    if ZERO.fullmatch(phrase.rstrip(".")):
        return [Quantity((0.0,))]
    if (place := PLACE.fullmatch(phrase.rstrip("."))) and place["ordinal"]:
        return [Quantity((float(TENS.get((place["tens"] or "").lower(), 0) + ORDINALS[place["ordinal"].lower()]),))]
    for remove in (EXPLANATION, ORDINAL):
        rest = remove.sub("", phrase)
        phrase = phrase if _stated(rest) is None else rest
    return [quantity for part in ALTERNATIVES.split(phrase) for quantity in _result(part)]


def _result(part: str) -> list[Quantity]:
    part = SUBJECT.sub(r"\1", part)
    for cue in CUES:
        if (before := cue.match(part)) and (after := _stated(part[before.end() :])) is not None:
            return after
    return _stated(part) or []


def _stated(part: str) -> list[Quantity] | None:
    """The first quantity and those coordinated with it; `None` if there are no digits or number words."""
    result: list[Quantity] = []
    seen, end, at = False, 0, 0
    while start := START.search(part, at):
        quantity, at = _quantity(part, start.start())
        between = part[end : start.start()]
        if result and COMPOUND.fullmatch(between) and quantity is not None:
            result = [Quantity((*result[-1].values, *quantity.values))]
        elif result and not JOINED.fullmatch(between):
            break
        elif NEGATED.search(between):
            seen = True
            end = at
            continue
        elif quantity is None or BOUND.search(between):
            return []
        elif result and "-" in between.strip() and quantity.values < result[-1].values:
            return [Quantity((result[-1].values[0] - quantity.values[0],))]  # a difference, not a range
        else:
            result.append(quantity)
            if EITHER_SIGN.search(between[-4:]):
                result.append(Quantity((-quantity.values[0],), quantity.percent))
        seen, end = True, at
    return result if seen else None
