"""The pictures of a report."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from pvm.data.media import read_image
from pvm.data.sources import Conversations
from pvm.evaluation.tables import bin_label


# Okabe and Ito's palette for colour-blind readers; markers differ as well.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one more than colours: an eighth model differs from the first
Styles = dict[str, tuple[str, str]]  # colour and marker of each model
LABEL_GAP = 0.065  # smallest distance between lines of labels, as a share of the height
QUESTION_SHOWN = 56  # last characters
LABEL_WIDTH = 16  # characters, after which a name is wrapped


def draw_all(
    report: dict[str, Any], diagnostics: dict[str, list[dict[str, Any]]], conversations: Conversations, folder: Path
) -> dict[str, str]:
    """
    Draw every picture that the report has numbers for.

    Args:
        report (`dict`): the content of report.json.
        diagnostics (`dict` `{model: results}`): of [`diagnose`], for heat maps.
        conversations (`Conversations`): the rows, with the images under the heat maps.
        folder (`Path`): where the PNG files are written.

    Returns:
        `dict`: file names by content: "accuracy", "lengths", "ablations", "attention", "lens", "branches", and "heat
        NAME" for each model with branches that attend to the image.
    """
    names = list(dict.fromkeys(model["name"] for model in report["models"] if model["ablation"] == "none"))
    styles = {name: (COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]) for k, name in enumerate(names)}
    files = {}
    with rc_context({"text.parse_math": False}):  # names, groups and tokens may contain dollars
        figures = {
            "accuracy": _accuracy(report, styles),
            "lengths": _lengths(report, styles),
            "ablations": _ablations(report, styles),
            "attention": _attention(report["diagnostics"], styles),
            "lens": _lens(report["diagnostics"], styles),
            "branches": _branches(report["diagnostics"], styles),
            **{f"heat {name}": _heat_maps(results, conversations) for name, results in diagnostics.items()},
        }
        for what, figure in figures.items():
            if figure is not None:
                files[what] = "report.png" if what == "accuracy" else f"report_{what}.png"
                figure.savefig(folder / files[what])
    return files


def _accuracy(report: dict[str, Any], styles: Styles) -> Figure:
    """Accuracy by distance on the left, by depth on the right, a row for each group that has either."""
    left = [name for name, group in report["groups"].items() if _has_distances(group)]
    right = [name for name, group in report["groups"].items() if _has_depths(group)]
    rows = max(len(left), len(right), 1)
    figure = Figure(figsize=(12, 4.6 * rows), dpi=100, layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    for k in range(rows):
        if k < len(left):
            _plot_distance(axes[k][0], report, left[k], styles)
        if k < len(right):
            _plot_depth(axes[k][1], report, right[k], styles)
        for ax in axes[k]:
            if not ax.has_data():
                ax.set_axis_off()
    if not left and not right:
        axes[0][0].text(0, 0.5, "Neither distance nor depth varies in this data set.")
    return figure


def _lengths(report: dict[str, Any], styles: Styles) -> Figure | None:
    """Accuracy by quartile of length, a panel for each group in which lengths vary."""
    first = next(iter(styles))
    groups = [name for name, group in report["groups"].items() if len(group[first]["by_length"]["bins"]) > 1]
    if not groups:
        return None
    figure, axes = _panels(len(groups))
    for ax, group in zip(axes, groups):
        for k, (name, style) in enumerate(styles.items()):
            bins = report["groups"][group][name]["by_length"]["bins"]
            x = [place + (k - (len(styles) - 1) / 2) * 0.12 for place in range(len(bins))]
            _points(ax, x, bins, style, _label(name))
        ax.set_xticks(range(len(bins)), [f"{bin_label(span)}\n(n = {span['n']})" for span in bins])
        ax.set_title(_title("Correct answers by length", group))
        whose = "the reference" if report["lengths_of"][group] == "reference" else f"{first}'s answer"
        ax.set_xlabel(f"tokens of {whose}\nin quartiles (bars: 95% intervals)")
        ax.set_ylabel("correct answers")
        ax.set_ylim(-0.02, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        _legend(ax)
        _plain(ax)
    return figure


def _ablations(report: dict[str, Any], styles: Styles) -> Figure | None:
    """The difference that each ablation makes, a panel for each group."""
    entries = {model["name"]: model["intact"] for model in report["models"] if model["intact"] is not None}
    if not entries:
        return None
    groups = list(report["groups"])
    figure = Figure(figsize=(9, (1.4 + 0.34 * len(entries)) * len(groups)), dpi=100, layout="constrained")
    for ax, group in zip(figure.subplots(len(groups), 1, squeeze=False)[:, 0], groups):
        found = {entry["of"]: entry for entry in report["comparisons"][group] if entry["of"] in entries}
        for place, (name, intact) in enumerate(reversed(entries.items())):
            colour, _ = styles[intact]
            for what, shift, face in (("answers", 0.12, colour), ("pieces", -0.12, "white")):
                if result := found[name][what]:
                    points = [100 * value for value in (*result["interval"], result["difference"])]
                    height = [place + shift] * 2
                    ax.plot(points[:2], height, color=colour, linewidth=1.5)
                    ax.plot(points[2:], height[:1], "o", color=colour, markerfacecolor=face)
        ax.axvline(0, color="#888888", linewidth=1)
        ax.set_yticks(range(len(entries)), list(reversed(entries)))
        ax.set_ylim(-0.5, len(entries) - 0.5)
        ax.set_title(_title("Effect of each ablation", group))
        ax.set_xlabel("percentage points of correct answers (open: of pieces),\ncompared with intact; bars: 95%")
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _attention(diagnostics: dict[str, Any], styles: Styles) -> Figure | None:
    """
    The share of self-attention on the image, a row for each group: by position, by text tokens per visual token with
    fits, by layer.
    """
    if not diagnostics:
        return None
    groups = list(next(iter(diagnostics.values()))["attention"])
    figure = Figure(figsize=(13.8, 4.6 * len(groups)), dpi=100, layout="constrained")
    for group, axes in zip(groups, figure.subplots(len(groups), 3, squeeze=False)):
        curves = {name: summary["attention"][group] for name, summary in diagnostics.items()}
        _plot_attention(axes, group, curves, styles)
    return figure


def _plot_attention(axes: Sequence[Axes], group: str, curves: dict[str, Any], styles: Styles) -> None:
    position, ratio, layer = axes
    for ax in (position, ratio):
        ax.set_xscale("log", base=2)
    ratio.set_yscale("log")
    for name, attention in curves.items():
        style = styles[name]
        if attention["by_position"]:
            _band(position, [point["x"] for point in attention["by_position"]], attention["by_position"], style, name)
        x = np.array([point["x"] for point in attention["by_ratio"]])
        _band(ratio, x, attention["by_ratio"], style, name)
        if attention["decay"] is not None:
            fine = np.geomspace(x.min(), x.max(), 50)
            fit = 1 / (1 + (fine / attention["decay"]["half"]) ** attention["decay"]["exponent"])
            ratio.plot(fine, fit, color=style[0], linewidth=1, linestyle="--")
        _band(layer, range(len(attention["by_layer"])), attention["by_layer"], style, name)
    fine = np.geomspace(*ratio.get_xlim(), 50)
    ratio.plot(fine, 1 / (1 + fine), color="#888888", linestyle=":")
    for ax, title, label in (
        (position, "As the answer grows", "tokens of the answer"),
        (ratio, "As there is more text", "text tokens per visual token"),
        (layer, "By layer", "decoder layer"),
    ):
        if not ax.has_data():
            ax.set_axis_off()
            continue
        if ax is not layer:
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if ax is not ratio:
            ax.set_ylim(bottom=0)
        else:
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_title(_title(title, group))
        ax.set_xlabel(label)
        _plain(ax)
    (position if position.has_data() else ratio).set_ylabel("self-attention on the image")
    layer.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(layer)


def _lens(diagnostics: dict[str, Any], styles: Styles) -> Figure | None:
    """KL divergence of each layer's logit lens from the final prediction."""
    if not diagnostics:
        return None
    figure, (ax,) = _panels(1)
    for name, summary in diagnostics.items():
        _band(ax, range(len(summary["kl"])), summary["kl"], styles[name], name)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title("How far each layer is from the final prediction")
    ax.set_xlabel("after decoder layer")
    ax.set_ylabel("KL(final || lens), nats")
    _legend(ax)
    _plain(ax)
    return figure


