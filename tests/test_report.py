"""Sentences and tables of a report, from made-up records without a model."""

import json
import warnings

import numpy as np
import pytest

from pvm.evaluation.page import html_page
from pvm.evaluation.plots import draw_all
from pvm.evaluation.report import cautions, findings, markdown_report
from pvm.evaluation.scoring import Entry, score_all
from pvm.evaluation.tables import ablation_table, compared, difference_table, length_table, runs_table


ROWS = 200


def records(share: float, seed: int, group: str = "all") -> list[dict]:
    """Rows at two distances, of lengths 1 to 200, of which about `share` are right."""
    right = np.random.default_rng(seed).random(ROWS) < share
    return [
        {
            "row": k,
            "group": group,
            "question": "?",
            "reference": "1",
            "reference_length": k + 1,
            "depths": [0],
            "distance": 10 if k % 2 else 500,
            "prediction": "1" if right[k] else "2",
            "length": 1,
            "cut": False,
            "correct": bool(right[k]),
        }
        for k in range(ROWS)
    ]


@pytest.fixture(scope="module")
def report() -> dict:
    """A base at 30 %, two runs of PVM at 70 % that do not depend on what their branches attend to, LoRA at 90 %."""
    runs = [records(0.7, 1), records(0.7, 2)]
    entries = [
        Entry("base", [records(0.3, 0)]),
        Entry("PVM", runs),
        Entry("PVM - another memory", runs, intact="PVM"),
        Entry("PVM - blind", [records(0.1, 3), records(0.1, 4)], intact="PVM"),
        Entry("LoRA", [records(0.9, 5)]),
    ]
    models = [
        {
            "name": entry.name, "run": run, "label": f"{entry.name} {run}", "intact": entry.intact, "step": 3,
            "ablation": entry.name.partition(" - ")[2].replace(" ", "_") or "none", "path": "runs/x",
            "kind": "pvm" if "PVM" in entry.name else "stock",
            "block": "pvm" if "PVM" in entry.name else None, "model_class": "C", "parameters": 1, "base": None,
            "gates": {}, "gates_on": None, "method": None, "answers_cut": 0, "cache_bytes": None, "seconds": 1.0,
            "dtype": "float32",
            "commit": None,
        }
        for entry in entries
        for run in range(len(entry.records))
    ]  # fmt: skip
    arguments = {"match": "exact", "scored_pattern": r"\d", "dataset_split": "test", "dataset_name": "d"}
    return {
        "arguments": arguments, "dataset": {"name": "d"}, "rows": ROWS, "versions": {"torch": "2"}, "models": models,
        "diagnostics": {}, **score_all(entries, r"\d"),
    }  # fmt: skip


def test_who_is_compared_with_whom(report):
    pairs = {(entry["of"], entry["minus"]) for entry in report["comparisons"]["all"]}
    assert pairs == {
        ("PVM", "base"), ("LoRA", "base"), ("LoRA", "PVM"), ("PVM - another memory", "PVM"), ("PVM - blind", "PVM")
    }  # fmt: skip
    there, back = (compared(report, "all", *pair) for pair in (("LoRA", "PVM"), ("PVM", "LoRA")))
    assert there["answers"]["difference"] == -back["answers"]["difference"] > 0
    assert there["answers"]["interval"] == [-bound for bound in reversed(back["answers"]["interval"])]
    assert [span["difference"] for span in there["by_length"]] == [-span["difference"] for span in back["by_length"]]
    with pytest.raises(KeyError, match="were not compared"):
        compared(report, "all", "PVM - blind", "base")


def test_bins_of_a_comparison_hold_the_same_rows_as_those_of_the_accuracy(report):
    scores, result = report["groups"]["all"], compared(report, "all", "LoRA", "base")
    for axis in ("by_distance", "by_length"):
        spans = zip(result[axis], scores["LoRA"][axis]["bins"], scores["base"][axis]["bins"])
        for span, ours, theirs in spans:
            assert span["n"] == ours["n"] == theirs["n"]
            assert span["difference"] == pytest.approx(ours["accuracy"] - theirs["accuracy"])
    assert [span["n"] for span in result["by_length"]] == [50] * 4


