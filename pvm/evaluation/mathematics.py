# ruff: noqa: RUF001  (characters that look like others are what is looked for)
"""
Whether two expressions are the same mathematical object, according to math-verify.

sympy may compute for hours on `9^{9^{9^9}}` and cannot be interrupted in a big multiplication, and math-verify's own
time limits are signals, which only work in a main thread. So it runs in a process of its own, this file, which the
system ends when a comparison takes too much processor time or memory. The callers may be threads or daemons.
"""

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from importlib.util import find_spec


# Ordinary comparisons take 0.01 to 0.1 s. Processor time, so that verdicts do not depend on what else is running.
SECONDS, BYTES = 1, 4 * 2**30
LONGEST, DEEPEST = 300, 8  # longer or deeper expressions take the parser seconds
UNTAMED = re.compile(r"\d{100}|\^\s*(?:\{[^{}]*\}|[^\s{}])\s*\^")  # so do long numbers and 2^2^2, which is not LaTeX

SYMBOLS = {
    "∞": "\\infty",
    "≤": "\\le",
    "≥": "\\ge",
    "≠": "\\ne",
    "∪": "\\cup",
    "∩": "\\cap",
    "∈": "\\in",
    "∅": "\\emptyset",
}
SYMBOLS |= {"×": "\\times", "·": "\\cdot", "÷": "\\div", "°": "^\\circ", "±": "\\pm", "∠": "\\angle", ">=": "\\ge"}
SYMBOLS |= {"<=": "\\le", "**": "^", "\\gt": ">", "\\lt": "<", "\\varnothing": "\\emptyset", "\\dfrac": "\\frac"}
SYMBOL = re.compile("|".join(re.escape(symbol) for symbol in sorted(SYMBOLS, key=len, reverse=True)) + "|[α-ωΑ-Ω]")
ROOT = re.compile(r"(?:√|(?<![\\a-z])sqrt)\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\w+))")
FUNCTION = re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|log|ln|exp|pi)(?![A-Za-z])")
DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*\{?\\circ\}?")
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
POWER = re.compile(r"\^\(([^()]*)\)")
TWICE = re.compile(r"(?<!\\)\{(\{[^{}]*\})\}")
DELIMITED = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
CONNECTED = re.compile(r"\s*(?:,|;)?\s*(?:and|or)?\s*", re.IGNORECASE)
WORD = re.compile(r"(?<![\\A-Za-z{\d])[A-Za-z]{2,}(?![A-Za-z^_])")
MATHEMATICS = re.compile(r"[\d\\=+^_/<>]")  # "a cat" has none
SAYS = re.compile(
    r".*(?:\b(?:is|are|be|gives?|equals?|gets?|therefore|so|thus|hence)\b|[是为]|(?<!\s):(?=\s))",
    re.IGNORECASE | re.DOTALL,
)
OR = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*(?:or|and)\s*\}|\b(?:or|and)\b|或|和)\s*")
VARIABLE = re.compile(r"\s*([a-zA-Z])\s*=")
POINT = re.compile(r"^\s*[A-Z](?=\s*(?:\\left)?\()")  # M of "M(2, 3)"
TAIL = re.compile(r"(?:\\(?:text|mathrm)\s*\{[^{}]*\}|(?<=[\d}) ])\s*(?:cm|mm|km|m|kg|g|s|ft|in))(?:\^\{?\d\}?)?\s*$")


def latex(text: str) -> str:
    """Plain mathematics as LaTeX; LaTeX as it is."""
    text = SYMBOL.sub(_command, text)
    text = ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2] or found[3]}}}", text)
    while text != (text := TWICE.sub(r"\1", text)):
        pass
    text = FUNCTION.sub(r"\\\1 ", POWER.sub(r"^{\1}", text))
    if TRIGONOMETRY.search(text):
        text = DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    return text.strip().rstrip(".")


def _command(found: re.Match) -> str:
    if command := SYMBOLS.get(found[0]):
        return f"{command} " if command[-1].isalpha() else command
    name = unicodedata.name(found[0]).split()
    return f"\\{name[-1].title() if 'CAPITAL' in name else name[-1].lower()} "


