"""The picture of an evaluation."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter


# Okabe and Ito's palette, which colour-blind readers can tell apart too; markers differ as well.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LABEL_GAP = 0.065  # least distance of two labels, as a share of the height


def bin_label(result: dict[str, Any]) -> str:
    """`low` and `high` of a bin as a text."""
    return str(result["low"]) if result["low"] == result["high"] else f"{result['low']}–{result['high']}"  # noqa: RUF001


def plot_report(report: dict[str, Any], path: str | Path) -> None:
    """
    Write a PNG: accuracy by distance on the left, by depth on the right, a row for each group that has either.

    Args:
        report (`dict`): what eval.py writes as report.json.
        path (`str` or `Path`): where to.
    """
    models = [model["name"] for model in report["models"]]
    left = [name for name, group in report["groups"].items() if _has_distances(group)]
    right = [name for name, group in report["groups"].items() if _has_depths(group)]
    rows = max(len(left), len(right), 1)
    figure = Figure(figsize=(12, 4.6 * rows), dpi=100, layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    for k in range(rows):
        if k < len(left):
            _plot_distance(axes[k][0], report, left[k], models)
        if k < len(right):
            _plot_depth(axes[k][1], report, right[k], models)
        for ax in axes[k]:
            if not ax.has_data():
                ax.set_axis_off()
    if not left and not right:
        axes[0][0].text(0, 0.5, "Neither distance nor depth varies in this data set.")
    figure.savefig(path)


def _has_distances(group: dict[str, Any]) -> bool:
    return any(len(results["by_distance"]["bins"]) > 1 for results in group.values())


def _has_depths(group: dict[str, Any]) -> bool:
    return any(results["by_depth"]["bins"] for results in group.values())


def _title(text: str, group: str) -> str:
    return text if group == "all" else f"{text}  ({group})"


def _plot_distance(ax: Axes, report: dict[str, Any], group: str, models: list[str]) -> None:
    results = {name: report["groups"][group][name]["by_distance"]["bins"] for name in models}
    ax.set_xscale("log", base=2)
    bins = _plot_lines(ax, results)
    ax.set_xticks([max(result["mean"], 1) for result in bins], [bin_label(result) for result in bins])
    ax.minorticks_off()
    ax.set_title(_title("Correct answers by distance from the image", group))
    ax.set_xlabel(f"tokens between the image and the answer\n{_counts(bins, 'answers')}")
    ax.set_ylabel("correct answers")


def _plot_depth(ax: Axes, report: dict[str, Any], group: str, models: list[str]) -> None:
    results = {name: report["groups"][group][name]["by_depth"]["bins"] for name in models}
    bins = _plot_lines(ax, results)
    ax.set_title(_title("Correct pieces by depth in the answer", group))
    ax.set_xlabel(f"tokens of the answer before the piece\n{_counts(bins, 'pieces')}")
    ax.set_ylabel("correct pieces")


def _counts(bins: list[dict[str, Any]], what: str) -> str:
    fewest, most = min(result["n"] for result in bins), max(result["n"] for result in bins)
    count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f"(a point: {count} {what}; shaded: 95% Wilson interval)"


def _plot_lines(ax: Axes, results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One line with its interval for each model, named at its end. Returns the bins, which all models share."""
    ends = []
    for k, bins in enumerate(results.values()):
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        x = [max(result["mean"], 1) if ax.get_xscale() == "log" else result["mean"] for result in bins]
        y = [result["accuracy"] for result in bins]
        low, high = zip(*(result["interval"] for result in bins))
        ax.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        ax.plot(x, y, color=colour, marker=marker, markersize=6, linewidth=2)
        ends.append(y[-1])
    ax.set_ylim(-0.02, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    heights = _spread(ends)
    for k, name in enumerate(results):
        ax.annotate(
            name,
            xy=(x[-1], heights[k]),
            xytext=(10, 0),
            textcoords="offset points",
            color=COLOURS[k % len(COLOURS)],
            fontsize=12,
            fontweight="bold",
            verticalalignment="center",
            annotation_clip=False,
        )
    return bins


def _spread(heights: list[float]) -> list[float]:
    """The heights moved apart as far as labels at them need, all within [0, 1] where that is possible."""
    order = sorted(range(len(heights)), key=lambda k: heights[k])
    placed: dict[int, float] = {}
    floor = 0.0
    for k in order:
        placed[k] = max(heights[k], floor)
        floor = placed[k] + LABEL_GAP
    ceiling = 1.0
    for k in reversed(order):
        placed[k] = min(placed[k], ceiling)
        ceiling = placed[k] - LABEL_GAP
    return [placed[k] for k in range(len(heights))]
