"""The options (A, B, C) that a phrase chooses."""

import re


# LaTeX's text commands, which leave their content, and marks without a meaning here.
WRAPPED = re.compile(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}")
MARKS = re.compile(r"\\[()\[\],;:! ]|[$*_'{}]|^[\s>•:=-]+")

TOGETHER = re.compile(r"[A-H]{2,8}")
LISTED = re.compile(r"(?:^|\s)\(?([A-Z])[).:]\s")

# A letter in brackets, a capital by itself, or a small letter with a mark behind it.
LETTER = re.compile(
    r"""[(\[]\s*(?P<bracketed>[A-Za-z])\s*[)\]]
    | (?<![A-Za-z0-9&]) (?P<capital>[A-Z]) (?![A-Za-z0-9'+&-]|\.\w)
    | (?<![A-Za-z0-9]) (?P<small>[a-z]) (?=[).:](?:\s|$)|\s*$|\s+is\s+(?:correct|right|best)\b)""",
    re.VERBOSE,
)
# The A of "A cat" and the I of "I think" are words, unless an option is announced.
IS_WORD = re.compile(r"\s+(?!(?:because|since|as|and|or|is|but|it|for|are|both|fits|matches|must|best)\b)[A-Za-z]")
IS_OPTION = re.compile(r"\b(?:option|choice|answer|letter)\s+$", re.IGNORECASE)
# What comes before a letter that is an option, which "Vitamin C" and "Plan B" do not have.
BEFORE = re.compile(
    r"""(?:^ | [.!?\n]\s* | [:=>→⇒∴】选项是为案故择]
        | \b(?:options?|choices?|answers?|letter|is|are|be|its|but|think|believe|choose|chose|pick|select|with|say|that
        |matches|maybe|probably|perhaps|likely|either|both|between|not|neither|nor|leaves|leaving)\b\s*:?
        | \b(?:so|therefore|thus|hence|elimination|(?:options|choices)(?=,))\b\s*[:,]?)
    \s*(?:the\s+|definitely\s+|probably\s+)?(?:(?:options?|choices?|letter|figure|graph|image|picture|diagram|statement)\s+)?$""",
    re.IGNORECASE | re.VERBOSE,
)
BETWEEN = re.compile(
    r"""\s*[.)\]]?\s*(?:(?:,|/|&|\(?\bor\b|\band\b|[和或与及])\s*)+
    (?:possibly|maybe|also|perhaps)?\s*(?:options?\s*)?""",
    re.IGNORECASE | re.VERBOSE,
)
NEGATED = re.compile(
    r"""(?:\b(?:(?:can)?not(?:\sbe)?|neither|never|nor|than|instead\sof)|不是|不选)\s*
    (?:the\s+)?(?:options?|choices?)?\s*$""",
    re.IGNORECASE | re.VERBOSE,
)
REFUTED = re.compile(
    r"""\s*(?:选项)?\s*(?:(?:is|are|does|do|can)\s+(?:\w+ly\s+)?(?:not\b|too\b|wrong|incorrect|false|out\b)|不正确|错)""",
    re.IGNORECASE,
)
PRAISED = re.compile(
    r"""\s*(?:选项)?\s*(?:正确|(?:is|are|must\sbe|would\sbe|seems)\s+(?:\w+ly\s+)?(?:the\s+)?(?:(?:only|most)\s+)?
    (?:correct|right|best|true|answer)\b|(?:\w+\s+)?best\b)""",
    re.IGNORECASE | re.VERBOSE,
)
NEAR = 40  # characters before a letter that are looked at


def plain(phrase: str) -> str:
    """The phrase without LaTeX and marks."""
    phrase = MARKS.sub("", MARKS.sub("", WRAPPED.sub(r"\1", phrase)).strip())
    return "\n".join(" ".join(line.split()) for line in phrase.split("\n"))


def options(phrase: str) -> list[str]:
    """
    The letters of the options that a phrase chooses: one where it is clear, several if they are coordinated ("B or C")
    or listed, none if it names no option or only rejects some.
    """
    phrase = plain(phrase)
    if TOGETHER.fullmatch(phrase) and sorted(set(phrase)) == list(phrase):
        return list(phrase)
    listed = list(dict.fromkeys(LISTED.findall(f"{phrase} ")))
    if len(listed) > 1 and listed == sorted(listed):
        return listed
    return [] if "\n" in phrase else next(filter(None, map(_announced, phrase.split(";"))), [])


def _announced(phrase: str) -> list[str]:
    """
    The options that something announces, or calls right. Nothing is announced after an option that opens the phrase
    ("D. Both A and B"), unless it is coordinated.
    """
    named: list[str] = []
    end, rejected, opens = None, False, False
    for found in LETTER.finditer(phrase):
        letter = found[found.lastgroup].upper()
        before, after = phrase[max(0, found.start() - NEAR) : found.start()], phrase[found.end() :]
        if found["capital"] in ("A", "I") and IS_WORD.match(after) and not IS_OPTION.search(before):
            continue
        joined = end is not None and BETWEEN.fullmatch(phrase, end, found.start())
        if NEGATED.search(before) or REFUTED.match(after) or (joined and rejected):
            rejected, end = True, found.end()
            continue
        announced = found["bracketed"] or BEFORE.search(before) or PRAISED.match(after)
        if joined or (announced and not opens):
            opens = opens or found.start() == 0
            named.append(letter)
            rejected, end = False, found.end()
    return list(dict.fromkeys(named))