def expressions(phrase: str) -> list[str]:
    r"""
    The expressions in LaTeX that a phrase states as its result: those between the last dollars, else what follows the
    last "is", without units. None if it is prose.
    """
    runs: list[list[str]] = []
    end = None
    for found in DELIMITED.finditer(phrase):
        segment = found[1] or found[2] or found[3]
        if end is not None and CONNECTED.fullmatch(phrase, end, found.start()):
            runs[-1].append(segment)
        else:
            runs.append([segment])
        end = found.end()
    if runs:
        parts = runs[-1]
    else:
        said = SAYS.match(phrase)
        parts = [phrase[said.end() :] if said and phrase[said.end() :].strip() else phrase]
    found = [part for text in parts for part in _separate(latex(text))]
    words = 0 if runs else sum(len(WORD.findall(part)) for part in found)
    if words:
        found = [WORD.sub(" ", part) for part in found]
    if words > 3 or (words and not MATHEMATICS.search("".join(found))):
        return []
    return [part.strip() for part in found if part.strip()]


def _separate(text: str) -> list[str]:
    """The parts of "1, -2" and "x = 1 or x = -2", which is a list of solutions, without "x ="."""
    text = POINT.sub("", TAIL.sub("", text))
    parts, depth, start = [], 0, 0
    if re.search(r"\\begin", text):
        return [text]
    text = OR.sub(", ", text)
    for k, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0 and not re.match(r",\d{3}(?!\d)", text[k:]):
            parts.append(text[start:k])
            start = k + 1
    parts.append(text[start:])
    if len(parts) > 1:
        parts = [VARIABLE.sub("", part) for part in parts]
    return parts


class _Process:
    """The process that compares, started when it is first needed and again after it was ended."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def ask(self, question: list) -> bool | None:
        """Its answer; `None` if it was ended."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = self.start()
            try:
                self.process.stdin.write(json.dumps(question) + "\n")
                self.process.stdin.flush()
                return json.loads(self.process.stdout.readline())
            except (OSError, ValueError):
                self.process.kill()
                self.process.wait()
                return None

    @staticmethod
    def start() -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, __file__], text=True, start_new_session=True, **pipes)
        atexit.register(process.kill)
        return process


_process = _Process()
os.register_at_fork(after_in_child=_process.__init__)  # a fork has its own


def is_installed() -> bool:
    """Whether math-verify is."""
    return find_spec("math_verify") is not None


def is_expression(parts: list[str]) -> bool:
    """Whether math-verify can parse the parts."""
    return _are_short(parts) and bool(_process.ask([parts]))


def same_expression(reference: list[str], answer: list[str]) -> bool:
    """Whether both are the same object; not if that takes too long to find out."""
    return _are_short(reference) and _are_short(answer) and bool(_process.ask([reference, answer]))


def _are_short(parts: list[str]) -> bool:
    text = ", ".join(parts)
    depth = deepest = 0
    for character in text[: LONGEST + 1]:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return bool(parts) and len(text) <= LONGEST and deepest <= DEEPEST and not UNTAMED.search(text)


def _serve() -> None:
    import resource

    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import I

    def read(parts: list[str]) -> list:
        text = parts[0] if len(parts) == 1 else rf"\{{{', '.join(parts)}\}}"
        return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)

    def compare(reference: list, answer: list | None = None) -> bool:
        if answer is None:
            return any(not isinstance(expression, str) for expression in reference)
        if verify(reference, answer, timeout_seconds=None, allow_set_relation_comp=True):
            return True
        # Constants that math-verify does not compare: 2^{0.5} and \sqrt{2}, i^2 and -1.
        difference = reference[0] - answer[0]
        imaginary = {symbol: I for symbol in difference.free_symbols if symbol.name == "i"}
        return abs(complex(difference.subs(imaginary))) < 1e-12

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    while (child := os.fork()) and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        print("false", flush=True)  # the child was ended; the next is ready at once
    if child:
        return
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # then the system ends this process, whatever it is doing
        try:
            result = compare(*map(read, json.loads(line)))
        except Exception:  # math-verify and sympy raise all kinds
            result = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    _serve()
