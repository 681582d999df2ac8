"""An evaluation as tables: for the terminal and for report.md. Every number comes from report.json's content."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable

from .knockouts import KNOCK_OUTS
from .plots import bin_label


CORRECT = {
    "exact": "the answer is the reference answer, whatever its case, spaces and final full stop",
    "choice": "the answer chooses the option that the reference is; one that chooses none or several is wrong",
    "number": "the number that the answer ends with is the reference's, to a ten-thousandth of it",
    "math": "the answer is the reference's mathematical object, as math-verify sees it",
}


@dataclass
class Table:
    """A title, column headings, and rows of texts."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        alignment = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [self.header, alignment, *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left")
        for k, heading in enumerate(self.header):
            table.add_column(heading, justify="right" if k else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def share(result: dict[str, Any]) -> str:
    """Accuracy and interval of a result, in per cent."""
    if result["n"] == 0:
        return "–"  # noqa: RUF001
    low, high = result["interval"]
    return f"{result['accuracy']:.1%} [{low:.0%}, {high:.0%}]"


def difference(result: dict[str, Any]) -> str:
    """Difference and interval of a comparison, in percentage points."""
    values = (result["difference"], *result["interval"])
    points, low, high = (f"{round(100 * value, 1) + 0:+.1f}" for value in values)  # + 0: no -0.0
    return f"{points} [{low}, {high}]"


def overall_table(report: dict[str, Any]) -> Table:
    names = [model["name"] for model in report["models"]]
    results = {"all": report["overall"]}
    if len(report["groups"]) > 1:
        by_group = {
            group: {name: scores[name]["accuracy"] for name in names} for group, scores in report["groups"].items()
        }
        results = {**by_group, **results}
    rows = [
        [group, str(result[names[0]]["n"]), *(share(result[name]) for name in names)]
        for group, result in results.items()
    ]
    return Table("Correct answers", ["questions", "n", *names], rows)


def distance_table(report: dict[str, Any], group: str) -> Table | None:
    """`None` if the distance does not vary in the group."""
    scores = report["groups"][group]
    bins = {name: results["by_distance"]["bins"] for name, results in scores.items()}
    first = next(iter(bins.values()))
    if len(first) < 2:
        return None
    rows = [
        [bin_label(span), str(span["n"]), *(share(results[k]) for results in bins.values())]
        for k, span in enumerate(first)
    ]
    without = {name: results["by_distance"]["without_image"] for name, results in scores.items()}
    count = next(iter(without.values()))["n"]
    if count:
        rows.append(["no image", str(count), *(share(result) for result in without.values())])
    return Table(f"Correct answers by distance{_of(group)}", ["distance", "n", *bins], rows)


def depth_table(report: dict[str, Any], group: str) -> Table | None:
    """`None` if no answer of the group has more than one piece."""
    scores = report["groups"][group]
    bins = {name: results["by_depth"]["bins"] for name, results in scores.items()}
    first = next(iter(bins.values()))
    if not first:
        return None
    rows = [
        [bin_label(span), str(span["n"]), *(share(results[k]) for results in bins.values())]
        for k, span in enumerate(first)
    ]
    everything = [results["by_depth"]["all"] for results in scores.values()]
    # Pieces of one answer are not independent, so Wilson's interval would be too narrow for all of them together.
    rows.append(["all", str(everything[0]["n"]), *(f"{result['accuracy']:.1%}" for result in everything)])
    return Table(f"Correct pieces by depth{_of(group)}", ["depth", "n", *bins], rows)


def difference_table(report: dict[str, Any], group: str) -> Table | None:
    """`None` if there is one model only."""
    comparisons = report["comparisons"][group]
    if not comparisons:
        return None
    first = report["models"][0]["name"]
    columns = list(comparisons.values())
    rows = [["answers", str(columns[0]["answers"]["n"]), *(difference(column["answers"]) for column in columns)]]
    if len(columns[0]["by_distance"]) > 1:
        rows += [
            [
                f"answers at {bin_label(span)}",
                str(span["n"]),
                *(difference(column["by_distance"][k]) for column in columns),
            ]
            for k, span in enumerate(columns[0]["by_distance"])
        ]
    if columns[0]["pieces"]:
        rows.append(["pieces", str(columns[0]["pieces"]["n"]), *(difference(column["pieces"]) for column in columns)])
    header = ["of", "n", *(f"{name} − {first}" for name in comparisons)]  # noqa: RUF001
    return Table(f"Percentage points{_of(group)}", header, rows)


def checkpoint_lines(report: dict[str, Any]) -> list[str]:
    """For each model what class it was evaluated as, whether its branches are on, and what trained it."""
    lines = []
    for model in report["models"]:
        line = f"{model['name']}: {model['model_class']}, {model['parameters']:,} parameters"
        if model["gates_on"] is not None:
            gates = ", ".join(f"layer {layer} {value:+.4f}" for layer, value in model["gates"].items())
            line += f", branches {'on' if model['gates_on'] else 'off'} (gates: {gates})"
        if model["method"] or model["step"]:
            line += f", trained by {model['method']}" if model["method"] else ", trained"
            line += f" for {model['step']:,} steps" if model["step"] is not None else ""
        lines.append(f"{line}, on {model['base']}" if model["base"] else line)
    return lines


def _of(group: str) -> str:
    return "" if group == "all" else f" ({group})"


def _group_tables(report: dict[str, Any], make: Any) -> Iterator[Table]:
    for group in report["groups"]:
        table = make(report, group)
        if table is not None:
            yield table


def rich_tables(report: dict[str, Any]) -> list[RichTable]:
    """What the terminal shows."""
    tables = [overall_table(report)]
    tables += _group_tables(report, distance_table)
    tables += _group_tables(report, depth_table)
    return [table.rich() for table in tables]


def remarks(report: dict[str, Any]) -> list[str]:
    """Sentences on what a reader could otherwise take wrongly; empty if there is nothing of the kind."""
    sentences = []
    for model in report["models"]:
        if model["gates_on"] is False:
            sentences.append(f"All gates of {model['name']} are exactly 0: it computes what its base computes.")
        if model["answers_cut"]:
            sentences.append(
                f"{model['answers_cut']:,} of {report['rows']:,} answers of {model['name']} had not ended at the "
                "length limit and were cut there."
            )
    return sentences


def markdown_report(report: dict[str, Any]) -> str:
    """report.md: what was measured, how to read it, the picture, and the tables."""
    arguments, names = report["arguments"], [model["name"] for model in report["models"]]
    distances = list(_group_tables(report, distance_table))
    depths = list(_group_tables(report, depth_table))
    differences = list(_group_tables(report, difference_table))
    intact = [model["name"] for model in report["models"] if model["knock_out"] == "nothing"]
    parts = [
        f"# {', '.join(intact)} on {arguments['dataset_name']}",
        f"{'Each model answered the same' if len(names) > 1 else 'The model answered'} {report['rows']:,} questions "
        f"(split `{arguments['dataset_split']}`), always with the most likely next token.",
        "![Accuracy by distance and by depth](report.png)",
        "## How to read this",
        reading_guide(report, bool(distances), bool(depths)),
        *([_bullets(remarks(report))] if remarks(report) else []),
        *knock_out_guide(report),
        "## Correct answers",
        overall_table(report).markdown(),
    ]
    for heading, tables in (("By distance", distances), ("By depth", depths)):
        if tables:
            parts.append(f"## {heading}")
        for table in tables:
            parts += [f"**{table.title}**", table.markdown()]
    if differences:
        parts += ["## Differences from the first model", difference_guide(names[0])]
        for table in differences:
            parts += [f"**{table.title}**", table.markdown()]
    parts += ["## Checkpoints", checkpoint_guide(report), _bullets(checkpoint_lines(report))]
    parts += [
        "## How it was measured",
        _bullets(
            [f"{m['name']}: `{m['path']}`, {m['dtype']}, answered in {m['seconds']:.0f} s" for m in report["models"]]
        ),
        "Versions: " + ", ".join(f"{package} {number}" for package, number in report["versions"].items()) + ".",
        "Arguments: "
        + ", ".join(f"`{key}: {value}`" for key, value in arguments.items() if value is not None and key != "model")
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def reading_guide(report: dict[str, Any], has_distances: bool, has_depths: bool) -> str:
    """One paragraph for each kind of number that the report has."""
    parts = [
        f"**Correct**: {CORRECT[report['arguments']['match']]}. Each entry "
        "is the share of correct ones among n, and in brackets its 95% confidence interval (Wilson's)."
    ]
    if has_distances:
        parts.append(
            "**Distance** is the number of tokens between the last visual token and the first token of the answer: "
            "how much text stands between the image and the place where it is needed."
        )
    if has_depths:
        pattern = report["arguments"]["scored_pattern"]
        parts.append(
            "**Depth** is the number of tokens that an answer has before a scored piece of it: how long the model has "
            f"already been writing. Pieces are the matches of `{pattern}`; the k-th of the answer must be the k-th of "
            "the reference. Only answers with more than one piece count here, and n counts pieces."
        )
        spans = [
            span
            for group in report["groups"].values()
            for scores in group.values()
            for span in scores["by_depth"]["bins"]
        ]
        if any(span["low"] != span["high"] for span in spans):
            parts.append(
                "Here, a row of the table takes several pieces of one answer together. These are not independent of "
                "each other, so the intervals are narrower than they should be."
            )
    return "\n\n".join(parts)


def knock_out_guide(report: dict[str, Any]) -> list[str]:
    """What was taken from models, if anything was."""
    kinds = [kind for kind in KNOCK_OUTS if kind in {model["knock_out"] for model in report["models"]}]
    if not kinds:
        return []
    return [
        "## What was taken away",
        "The same checkpoint answers the same questions with something missing. What it then gets wrong, it had from "
        "there; what it still gets right, it had not.",
        _bullets([f"**{kind.replace('_', ' ')}**: {KNOCK_OUTS[kind]}." for kind in kinds]),
    ]


def difference_guide(first: str) -> str:
    return (
        f"Percentage points by which a model is better (+) or worse (-) than {first} on the same rows; in brackets, "
        "the range of 95% of the differences when the rows are drawn again (paired bootstrap). It has no width where "
        "the two agree on every row. It covers the choice of questions, not that of training runs."
    )


def checkpoint_guide(report: dict[str, Any]) -> str:
    guide = "The class that was evaluated, and what the checkpoint says about its training."
    if any(model["gates"] for model in report["models"]):
        guide += (
            " A PVM branch reads the image's tokens directly; what it finds is multiplied by its layer's gate, which "
            "starts at 0 (no effect) and is learned."
        )
    return guide
