"""The pictures of a report."""

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from pvm.data.media import read_image
from pvm.data.sources import Conversations
from pvm.evaluation.tables import bin_label, intact_names
from pvm.style import COLOURS, ORANGE, PAPER, PICTURES, QUIET


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")  # one more than colours: a ninth model differs from the first
Styles = dict[str, tuple[str, str]]  # colour and marker of each model
WIDTH = 8.4  # inches: two panels, legible on a telephone that shows 600 pixels of it
QUESTION_SHOWN = 56  # last characters
LABEL_WIDTH = 20  # characters, after which a name is wrapped
LABELS_SHOWN = 54  # characters that fit under a panel
CJK_FONTS = ("Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei")  # of Linux, macOS and Windows; matplotlib has none
ATTENTION = LinearSegmentedColormap.from_list("attention", [f"{ORANGE}00", f"{ORANGE}D9"])  # to 85 % opaque


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
    styles = {
        name: (COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]) for k, name in enumerate(intact_names(report))
    }
    files, fonts = {}, ["sans-serif", *(font for font in CJK_FONTS if font in get_font_names())]
    with rc_context({**PICTURES, "font.family": fonts}), warnings.catch_warnings():
        # What no font has, in what a model wrote, is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
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
    """Accuracy by distance and by depth, a panel for each group in which they vary."""
    groups = report["groups"]
    panels = [(group, "by_distance") for group in groups if _varies(report, group, "by_distance")]
    panels += [(group, "by_depth") for group in groups if _varies(report, group, "by_depth")]
    if not panels:
        figure = Figure(figsize=(WIDTH, 1), layout="constrained")
        figure.text(0.02, 0.5, "Neither distance nor depth varies in this data set.")
        return figure
    figure, axes = _panels(len(panels))
    for ax, (group, axis) in zip(axes, panels):
        of_distance = axis == "by_distance"
        what = "answers by distance" if of_distance else "pieces by depth"
        _plot_bins(ax, report, group, axis, styles, what.partition(" ")[0])
        ax.set_title(_title(f"Correct {what}", group))
        ax.set_xlabel(
            f"tokens {'from image to answer' if of_distance else 'of the answer before the piece'}{ax.get_xlabel()}"
        )
    _legend(figure, styles)
    return figure


def _lengths(report: dict[str, Any], styles: Styles) -> Figure | None:
    """Accuracy by quartile of length, a panel for each group in which lengths vary."""
    groups = [name for name in report["groups"] if _varies(report, name, "by_length")]
    if not groups:
        return None
    figure, axes = _panels(len(groups))
    for ax, group in zip(axes, groups):
        _plot_bins(ax, report, group, "by_length", styles, "answers")
        ax.set_title(_title("Correct answers by length", group))
        whose = "the reference" if report["lengths_of"][group] == "reference" else f"{next(iter(styles))}'s answer"
        ax.set_xlabel(f"tokens of {whose}{ax.get_xlabel()}")
    _legend(figure, styles)
    return figure


def _ablations(report: dict[str, Any], styles: Styles) -> Figure | None:
    """The difference that each ablation makes, a column for each group."""
    entries = {model["name"]: model["intact"] for model in report["models"] if model["intact"] is not None}
    if not entries:
        return None
    figure, axes = _panels(len(report["groups"]), 1 + 0.25 * len(entries), columns=3, sharey=True)
    for ax, group in zip(axes, report["groups"]):
        found = {entry["of"]: entry for entry in report["comparisons"][group] if entry["of"] in entries}
        for place, (name, intact) in enumerate(reversed(entries.items())):
            colour, marker = styles[intact]
            for what, shift, face in (("answers", 0.12, colour), ("pieces", -0.12, PAPER)):
                if result := found[name][what]:
                    height = place + shift
                    ax.hlines(height, *(100 * bound for bound in result["interval"]), color=colour, linewidth=1.5)
                    ax.plot(
                        100 * result["difference"], height, marker, color=colour, markerfacecolor=face, markersize=5
                    )
        ax.axvline(0, color=QUIET, linewidth=1)
        labels = [name.removeprefix(f"{intact} - ") for name, intact in reversed(entries.items())]
        ax.set_yticks(range(len(entries)), labels)
        ax.set_ylim(-0.5, len(entries) - 0.5)
        ax.set_title(_title("Difference to intact", group))
        ax.grid(True, axis="x")
        ax.grid(False, axis="y")
    _legend(figure, {name: styles[name] for name in styles if name in entries.values()})
    figure.supxlabel("percentage points of correct answers (open: of pieces); bars: 95 %", fontsize="medium")
    return figure


