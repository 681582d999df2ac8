"""
Verdicts on answers as models write them.

matching_cases.tsv was labelled by a reader before any of it was judged by the code: match, reference, verdict, answer,
where ⏎ is a line break.
"""

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvm.errors import UserError
from pvm.evaluation.matching import MATCHES, Verdict, check_reference, judge
from pvm.evaluation.scoring import Entry, score_all


LINES = Path(__file__).with_name("matching_cases.tsv").read_text("utf-8").splitlines()[1:]
CASES = [line.replace("⏎", "\n").split("\t") for line in LINES]
REFERENCES = {"exact": "a cat", "choice": "B", "number": "5", "math": r"\sqrt{2}"}


@pytest.mark.parametrize("match", MATCHES)
def test_verdicts_are_those_of_a_reader(match):
    mine = [case for case in CASES if case[0] == match]
    wrong = [
        f"{answer!r} for {reference!r} is {verdict}, judged {judge(match, answer, reference).value}"
        for _, reference, verdict, answer in mine
        if judge(match, answer, reference) != verdict
    ]
    assert len(mine) > 20 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("match", "reference", "answer", "verdict"),
    [
        ("number", "0.5", r"-\frac{1}{2}", "wrong"),
        ("number", "2", r"2\pi", "wrong"),
        ("number", "4 ft 6 in", "5 ft 6 in", "wrong"),
        ("number", "6", "5 or 6", "ambiguous"),
        ("number", "1000", "10³", "correct"),
        ("number", "5", "five", "correct"),
        ("number", "5", "5\n\nExplanation: 3 + 2", "correct"),
        ("number", "5", "The answer is not 6 but 5.", "correct"),
        ("choice", "A", "The answer is not A.", "wrong"),
        ("choice", "B", "B (or C)", "ambiguous"),
        ("choice", "C", "Vitamin C", "wrong"),
        ("choice", "B", "<answer>B</answer>", "correct"),
        ("choice", "B", r"\boxed{\textbf{B}}", "correct"),
        ("choice", "B", "b) dog", "correct"),
        ("choice", "B", "option b", "correct"),
        ("choice", "B", "B!", "correct"),
        ("choice", "B", "答案是B", "correct"),
        ("choice", "B", "\uff22", "correct"),
        ("choice", "B", "B because the sky is blue.", "correct"),
        ("math", r"\sqrt{2}", "√2", "correct"),
        ("math", r"\sqrt{2}", "sqrt(2)", "correct"),
        ("choice", "B. a cat", "The animal is a cat.", "correct"),
        ("choice", "B. a cat", "The animal is not a cat.", "wrong"),
        ("number", "0", "None", "correct"),
        ("number", "0", "None of the above", "wrong"),
        ("number", "1", "The seventh one", "wrong"),
        ("number", "7", "seventh", "correct"),
        ("number", "5", "The first image shows 5 dogs.", "correct"),
        ("number", "2/3", "2/3, or approximately 0.667", "correct"),
        ("number", "2019", "2019 or 2020", "ambiguous"),
        ("number", "5", r"5\mathrm{cm}", "correct"),
        ("math", r"2\sqrt{3}", "AC = 2√3", "correct"),
        ("math", "5", "x != 5", "wrong"),
        ("math", r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", "correct"),
    ],
)
def test_verdicts_that_were_wrong(match, reference, answer, verdict):
    check_reference(match, reference)
    assert judge(match, answer, reference) == verdict


def test_references_of_another_kind_are_refused():
    for match, reference, sentence in (
        ("choice", "a cat", "is not an option such as B"),
        ("choice", "B or C", "is not an option such as B"),
        ("number", "many", "is not a number"),
        ("number", "5 or 6", "is not a number"),
        ("math", "yes, it is", "is not a mathematical object"),
        ("math", "a cat", "is not a mathematical object"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_reference(match, reference)
    for match, reference in {(case[0], case[1]) for case in CASES}:
        check_reference(match, reference)


PIECES = [
    "2^",
    "2^{",
    "{",
    "}",
    "(",
    "[",
    "\\boxed{",
    "<answer>",
    "\\frac",
    "\\sqrt{",
    "1",
    "1,",
    "1 ",
    "- ",
    "**",
    "'",
]
PIECES += [
    "$",
    "\\text{",
    "answer ",
    "The answer is 5. ",
    "A or ",
    "(B) ",
    "\n",
    " ",
    ". ",
    "is 1 ",
    "五",
    "one ",
    "²",
    "ﷺ",
]


@pytest.mark.parametrize("match", MATCHES)
def test_the_time_does_not_grow_with_the_answer(match):
    """A million characters take as long as twenty thousand: 0.01 to 0.05 s, where quadratic work takes minutes."""
    judge(match, "1", REFERENCES[match])  # starts the process
    slow = []
    for piece in PIECES:
        for answer in (piece * (1_000_000 // len(piece)), f"The answer is {piece * (19_000 // len(piece))}"):
            start = time.thread_time()
            assert judge(match, answer, REFERENCES[match]) in Verdict
            if (seconds := time.thread_time() - start) > 1:
                slow.append((piece, len(answer), seconds))
    assert not slow


@pytest.mark.parametrize(
    "answer", ["9^{9^{9^{9}}}", r"(10^{8})!", r"\binom{10^9}{5\cdot10^8}", "(x+y+z)^{200}", "2^" * 30]
)
def test_what_sympy_computes_for_hours_is_wrong(answer):
    start = time.perf_counter()
    assert judge("math", answer, r"\sqrt{2}") is Verdict.WRONG
    assert time.perf_counter() - start < 30  # a second of processor time; this machine may be busy
    assert judge("math", "√2", r"\sqrt{2}") is Verdict.CORRECT


def test_threads_share_the_process():
    verdicts = []
    threads = [
        threading.Thread(target=lambda k=k: verdicts.append((k, judge("math", f"\\sqrt{{{k}}}", r"\sqrt{2}"))))
        for k in range(1, 7)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {k for k, verdict in verdicts if verdict is Verdict.CORRECT} == {2} and len(verdicts) == 6


# Pieces of answers in any order, and any characters.
TEXTS = st.lists(st.sampled_from([*PIECES, "not ", "or ", "B", "5", "/", "%", "=", "so ", "\\pi", "½"]), max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.one_of(TEXTS.map("".join), st.text(max_size=60)))
def test_no_text_raises(text):
    for match in ("exact", "choice", "number"):
        assert judge(match, text, REFERENCES[match]) is judge(match, text, REFERENCES[match])


@settings(max_examples=30, deadline=None)
@given(st.one_of(TEXTS.map("".join), st.text(max_size=60)))
def test_no_text_raises_as_mathematics(text):
    assert judge("math", text, REFERENCES["math"]) in Verdict


def test_the_report_counts_ambiguous_answers():
    def records(answers: list[str]) -> list[dict]:
        return [
            {
                "row": k, "group": "all", "question": "?", "reference": "B", "reference_length": 1, "depths": [],
                "distance": 3, "prediction": answer, "length": 1, "cut": False, "correct": answer == "B",
            }
            for k, answer in enumerate(answers)
        ]  # fmt: skip

    entries = [Entry("base", [records(["B or C", "A", "B"])]), Entry("PVM", [records(["B", "B", "B"])])]
    report = score_all(entries, None, "choice")
    assert report["ambiguous"] == {"base": 1, "PVM": 0}
    assert report["overall"]["base"]["correct"] == 1
