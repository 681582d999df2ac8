"""The verdict of a report: what its three sentences claim, from made-up records without a model."""

from collections.abc import Callable

import pytest

from pvm.evaluation.conclusions import change, conclusions, effect, reading
from pvm.evaluation.metrics import proportion
from pvm.evaluation.scoring import Entry, score_all


DISTANCES = (10, 500, 4000)
Right = Callable[[int, str, int], bool]  # of the row, its group and its distance
GROUPS = ("cell",) * 4 + ("read",)  # of rows in turn


def share(near: float, far: float | None = None, read: float | None = None) -> Right:
    """The first of every hundred rows are right: a share of them at 10 tokens, another from there on or in "read"."""

    def right(row: int, group: str, distance: int) -> bool:
        if group == "read" and read is not None:
            return row % 100 < 100 * read
        return row % 100 < 100 * (near if far is None or distance == 10 else far)

    return right


def report_of(
    models: dict[str, Right | list[Right]], rows: int = 300, one_group: bool = True, depths: bool = False
) -> dict:
    """
    A report on models by name, several runs of those with a list. "base" is stock and LoRA an adapter; other names are
    models with branches, and " - " is followed by an ablation.
    """
    entries, described = [], []
    for name, runs in models.items():
        intact, _, ablation = name.partition(" - ")
        records = []
        for right in runs if isinstance(runs, list) else [runs]:
            records.append([])
            for k in range(rows):
                group, distance = (
                    "all" if one_group else GROUPS[k % len(GROUPS)],
                    DISTANCES[k * len(DISTANCES) // rows],
                )
                correct = right(k * len(DISTANCES) % 100 if depths else k % 100, group, distance)
                record = {"row": k, "group": group, "distance": 10 if depths else distance, "correct": correct}
                reference, wrong = ("1 2", "1") if depths else ("1", "2")
                record |= {"reference": reference, "prediction": reference if correct else wrong}
                records[-1].append({**record, "depths": [0, 9] if depths else [0], "length": 1, "reference_length": 1})
        entries.append(Entry(name, records, intact if ablation else None))
        trained = {"method": None if intact == "base" else "m", "step": None if intact == "base" else 3}
        block = {"base": None, "LoRA": None, "MLP": "parallel_mlp"}.get(intact, "pvm")
        model = {"name": name, "block": block, "intact": intact if ablation else None, "cache_bytes": None, **trained}
        described += [{**model, "ablation": ablation.replace(" ", "_") or "none"}] * len(records)
    return {"models": described, **score_all(entries, r"\d")}


def claims(*args, **kwargs) -> list[str]:
    return [sentence.claim for sentence in conclusions(report_of(*args, **kwargs))]


@pytest.mark.parametrize(
    ("interval", "rows", "expected"),
    [
        ((0.01, 0.09), 200, "better"),
        ((-0.09, -0.01), 200, "worse"),
        ((0.01, 0.09), 100, "unclear"),  # 5 answers
        ((0.001, 0.009), 1000, "same"),  # 5 answers, and at most 1 point
        ((-0.01, 0.09), 200, "unclear"),
        ((-0.02, 0.03), 200, "same"),
        ((-0.02, 0.031), 200, "unclear"),
        ((0, 0), 100, "same"),
        ((0, 0), 99, "unclear"),  # up to 3 in 100 may still change
        ((1, 1), 6, "better"),
        ((-1, -1), 5, "unclear"),
    ],
)
def test_what_a_difference_shows(interval, rows, expected):
    result = {"difference": sum(interval) / 2, "interval": list(interval), "rows": rows}
    assert effect(result) == expected


def test_a_difference_of_different_rows_is_newcombes():
    """The first example of his tables, by his method 10."""
    few, many = (proportion([True] * right + [False] * (n - right)) for right, n in ((48, 80), (56, 70)))
    result = change(few, many)
    assert result["difference"] == pytest.approx(0.2) and result["rows"] == 70
    assert result["interval"] == pytest.approx([0.0524, 0.3339], abs=5e-5)


@pytest.mark.parametrize(
    ("models", "claim"),
    [
        ({"base": 0.3, "PVM": 0.6}, "PVM answers better than base"),
        ({"base": 0.6, "PVM": 0.3}, "PVM answers worse than base"),
        ({"base": 0.6, "PVM": 0.6}, "PVM answers as well as base"),
        ({"base": 0.3, "PVM": 0.6, "LoRA": 0.8}, "PVM answers better than base, but answers worse than LoRA"),
        ({"base": 0.3, "LoRA": 0.4, "MLP": 0.5, "PVM": 0.6}, "PVM answers better than base and MLP"),
        ({"base": 0.3, "PVM": 0.6, "PVM 2": 0.8}, "PVM answers better than base, but answers worse than PVM 2"),
        ({"base": 0.3, "PVM": 0.6, "PVM 2": 0.8, "LoRA": 0.5}, "PVM answers better than base and LoRA"),
        ({"LoRA": 0.3, "PVM": 0.6}, "PVM answers better than LoRA"),
        ({"base": 0.3, "LoRA": 0.6}, "LoRA answers better than base"),
        ({"PVM": 0.6, "base": 0.3}, "PVM answers better than base"),
        ({"PVM": 0.6}, "Whether PVM is better than another model was not measured"),
        ({"base": 0.6}, "Whether base is better than another model was not measured"),
    ],
    ids=str,
)
def test_comparison_with_others(models, claim):
    assert claims({name: share(accuracy) for name, accuracy in models.items()})[0] == claim


def test_an_inconclusive_comparison():
    """Half of the rows that change do so in each direction."""
    report = report_of({"base": lambda row, *_: row % 4 < 2, "PVM": lambda row, *_: row % 4 in (0, 2)})
    assert conclusions(report)[0].claim == "PVM cannot be told apart from base"


def test_evidence_of_a_comparison():
    report = report_of({"base": share(0.3), "PVM": [share(0.6), share(0.7)]})
    (first, *_) = conclusions(report)
    assert str(first).startswith("PVM answers better than base: 65.0% of 300 questions are right; base 30.0% (+35.0 [")
    assert "the data alone may explain it" in first.evidence
    assert "Means of 2 trainings of PVM." in reading(report)

    report = report_of({"base": share(0.3), "LoRA": share(0.4), "PVM": share(0.6)})
    assert "the best control, LoRA 40.0%" in conclusions(report)[0].evidence
    assert "alone may" not in conclusions(report)[0].evidence and "One training of PVM; another" in reading(report)
    assert "base was not evaluated" in conclusions(report_of({"LoRA": share(0.3), "PVM": share(0.6)}))[0].evidence


def test_a_group_that_contradicts_is_named():
    models = {"base": share(0.3, read=0.9), "PVM": share(0.8, read=0.2)}
    (first, *_) = conclusions(report_of(models, one_group=False))
    assert first.claim == "PVM answers better than base" and "but in read worse: -" in first.evidence
    assert "but in" not in conclusions(report_of(models))[0].evidence


@pytest.mark.parametrize(
    ("ablations", "claim"),
    [
        ({"another memory": 0.2}, "The answers of PVM depend on what its branches see"),
        (
            {"another memory": 0.2, "hidden image": 0.6},
            "The answers of PVM depend on what its branches see, and need nothing else of the image",
        ),
        (
            {"another memory": 0.2, "skip": 0.3},
            "The answers of PVM depend on what its branches see, but not on that alone",
        ),
        ({"another memory": 0.2, "evict": 0.6}, "The answers of PVM depend on what its branches see"),
        ({"another memory": 0.6}, "The answers of PVM do not depend on what its branches see"),
        ({"another memory": 0.6, "hidden image": 0.1}, "The answers of PVM do not depend on what its branches see"),
        ({"another memory": 0.8}, "PVM answers better without what its branches see"),
        ({"hidden image": 0.6, "blind": 0.1}, "The branches of PVM see what it needs of the image"),
        (
            {"hidden image": 0.1, "blind": 0.1},
            "Whether the branches of PVM see what it needs of the image cannot be told",
        ),
        ({"hidden image": 0.1, "blind": 0.5}, "The branches of PVM alone do not see what it needs of the image"),
        ({"blind": 0.1}, "Whether the answers of PVM depend on what its branches see was not measured"),
        ({}, "Whether the answers of PVM depend on what its branches see was not measured"),
    ],
    ids=str,
)
def test_use_of_the_image(ablations, claim):
    entries = {f"PVM - {kind}": share(accuracy) for kind, accuracy in ablations.items()}
    assert claims({"base": share(0.3), "PVM": share(0.6), **entries})[1] == claim


def test_use_of_the_image_without_branches_that_read_it():
    models = {"base": share(0.3), "MLP": share(0.6)}
    (_, second, _) = conclusions(report_of(models))
    assert str(second) == (
        "Whether the answers of MLP depend on the image was not measured: `--ablations another_image` does it."
    )
    assert "Branches are" not in reading(report_of(models))
    assert claims({**models, "MLP - blank image": share(0.1)})[1] == "The answers of MLP depend on the image"


def test_an_image_that_only_some_groups_need_elsewhere():
    models = {"PVM": share(0.6), "PVM - another memory": share(0.1), "PVM - skip": share(0.6, read=0.2)}
    report = report_of(models, one_group=False)
    for model in report["models"]:
        model["cache_bytes"] = 3000 if model["ablation"] == "skip" else 90000
    (_, second, _) = conclusions(report)
    assert second.claim == "The answers of PVM depend on what its branches see, but not on that alone"
    assert "with the image only in them 52.0% (-8.0 [" in second.evidence
    assert "with a cache of 3.0 kB instead of 90.0 kB" in second.evidence


@pytest.mark.parametrize(
    ("models", "claim", "evidence"),
    [
        (
            {"base": share(0.9, 0.1), "PVM": share(0.9, 0.6)},
            "With more text after the image, PVM answers worse; 4,000 tokens after it PVM is better than base",
            "10 tokens after it 90.0% are right, 4,000 tokens after it 60.0% (-30.0 [-40.8, -18.3]); "
            "base 90.0% and 10.0%; PVM is better than base at 500 to 4,000 tokens",
        ),
        (
            {"base": share(0.9, 0.8), "PVM": share(0.9, 0.2)},
            "With more text after the image, PVM answers worse; 4,000 tokens after it PVM is worse than base",
            "PVM is worse than base at 500 to 4,000 tokens",
        ),
        (
            {"base": lambda row, _, distance: distance == 500, "PVM": lambda row, _, distance: distance != 500},
            "Whether more text after the image changes how well PVM answers cannot be told; 4,000 tokens after it "
            "PVM is better than base",
            "PVM is better than base at 10, 4,000 tokens and worse than base at 500 tokens",
        ),
        (
            {"base": share(0.1, 0.1), "PVM": share(0.9, 0.1)},
            "With more text after the image, PVM answers worse",
            "PVM is better than base at 10 tokens",
        ),
        (
            {"base": share(0.2), "PVM": share(0.8)},
            "Whether more text after the image changes how well PVM answers cannot be told; 4,000 tokens after it "
            "PVM is better than base",
            "PVM is better than base at every distance",
        ),
        (
            {"base": share(0.2, 0.3), "PVM": share(0.2, 0.8), "LoRA": share(0.2, 0.8)},
            "With more text after the image, PVM answers better",
            "PVM is nowhere clearly better or worse than LoRA",
        ),
        ({"PVM": share(0.9, 0.1)}, "With more text after the image, PVM answers worse", "are right, 4,000"),
    ],
)
def test_more_text(models, claim, evidence):
    (*_, third) = conclusions(report_of(models))
    assert third.claim == claim and evidence in third.evidence


def test_more_text_without_effect():
    (*_, third) = conclusions(report_of({"PVM": share(1)}, rows=1500))
    assert third.claim == "More text after the image does not change how well PVM answers"


def test_more_text_of_the_answer():
    (*_, third) = conclusions(report_of({"base": share(0.1), "PVM": share(0.4)}, depths=True))
    assert third.claim == "With more text after the image, PVM answers worse"
    assert "0 tokens into the answer 100.0% of its pieces are right, 9 tokens into the answer 40.0%" in third.evidence
    (*_, third) = conclusions(report_of({"PVM": share(1)}, rows=50))
    assert str(third) == (
        "What more text after the image does to PVM was not measured: no two distances have 20 answers each."
    )