def _attention(diagnostics: dict[str, Any], styles: Styles) -> Figure | None:
    """
    The share of self-attention on the image, a row for each group: by position, by text tokens per visual token with
    fits, by layer.
    """
    if not diagnostics:
        return None
    groups = list(next(iter(diagnostics.values()))["attention"])
    figure, axes = _panels(3 * len(groups), columns=3)
    for k, group in enumerate(groups):
        curves = {name: summary["attention"][group] for name, summary in diagnostics.items()}
        _plot_attention(axes[3 * k : 3 * k + 3], group, curves, styles)
    _legend(figure, styles)
    return figure


def _plot_attention(axes: Sequence[Axes], group: str, curves: dict[str, Any], styles: Styles) -> None:
    position, ratio, layer = axes
    for ax in (position, ratio):
        ax.set_xscale("log", base=2)
    ratio.set_yscale("log")
    for name, attention in curves.items():
        style = styles[name]
        if attention["by_position"]:
            _band(position, [point["x"] for point in attention["by_position"]], attention["by_position"], style)
        x = np.array([point["x"] for point in attention["by_ratio"]])
        _band(ratio, x, attention["by_ratio"], style)
        if attention["decay"] is not None:
            fine = np.geomspace(x.min(), x.max(), 50)
            fit = 1 / (1 + (fine / attention["decay"]["half"]) ** attention["decay"]["exponent"])
            ratio.plot(fine, fit, color=style[0], linewidth=1, linestyle="--")
        _band(layer, range(len(attention["by_layer"])), attention["by_layer"], style)
    fine = np.geomspace(*ratio.get_xlim(), 50)
    ratio.plot(fine, 1 / (1 + fine), color=QUIET, linestyle=":")
    for ax, label in (
        (position, "tokens of the answer"),
        (ratio, "text tokens per visual token"),
        (layer, "decoder layer"),
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
        ax.set_xlabel(label)
    (position if position.has_data() else ratio).set_title(_title("Self-attention on the image", group))
    layer.xaxis.set_major_locator(MaxNLocator(integer=True))


def _lens(diagnostics: dict[str, Any], styles: Styles) -> Figure | None:
    """KL divergence of each layer's logit lens from the final prediction."""
    if not diagnostics:
        return None
    figure, (ax,) = _panels(1)
    for name, summary in diagnostics.items():
        _band(ax, range(len(summary["kl"])), summary["kl"], styles[name])
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title("How far each layer is from the final prediction")
    ax.set_xlabel("after decoder layer")
    ax.set_ylabel("KL(final || lens), nats")
    _legend(figure, {name: styles[name] for name in diagnostics})
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
        colour, marker = styles[name]
        ax.vlines(x, 0, shares, color=colour, linewidth=3)
        ax.plot(x, shares, color=colour, linestyle="none", marker=marker)
        ffn = [summary["ffn"][n]["mean"] / summary["residual"][n]["mean"] for n in layers]
        ax.plot(x, ffn, color=QUIET, linestyle="none", marker="_", markersize=14, markeredgewidth=3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_title("Size of what branches add (gray: the FFN)")
    ax.set_xlabel("decoder layer")
    ax.set_ylabel("root mean square : stream's")
    _legend(figure, {name: styles[name] for name in with_branches})
    return figure


def _heat_maps(results: list[dict[str, Any]], conversations: Conversations) -> Figure | None:
    """For the first and the last row with heat maps: the image, and attention over it for some tokens."""
    shown = [row for row in results if row["heat_maps"] and row["heat_maps"][0]["branches"]]
    shown = [shown[0], *shown[-1:]] if len(shown) > 1 else shown
    if not shown:
        return None
    sources = [*shown[0]["heat_maps"][0]["branches"], "self"]
    lines = [(row, heat) for row in shown for heat in row["heat_maps"]]
    columns = len(sources) + 1
    figure, axes = _panels(len(lines) * columns, 1.1 * WIDTH / columns, columns)
    for k, (row, heat) in enumerate(lines):
        line = axes[k * columns : (k + 1) * columns]
        image = read_image(conversations[row["index"]].images[0])
        line[0].imshow(image)
        question = textwrap.fill(f"row {row['row']}: {row['question'][-QUESTION_SHOWN:]}", 28)
        line[0].set_ylabel(f"{question}\n“{heat['text']}” at {heat['token']}", fontsize=8)
        maps = {**heat["branches"], "self": heat["self_attention"]}
        for ax, source in zip(line[1:], sources):
            weights = np.array(maps[source]).reshape(row["grid"])
            ax.imshow(image.convert("L"), cmap="gray", extent=(0, *image.size, 0))
            ax.imshow(weights, cmap=ATTENTION, vmin=0, extent=(0, *image.size, 0), interpolation="nearest")
            label = "self-attention" if source == "self" else f"branch, layer {source}"
            ax.set_title(f"{label}\nlargest {weights.max():.0%}", fontsize=9, fontweight="normal")
        for ax in line:
            ax.grid(False)
            ax.set_xticks([])
            ax.set_yticks([])
    return figure


def _panels(number: int, height: float = 3.2, columns: int = 2, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of `number` panels of `height` inches."""
    columns = min(number, columns)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for ax in axes[number:]:
        ax.set_axis_off()
    return figure, axes[:number]


def _legend(figure: Figure, styles: Styles) -> None:
    """Above all panels, which share it."""
    lines = [
        Line2D([], [], color=colour, marker=marker, label=_label(name)) for name, (colour, marker) in styles.items()
    ]
    figure.legend(handles=lines, loc="outside upper left", ncols=min(len(lines), 4))


def _label(name: str) -> str:
    return textwrap.fill(name, LABEL_WIDTH)


def _title(text: str, group: str) -> str:
    return text if group == "all" else f"{group}: {text[0].lower()}{text[1:]}"


def _band(ax: Axes, x: Sequence[float], points: list[dict[str, Any]], style: tuple[str, str]) -> None:
    """Means as a line with their intervals."""
    low, high = zip(*(point["interval"] for point in points))
    means, (colour, marker) = [point["mean"] for point in points], style
    ax.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    ax.plot(x, means, color=colour, marker=marker, markersize=4, linewidth=1.5)


def _varies(report: dict[str, Any], group: str, axis: str) -> bool:
    return any(len(results[axis]["bins"]) > 1 for results in report["groups"][group].values())


def _plot_bins(ax: Axes, report: dict[str, Any], group: str, axis: str, styles: Styles, what: str) -> None:
    """
    Accuracy in each bin, a line for each model. Bins are equally far apart, as they may reach from 0 to thousands, and
    models are shifted against each other to show their intervals. The label of the axis says what a point is.
    """
    results = {name: report["groups"][group][name][axis]["bins"] for name in styles}
    bins = next(iter(results.values()))
    step = min(0.1, 0.5 / len(styles))
    for k, (name, (colour, marker)) in enumerate(styles.items()):
        x = np.arange(len(bins)) + (k - (len(styles) - 1) / 2) * step
        y = [span["accuracy"] for span in results[name]]
        low, high = np.transpose([span["interval"] for span in results[name]])
        ax.vlines(x, low, high, color=colour, linewidth=1.2, alpha=0.5)
        ax.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.5)
        for run in zip(*(span.get("by_run", []) for span in results[name])):
            ax.plot(x, run, color=colour, linestyle="none", marker=".", markersize=3, alpha=0.5)
    labels = [bin_label(span) for span in bins]
    ax.set_xticks(range(len(bins)), labels)
    if len(labels) * (max(map(len, labels)) + 1) > LABELS_SHOWN:
        ax.tick_params(axis="x", labelrotation=60)
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    fewest, most = (choose(span["n"] for span in bins) for choose in (min, max))
    count = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    runs = "; dots: single runs" if any("by_run" in span for result in results.values() for span in result) else ""
    ax.set_xlabel(f"\n(a point: {count} {what}; bars: 95 %{runs})")