def _branches(diagnostics: dict[str, Any], styles: Styles) -> Figure | None:
    """Size of what branches and FFNs add, as a share of the stream, by layer."""
    with_branches = {name: summary for name, summary in diagnostics.items() if summary["injected"]}
    if not with_branches:
        return None
    figure, (ax,) = _panels(1)
    width = 0.8 / len(with_branches)
    for k, (name, summary) in enumerate(with_branches.items()):
        layers = [int(layer) for layer in summary["injected"]]
        shares = [summary["injected"][str(n)]["mean"] / summary["residual"][n]["mean"] for n in layers]
        x = [n + (k - (len(with_branches) - 1) / 2) * width for n in layers]
        ax.bar(x, shares, width=0.9 * width, color=styles[name][0], label=_label(f"{name}: branch"))
        ffn = [summary["ffn"][n]["mean"] / summary["residual"][n]["mean"] for n in layers]
        ax.plot(x, ffn, color="#777777", linestyle="none", marker="_", markersize=14, markeredgewidth=3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_title("Size of what branches add (gray: the FFN)")
    ax.set_xlabel("decoder layer")
    ax.set_ylabel("root mean square, as a share of the stream's")
    _legend(ax)
    _plain(ax)
    return figure


def _heat_maps(results: list[dict[str, Any]], conversations: Conversations) -> Figure | None:
    """For the first and the last row with heat maps: the image, and attention over it for some tokens."""
    shown = [row for row in results if row["heat_maps"] and row["heat_maps"][0]["branches"]]
    shown = [shown[0], *shown[-1:]] if len(shown) > 1 else shown
    if not shown:
        return None
    sources = [*shown[0]["heat_maps"][0]["branches"], "self"]
    lines = [(row, heat) for row in shown for heat in row["heat_maps"]]
    figure = Figure(figsize=(2.2 * (len(sources) + 1), 2.4 * len(lines)), dpi=100, layout="constrained")
    axes = figure.subplots(len(lines), len(sources) + 1, squeeze=False)
    for (row, heat), line in zip(lines, axes):
        image = read_image(conversations[row["index"]].images[0])
        line[0].imshow(image)
        question = textwrap.fill(f"row {row['row']}: {row['question'][-QUESTION_SHOWN:]}", 28)
        line[0].set_ylabel(f"{question}\n“{heat['text']}” at {heat['token']}", fontsize=8)
        maps = {**heat["branches"], "self": heat["self_attention"]}
        for ax, source in zip(line[1:], sources):
            weights = np.array(maps[source]).reshape(row["grid"])
            ax.imshow(image.convert("L"), cmap="gray", extent=(0, *image.size, 0))
            ax.imshow(weights, cmap="Reds", alpha=0.65, vmin=0, extent=(0, *image.size, 0), interpolation="nearest")
            label = "self-attention" if source == "self" else f"branch in layer {source}"
            ax.set_title(f"{label}\nlargest {weights.max():.0%}", fontsize=9)
        for ax in line:
            ax.set_xticks([])
            ax.set_yticks([])
    return figure


def _panels(number: int, height: float = 4.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(4.6 * number, 7.5), height), dpi=100, layout="constrained")
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def _legend(ax: Axes) -> None:
    """To the right of the panel."""
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _label(name: str) -> str:
    return textwrap.fill(name, LABEL_WIDTH)


