"""The tables of a report, made from the content of report.json."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable

from variants_qwen3vl_pvm import BLOCKS


@dataclass
class Table:
    """A title, column headings, and rows of cells."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        alignment = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [[_cell(text) for text in line] for line in (self.header, *self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], alignment, *lines[1:]))

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left")
        for k, heading in enumerate(self.header):
            table.add_column(heading, justify="right" if k else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def _cell(text: str) -> str:
    """Escaped: names come from the user and may contain what ends a cell or a row."""
    return " ".join(text.replace("|", "\\|").split())


def bin_label(result: dict[str, Any]) -> str:
    """The range of a bin."""
    return f"{result['low']:,}" + (f"–{result['high']:,}" if result["high"] != result["low"] else "")  # noqa: RUF001


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


def intact_names(report: dict[str, Any]) -> list[str]:
    """The entries without an ablation, in order."""
    return list(dict.fromkeys(model["name"] for model in report["models"] if model["ablation"] == "none"))


def ablations_of(report: dict[str, Any], name: str) -> dict[str, str]:
    """The ablations of an intact entry: their kinds by the name of their entries."""
    return {model["name"]: model["ablation"] for model in report["models"] if model["intact"] == name}


def subject(report: dict[str, Any]) -> str:
    """The entry that the report is about: the first with branches that read the image, else the second or only one."""
    blocks = {model["name"]: model["block"] for model in report["models"] if model["block"] is not None}
    with_memory = [name for name, block in blocks.items() if BLOCKS[block].reads_image]
    return (with_memory or intact_names(report)[1:] or intact_names(report))[0]


def compared(report: dict[str, Any], group: str | None, of: str, minus: str) -> dict[str, Any]:
    """The comparison of two entries in a group, or on all rows (`None`), in whichever order they were compared."""
    for entry in report["overall_comparisons"] if group is None else report["comparisons"][group]:
        if (entry["of"], entry["minus"]) == (of, minus):
            return entry
        if (entry["of"], entry["minus"]) == (minus, of):
            results = {key: value for key, value in entry.items() if key not in ("of", "minus")}
            return {"of": of, "minus": minus, **{key: _negative(value) for key, value in results.items()}}
    raise KeyError(f"{of} and {minus} were not compared in {group}.")


def _negative(result: Any) -> Any:
    """Of a difference, a list of them, or none."""
    if not isinstance(result, dict):
        return result and [_negative(span) for span in result]
    low, high = result["interval"]
    return {**result, "difference": -result["difference"], "interval": [-high, -low]}


def overall_table(report: dict[str, Any]) -> Table:
    names = intact_names(report)
    results = {"all together" if len(report["groups"]) > 1 else "all": report["overall"]}
    if len(report["groups"]) > 1:
        by_group = {
            group: {name: scores[name]["accuracy"] for name in names} for group, scores in report["groups"].items()
        }
        results = {**by_group, **results}
    rows = [
        [group, str(result[names[0]]["n"]), *(share(result[name]) for name in names)]
        for group, result in results.items()
    ]
    sizes = [cache_size(report, name) for name in names]
    if any(sizes):
        rows.append(["KV cache per question", "", *sizes])
    return Table("Correct answers", ["questions", "n", *names], rows)


def cache_size(report: dict[str, Any], name: str) -> str:
    """Mean size of the KV cache and the visual memory at the end of an answer, in kilobytes; empty if unknown."""
    sizes = [model["cache_bytes"] for model in report["models"] if model["name"] == name and model["cache_bytes"]]
    return f"{sum(sizes) / len(sizes) / 1000:,.1f} kB" if sizes else ""


def runs_table(report: dict[str, Any]) -> Table | None:
    """The accuracy of each run by group; `None` if no entry has several runs."""
    rows = []
    for name in intact_names(report):
        for group, scores in report["groups"].items():
            result = scores[name]["accuracy"]
            if "by_run" in result:
                rows.append([name, group, ", ".join(f"{accuracy:.1%}" for accuracy in result["by_run"])])
    return Table("Each run", ["method", "questions", "runs"], rows) if rows else None


def _axis_table(report: dict[str, Any], group: str, axis: str, title: str, heading: str) -> Table | None:
    scores = report["groups"][group]
    bins = {name: scores[name][axis]["bins"] for name in intact_names(report)}
    first = next(iter(bins.values()))
    if len(first) < 2:
        return None
    rows = [
        [bin_label(span), str(span["n"]), *(share(results[k]) for results in bins.values())]
        for k, span in enumerate(first)
    ]
    return Table(f"{title}{of_group(group)}", [heading, "n", *bins], rows)


def distance_table(report: dict[str, Any], group: str) -> Table | None:
    """`None` if the distance does not vary in the group."""
    table = _axis_table(report, group, "by_distance", "Correct answers by distance", "distance")
    without = [report["groups"][group][name]["by_distance"]["without_image"] for name in intact_names(report)]
    if table is not None and without[0]["n"]:
        table.rows.append(["no image", str(without[0]["n"]), *(share(result) for result in without)])
    return table


def length_table(report: dict[str, Any], group: str) -> Table | None:
    """`None` if the length hardly varies in the group."""
    return _axis_table(report, group, "by_length", "Correct answers by length", "length")


def depth_table(report: dict[str, Any], group: str) -> Table | None:
    """`None` if no answer of the group has more than one piece."""
    scores = report["groups"][group]
    bins = {name: scores[name]["by_depth"]["bins"] for name in intact_names(report)}
    first = next(iter(bins.values()))
    if not first:
        return None
    rows = [
        [bin_label(span), str(span["n"]), *(share(results[k]) for results in bins.values())]
        for k, span in enumerate(first)
    ]
    everything = [scores[name]["by_depth"]["all"] for name in bins]
    # Without an interval: Wilson's would be too narrow, because the pieces of an answer are not independent.
    rows.append(["all", str(everything[0]["n"]), *(f"{result['accuracy']:.1%}" for result in everything)])
    return Table(f"Correct pieces by depth{of_group(group)}", ["depth", "n", *bins], rows)


def difference_table(report: dict[str, Any], group: str, reference: str, is_second: bool = False) -> Table | None:
    """
    The differences of all other intact entries to `reference`, or of `reference` to each of them (`is_second`); `None`
    without other entries.
    """
    others = [name for name in intact_names(report) if name != reference]
    if not others:
        return None
    pairs = [(reference, name) if is_second else (name, reference) for name in others]
    columns = [compared(report, group, of, minus) for of, minus in pairs]
    rows = [["answers", str(columns[0]["answers"]["n"]), *(difference(column["answers"]) for column in columns)]]
    for axis, where in (("by_distance", "answers at"), ("by_length", "answers of length")):
        spans = columns[0][axis]
        for k, span in enumerate(spans if len(spans) > 1 else []):
            label = f"{where} {bin_label(span)}"
            rows.append([label, str(span["n"]), *(difference(column[axis][k]) for column in columns)])
    if columns[0]["pieces"]:
        rows.append(["pieces", str(columns[0]["pieces"]["n"]), *(difference(column["pieces"]) for column in columns)])
    header = ["of", "n", *(f"{of} − {minus}" for of, minus in pairs)]  # noqa: RUF001
    return Table(f"Percentage points{of_group(group)}", header, rows)


def ablation_table(report: dict[str, Any], group: str, name: str) -> Table:
    """Accuracy of an entry and its ablations, by distance where that varies and overall, with their differences."""
    scores = report["groups"][group]
    bins = scores[name]["by_distance"]["bins"]
    bins = bins if len(bins) > 1 else []
    pieces = scores[name]["by_depth"]["all"]["n"]
    header = ["", *(f"at {bin_label(span)}" for span in bins), f"all {scores[name]['accuracy']['n']}", "difference"]
    header += [f"{pieces} pieces", "difference"] if pieces else []
    sizes = [cache_size(report, entry) for entry in (name, *ablations_of(report, name))]
    header += ["KV cache"] if any(sizes) else []
    rows = []
    for entry, size in zip((name, *ablations_of(report, name)), sizes):
        accuracies = [scores[entry]["by_distance"]["bins"][k]["accuracy"] for k in range(len(bins))]
        accuracies.append(scores[entry]["accuracy"]["accuracy"])
        what = "intact" if entry == name else entry.removeprefix(f"{name} - ")
        change = None if entry == name else compared(report, group, entry, name)
        rows.append(
            [what, *(f"{accuracy:.1%}" for accuracy in accuracies), difference(change["answers"]) if change else ""]
        )
        if pieces:
            rows[-1] += [f"{scores[entry]['by_depth']['all']['accuracy']:.1%}"]
            rows[-1] += [difference(change["pieces"]) if change else ""]
        rows[-1] += [size] if any(sizes) else []
    return Table(f"{name}{of_group(group)}", header, rows)


def attention_table(report: dict[str, Any]) -> Table | None:
    """How attention to the image decays, by model and group; `None` without diagnostics of varying distances."""
    rows = []
    for name, summary in report["diagnostics"].items():
        for group, attention in summary["attention"].items():
            decay = attention["decay"]
            if decay is None:
                continue
            (low, high), (near, far), (least, most) = (
                decay[key] for key in ("exponent_interval", "half_interval", "observed")
            )
            half = f"{decay['half']:.2f} [{near:.2f}, {far:.2f}]"
            if not least <= decay["half"] <= most:
                half = f"below {least:.2g}" if decay["half"] < least else f"above {most:.2g}"
            exponent = f"{decay['exponent']:.2f} [{low:.2f}, {high:.2f}]"
            rows.append([f"{name}{of_group(group)}", str(attention["rows"]), exponent, half, f"{decay['r2']:.2f}"])
    header = ["model", "rows", "exponent", "half at", "R²"]
    return Table("Decay of attention to the image", header, rows) if rows else None


def branch_table(report: dict[str, Any]) -> Table | None:
    """Size of what branches add, compared with the stream; `None` if no model has branches."""
    rows = []
    for name, summary in report["diagnostics"].items():
        gates = next(model["gates"] for model in report["models"] if model["name"] == name)
        for layer, injected in summary["injected"].items():
            residual, ffn = (summary[key][int(layer)]["mean"] for key in ("residual", "ffn"))
            rows.append(
                [
                    name,
                    layer,
                    f"{gates[layer]:+.4f}",
                    f"{injected['mean']:.3f}",
                    f"{ffn:.3f}",
                    f"{residual:.3f}",
                    f"{injected['mean'] / residual:.1%}",
                ]
            )
    header = ["model", "layer", "gate", "branch adds", "FFN adds", "stream", "branch : stream"]
    return Table("Size of what branches add", header, rows) if rows else None


def of_group(group: str) -> str:
    """What a title or a sentence adds about the group."""
    return "" if group == "all" else f" ({group})"


def group_tables(report: dict[str, Any], make: Callable[[dict[str, Any], str], Table | None]) -> Iterator[Table]:
    """The table of each group that has one."""
    for group in report["groups"]:
        table = make(report, group)
        if table is not None:
            yield table


def ablation_tables(report: dict[str, Any]) -> list[Table]:
    return [
        ablation_table(report, group, name)
        for name in intact_names(report)
        if ablations_of(report, name)
        for group in report["groups"]
    ]
