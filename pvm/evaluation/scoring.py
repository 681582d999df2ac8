"""From answers to the numbers of a report: accuracies and differences."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pvm.evaluation.answering import Answer
from pvm.evaluation.bootstrap import paired_difference
from pvm.evaluation.matching import Verdict
from pvm.evaluation.metrics import (
    Accuracy,
    AccuracyByDepth,
    AccuracyByDistance,
    AccuracyByLength,
    quartile_bins,
    score_pieces,
    verdict,
)
from pvm.evaluation.questions import Question


@dataclass
class Entry:
    """
    What has one name in the report: a checkpoint or several runs of a method, intact or with an ablation.

    name (`str`): in the report.
    records (`list[list[dict]]` `[runs][rows]`): see [`make_records`].
    intact (`str`, *optional*): of an ablation, the name of the intact entry.
    """

    name: str
    records: list[list[dict[str, Any]]]
    intact: str | None = None

    def rows(self, chosen: Sequence[int]) -> "Entry":
        """The entry with some of its rows."""
        return Entry(self.name, [[run[k] for k in chosen] for run in self.records], self.intact)


def make_records(
    questions: Sequence[Question], answers: Sequence[Answer], match: str = "exact"
) -> list[dict[str, Any]]:
    """The lines of a predictions file."""
    verdicts = [verdict(match, answer.prediction, question.reference) for question, answer in zip(questions, answers)]
    return [
        {
            **asdict(question),
            "prediction": answer.prediction,
            "length": answer.length,
            "cut": answer.cut,
            "verdict": found.value,
            "correct": found is Verdict.CORRECT,
        }
        for question, answer, found in zip(questions, answers, verdicts)
    ]


def _texts(entry: Entry) -> dict[str, Any]:
    records = [record for run in entry.records for record in run]
    return {
        "predictions": [record["prediction"] for record in records],
        "references": [record["reference"] for record in records],
        "runs": len(entry.records),
    }


def _ambiguous(entry: Entry, match: str) -> int:
    records = [record for run in entry.records for record in run]
    verdicts = [verdict(match, record["prediction"], record["reference"]) for record in records]
    return verdicts.count(Verdict.AMBIGUOUS)


def score(entry: Entry, lengths: Sequence[int], pattern: str | None, match: str = "exact") -> dict[str, Any]:
    """All metrics of an entry. `lengths` `[rows]` are binned by quartiles."""
    records, texts = [record for run in entry.records for record in run], _texts(entry)
    distances, depths = [record["distance"] for record in records], [record["depths"] for record in records]
    lengths = [*lengths] * len(entry.records)
    by_distance, by_length = AccuracyByDistance(keep_in_memory=True), AccuracyByLength(keep_in_memory=True)
    return {
        "accuracy": Accuracy(keep_in_memory=True).compute(**texts, match=match),
        "by_distance": by_distance.compute(**texts, distances=distances, match=match),
        "by_length": by_length.compute(**texts, lengths=lengths, match=match),
        "by_depth": AccuracyByDepth(keep_in_memory=True).compute(**texts, depths=depths, scored_pattern=pattern),
    }


def compare_answers(first: Entry, second: Entry, rows: Sequence[int] | None = None) -> dict[str, Any]:
    """The difference of the second entry to the first in correct answers, on all rows or on some of them."""
    chosen = range(len(first.records[0])) if rows is None else rows
    outcomes = ([[[run[k]["correct"]] for k in chosen] for run in entry.records] for entry in (first, second))
    return paired_difference(*outcomes, same_runs=second.intact == first.name)


def compare(
    first: Entry, second: Entry, lengths: Sequence[int], bins: dict[str, list[dict[str, Any]]], pattern: str | None
) -> dict[str, Any]:
    """
    The difference of the second entry to the first on the same rows: of correct `answers`, overall and in each of
    `bins` (`by_distance`, `by_length`), and of correct `pieces` of long answers.
    """
    values = {"by_distance": [record["distance"] for record in first.records[0]], "by_length": lengths}
    binned = {}
    for axis, spans in bins.items():
        binned[axis] = []
        for span in spans:
            inside = [
                k for k, value in enumerate(values[axis]) if value is not None and span["low"] <= value <= span["high"]
            ]
            difference = compare_answers(first, second, inside)
            binned[axis].append({"low": span["low"], "high": span["high"], **difference})
    pieces = [
        [
            [
                score_pieces(record["prediction"], record["reference"], pattern)
                for record in run
                if len(record["depths"]) > 1
            ]
            for run in entry.records
        ]
        for entry in (first, second)
    ]
    return {
        "of": second.name,
        "minus": first.name,
        "answers": compare_answers(first, second),
        **binned,
        "pieces": paired_difference(*pieces, same_runs=second.intact == first.name) if pieces[0][0] else None,
    }


def score_all(entries: Sequence[Entry], pattern: str | None, match: str = "exact") -> dict[str, Any]:
    """
    The measured part of the report, which depends on the records alone: `overall`, `ambiguous` (how many answers),
    `groups`, `comparisons` in each group and `overall_comparisons` of all answers. Each intact entry is compared with
    all intact ones before it, and each ablation with its intact entry. Quartiles of length contain the same questions
    for all entries: `lengths_of` says for each group whether the lengths are those of the references ("reference") or,
    where these hardly vary, of the answers of the first entry's first run ("answer").
    """
    first = entries[0].records[0]
    pairs = [
        (before, entry)
        for k, entry in enumerate(entries)
        for before in entries[:k]
        if before.intact is None and entry.intact in (None, before.name)
    ]
    report: dict[str, Any] = {
        "overall": {
            entry.name: Accuracy(keep_in_memory=True).compute(**_texts(entry), match=match) for entry in entries
        },
        "ambiguous": {entry.name: _ambiguous(entry, match) for entry in entries},
        "groups": {},
        "lengths_of": {},
        "comparisons": {},
        "overall_comparisons": [
            {"of": of.name, "minus": minus.name, "answers": compare_answers(minus, of)} for minus, of in pairs
        ],
    }
    for group in dict.fromkeys(record["group"] for record in first):
        chosen = [k for k, record in enumerate(first) if record["group"] == group]
        # The length of an answer may depend on whether it is correct, so bins by it are biased; see the report.
        lengths = [first[k]["reference_length"] for k in chosen]
        varies = len(quartile_bins(lengths)) > 1
        report["lengths_of"][group] = "reference" if varies else "answer"
        lengths = lengths if varies else [first[k]["length"] for k in chosen]
        mine = {entry.name: entry.rows(chosen) for entry in entries}
        report["groups"][group] = {name: score(entry, lengths, pattern, match) for name, entry in mine.items()}
        scores = report["groups"][group][entries[0].name]
        bins = {axis: scores[axis]["bins"] for axis in ("by_distance", "by_length")}
        report["comparisons"][group] = [
            compare(mine[minus.name], mine[of.name], lengths, bins, pattern) for minus, of in pairs
        ]
    return report
