# ruff: noqa: RUF001  (characters that look like others are what is looked for)
"""Where a text states its final answer: from the most explicit place to the least."""

import re
import unicodedata
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass


# Nobody states an answer in longer sentences. Only the end of a long text is read, and the last few of many
# statements, so that no text takes long.
LONGEST, MOST, END = 500, 16, 20_000

SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+")
VULGAR_FRACTION = re.compile("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])")
PUNCTUATION = str.maketrans({"\u2212": "-", "\u2044": "/", "。": ". ", "、": ", ", **dict.fromkeys('"“”‘’`', "'")})
EMPHASIS = re.compile(r"(?<![\w)*])(\*{1,3}|__|'{1,2})(?=\S)([^*_'\n]{1,200})(?<=\S)\1(?![\w(*])")
HEADING = re.compile(r"^#+\s*", re.MULTILINE)

TAGGED = re.compile(r"<answer>((?:(?!<answer>)[^\0]){0,4000}?)</answer>", re.IGNORECASE)
BOXED = re.compile(r"\\f?boxed\s*\{")

IS = r"(?:is|are|was|were|(?:should|must|would|could|can|may|might|will|has to)(?:\s+(?:also|well))?\s+be)"
STATED = re.compile(
    rf"\b(?P<final>final\s+)?(?:answers?|ans|option|choice)(?:\s+here)?"
    rf"(?:\s*[:=)]+(?:\s*{IS}\b)?|\s+[-–—](?=\s)|\s+{IS}\b\s*:?|\s*\n(?=\s*\S))"
    r"|(?:答案|选项)\s*(?:应该|应)?\s*(?:是|为|选|:)+|(?P<chosen>故选|应选|我选|选择|选)\s*:?",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"\n|(?<=[.!?])(?=\s|$)")
CORRECTION = re.compile(r"\b(?:no|wait|actually|correction|sorry|recheck|recount|mistake)\b|不对|等等", re.IGNORECASE)
CONCLUSION = re.compile(
    r"\b(?:so|therefore|thus|hence|altogether|consequently|in (?:total|all|conclusion|summary)|total(?=\s*[:=]))\b"
    r"|因此|所以|故|总",
    re.IGNORECASE,
)
# A short first line, which an explanation follows; not the first of several steps.
BARE = re.compile(r"(?!(?:step|question|first)\b|\d+[.)] )\S+(?: \S+){0,5}", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """
    text (`str`): in which an answer may be stated.
    corrects (`bool`): whether the text takes back what it has stated before.
    """

    text: str
    corrects: bool = False


def clean(text: str) -> str:
    """
    The text in compatible characters (full width, superscripts as powers), without emphasis, quotation marks and runs
    of white space. Of a long text only its last sentences.
    """
    text = SUPERSCRIPT.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", _end(text))
    text = _end(unicodedata.normalize("NFKC", VULGAR_FRACTION.sub(" ", text))).translate(PUNCTUATION)
    text = "\n".join(line for line in (" ".join(line.split()) for line in text.splitlines()) if line)
    text = EMPHASIS.sub(r"\2", HEADING.sub("", text))
    return re.sub(r"n't\b", " not", text).replace("!=", "≠")


def _end(text: str) -> str:
    """The last sentences of a text."""
    text = text.strip()
    return text if len(text) <= END else SENTENCE_END.sub("\0", text[-END:], count=1).partition("\0")[2]


def boxed(text: str) -> list[Place]:
    r"""What is in each outermost `\boxed{}`."""
    places, end = [], 0
    for found in BOXED.finditer(text):
        if found.start() < end:
            continue
        depth, previous = 1, end
        for end in range(found.end(), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                places.append(Place(text[found.end() : end], bool(CORRECTION.search(text, previous, found.start()))))
                break
        else:  # cut off before its end: nothing that follows can be closed either
            break
    return places


def stated(text: str) -> list[Place]:
    """The rest of the sentence after each of the last "answer is" and "answer:", the line after a heading "answer"."""
    places, previous = [], 0
    for found in deque(STATED.finditer(text), MOST):
        end = SENTENCE_END.search(text, found.end() + 1, found.end() + LONGEST)
        end = found.end() + LONGEST if end is None else end.start()
        corrects = bool(found["final"]) or bool(CORRECTION.search(text, previous, found.start()))
        places.append(Place(text[found.end() : end], corrects))
        previous = found.end()
    return places


def places(text: str) -> Iterator[list[Place]]:
    """
    Where a text may state its final answer, most explicit first. Where one kind of place has several entries, they
    must agree, or the last must correct the others.

    1. `<answer>` tags; 2. `\\boxed{}`; 3. "the answer is"; 4. without these, the last sentence that concludes ("so",
    "in total"); 5. the whole text, if it is short; 6. the first line, if it is short; 7. the last sentences, each
    by itself, from the end. What is thought before `</think>` does not count.
    """
    text = clean(text.rpartition("</think>")[2])
    tagged = [(boxed(found) or stated(found) or [Place(found)]) for found in TAGGED.findall(text)]
    sentences = [part.strip() for part in SENTENCE_END.split(text) if part.strip()][-MOST:]
    lines = text.split("\n", 1)
    groups = [
        [place for group in tagged for place in group],
        boxed(text),
        stated(text),
        [Place(sentence) for sentence in sentences if CONCLUSION.search(sentence)][-1:],
        [Place(text)],
        [Place(lines[0])] if len(lines) > 1 and BARE.fullmatch(lines[0]) else [],
        *([Place(sentence)] for sentence in reversed(sentences)),
    ]
    for group in groups:
        yield [place for place in group[-MOST:] if len(place.text) <= LONGEST]