def test_findings_say_better_worse_or_neither_as_the_interval_does(report):
    found = findings(report)
    (base,) = [line for line in found if line.startswith("PVM compared with base:")]
    (lora,) = [line for line in found if line.startswith("PVM compared with LoRA:")]
    (memory,) = [line for line in found if "attending to another image" in line]
    (blind,) = [line for line in found if "hidden from self-attention and branches" in line]
    assert "better by" in base and "worse by" in lora and "worse by" in blind
    assert "no significant difference on 200 answers, +0.0 [+0.0, +0.0] points" in memory
    result = compared(report, "all", "PVM", "LoRA")["answers"]
    assert f"worse by {-100 * result['difference']:.1f} points" in lora


def test_lengths_that_depend_on_the_answers_are_no_finding(report):
    """If references do not vary, lengths are those of the first model's answers, which depend on its correctness."""
    assert report["lengths_of"] == {"all": "reference"}
    assert any(line.startswith("PVM compared with base, by length") for line in findings(report))

    def alike(rows: list[dict]) -> list[dict]:
        return [{**row, "reference_length": 1, "length": row["row"]} for row in rows]

    entries = [Entry("base", [alike(records(0.3, 0))]), Entry("PVM", [alike(records(0.7, 1))])]
    other = {**report, "models": report["models"][:2], **score_all(entries, r"\d")}
    assert other["lengths_of"] == {"all": "answer"}
    assert not any("by length" in line for line in findings(other))
    assert "there, compare the other models with each other, not with it" in markdown_report(other, {})


def test_a_difference_that_is_the_same_on_every_row(report):
    entries = [Entry("base", [records(1, 0)]), Entry("base - blank image", [records(0, 0)], intact="base")]
    models = [{**report["models"][0], "name": entry.name, "intact": entry.intact} for entry in entries]
    models[1]["ablation"] = "blank_image"
    (line,) = findings({**report, "models": models, **score_all(entries, r"\d")})
    assert line == "base with a gray image, compared with its own: -100.0 points, the same on each of 200 questions"


def test_a_report_without_branches_is_about_the_second_model(report):
    entries = [Entry("base", [records(0.3, 0)]), Entry("LoRA", [records(0.9, 5)])]
    models = [model for model in report["models"] if model["name"] in ("base", "LoRA")]
    other = {**report, "models": models, **score_all(entries, r"\d")}
    assert findings(other)[0].startswith("LoRA compared with base: better by")
    alone = {**report, "models": models[:1], **score_all(entries[:1], r"\d")}
    assert findings(alone) == [] and "Many differences" not in " ".join(cautions(alone))


def test_tables(report):
    (row,) = runs_table(report).rows
    assert row[:2] == ["PVM", "all"] and row[2].count("%") == 2
    table = ablation_table(report, "all", "PVM")
    assert [line[0] for line in table.rows] == ["intact", "another memory", "blind"]
    assert table.header[1:] == ["at 10", "at 500", "all 200", "difference"]
    assert len(length_table(report, "all").rows) == 4
    assert difference_table(report, "all", "PVM", is_second=True).header[2:] == ["PVM − base", "PVM − LoRA"]  # noqa: RUF001


def test_cautions_name_single_trainings_and_the_number_of_intervals(report):
    text = " ".join(cautions(report))
    assert "base, LoRA: one training each" in text and "PVM" not in text.partition("one training each")[0]
    assert "one in twenty" in text and "Without ablations" not in text


def test_the_page_escapes_html_and_shows_every_table(report, tmp_path):
    (tmp_path / "report.png").write_bytes(b"picture")
    text = markdown_report({**report, "dataset": {"name": "<script>alert(1)</script>"}}, {"accuracy": "report.png"})
    page = html_page(text, tmp_path)
    assert "<script" not in page and "&lt;script&gt;" in page
    opening, *folded = page.split("<details")
    assert '<section class="first">\n<h2>Verdict</h2>\n<ol>' in opening and "<table>" not in opening
    assert [part.startswith(" open>") for part in folded] == [True] + [False] * (text.count("\n## ") - 2)
    assert page.count("<table>") == text.count("\n| --- |") and 'src="data:image/png;base64,cGljdHVyZQ=="' in page
    assert json.dumps(report)


def test_pictures_of_what_no_font_has(report, tmp_path):
    """Models write Chinese, which matplotlib's own font cannot draw: no warning for every letter."""
    by_group = {key: {"\u6307\u5411": report[key]["all"]} for key in ("groups", "comparisons", "lengths_of")}
    chinese = {**report, **by_group, "diagnostics": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = draw_all(chinese, {}, None, tmp_path)
    assert (tmp_path / files["accuracy"]).is_file()