def _plain(ax: Axes) -> None:
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def _band(ax: Axes, x: Sequence[float], points: list[dict[str, Any]], style: tuple[str, str], name: str) -> None:
    """Means as a line with their intervals."""
    low, high = zip(*(point["interval"] for point in points))
    means, (colour, marker) = [point["mean"] for point in points], style
    ax.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    ax.plot(x, means, color=colour, marker=marker, markersize=4, linewidth=2, label=_label(name))


def _points(ax: Axes, x: list[float], bins: list[dict[str, Any]], style: tuple[str, str], name: str) -> None:
    """Accuracies as points with their intervals."""
    y = [span["accuracy"] for span in bins]
    errors = [[max(y[k] - span["interval"][0], 0) for k, span in enumerate(bins)],
              [max(span["interval"][1] - y[k], 0) for k, span in enumerate(bins)]]  # fmt: skip
    colour, marker = style
    ax.errorbar(x, y, yerr=errors, color=colour, marker=marker, linestyle="none", linewidth=1.5, label=name)


def _has_distances(group: dict[str, Any]) -> bool:
    return any(len(results["by_distance"]["bins"]) > 1 for results in group.values())


def _has_depths(group: dict[str, Any]) -> bool:
    return any(results["by_depth"]["bins"] for results in group.values())


def _title(text: str, group: str) -> str:
    return text if group == "all" else f"{text}  ({group})"


def _plot_distance(ax: Axes, report: dict[str, Any], group: str, styles: Styles) -> None:
    results = {name: report["groups"][group][name]["by_distance"]["bins"] for name in styles}
    ax.set_xscale("log", base=2)
    bins = _plot_lines(ax, results, styles)
    ax.set_xticks([max(result["mean"], 1) for result in bins], [bin_label(result) for result in bins])
    ax.minorticks_off()
    ax.set_title(_title("Correct answers by distance from the image", group))
    ax.set_xlabel(f"tokens between the image and the answer\n{_counts(bins, 'answers')}")
    ax.set_ylabel("correct answers")


def _plot_depth(ax: Axes, report: dict[str, Any], group: str, styles: Styles) -> None:
    results = {name: report["groups"][group][name]["by_depth"]["bins"] for name in styles}
    bins = _plot_lines(ax, results, styles)
    ax.set_title(_title("Correct pieces by depth in the answer", group))
    ax.set_xlabel(f"tokens of the answer before the piece\n{_counts(bins, 'pieces')}")
    ax.set_ylabel("correct pieces")


def _counts(bins: list[dict[str, Any]], what: str) -> str:
    fewest, most = min(result["n"] for result in bins), max(result["n"] for result in bins)
    count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    what = what.removesuffix("s") if most == 1 else what
    single = "; thin: single runs" if any("by_run" in result for result in bins) else ""
    return f"(a point: {count} {what}; shaded: 95% interval{single})"


def _plot_lines(ax: Axes, results: dict[str, list[dict[str, Any]]], styles: Styles) -> list[dict[str, Any]]:
    """A labelled line with its interval for each model. Returns the bins, which all models share."""
    ends = []
    for name, bins in results.items():
        colour, marker = styles[name]
        x = [max(result["mean"], 1) if ax.get_xscale() == "log" else result["mean"] for result in bins]
        y = [result["accuracy"] for result in bins]
        low, high = zip(*(result["interval"] for result in bins))
        ax.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        ax.plot(x, y, color=colour, marker=marker, markersize=6, linewidth=2)
        for run in zip(*(result.get("by_run", []) for result in bins)):
            ax.plot(x, run, color=colour, linewidth=0.6, alpha=0.5)
        ends.append(y[-1])
    ax.set_ylim(-0.02, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    labels = [_label(name) for name in results]
    heights = _spread(ends, LABEL_GAP * max(label.count("\n") + 1 for label in labels))
    for label, height, name in zip(labels, heights, results):
        ax.annotate(
            label,
            xy=(x[-1], height),
            xytext=(10, 0),
            textcoords="offset points",
            color=styles[name][0],
            fontsize=12,
            fontweight="bold",
            verticalalignment="center",
            annotation_clip=False,
        )
    return bins


def _spread(heights: list[float], gap: float) -> list[float]:
    """The heights, moved apart by at least a gap and within [0, 1] if possible."""
    order = sorted(range(len(heights)), key=lambda k: heights[k])
    placed: dict[int, float] = {}
    floor = 0.0
    for k in order:
        placed[k] = max(heights[k], floor)
        floor = placed[k] + gap
    ceiling = 1.0
    for k in reversed(order):
        placed[k] = min(placed[k], ceiling)
        ceiling = placed[k] - gap
    return [placed[k] for k in range(len(heights))]
