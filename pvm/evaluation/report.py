"""An evaluation in words and tables: for the terminal and for report.md."""

import re
from typing import Any
from urllib.parse import quote

from rich.table import Table as RichTable

from pvm.evaluation.ablations import KNOCK_OUTS, SPLIT
from pvm.evaluation.diagnostics import LONG_TEXT
from pvm.evaluation.plots import bin_label
from pvm.evaluation.tables import (
    attention_table,
    branch_table,
    compared,
    depth_table,
    difference,
    difference_table,
    distance_table,
    group_tables,
    intact_names,
    knock_out_tables,
    knocked_out,
    length_table,
    of_group,
    overall_table,
    runs_table,
    subject,
)


CORRECT = {
    "exact": "the answer is the reference answer, whatever its case, spaces and final full stop",
    "choice": "the answer chooses the option that the reference is; one that chooses none or several is wrong",
    "number": 'the number that the answer gives (the first after "answer is", else its last one) is the reference\'s, '
    "to a ten-thousandth of it",
    "math": "the answer is the reference's mathematical object, as math-verify sees it",
}


def checkpoint_lines(report: dict[str, Any]) -> list[str]:
    """For each model what class it was evaluated as, whether its branches are on, and what trained it."""
    lines = []
    for model in report["models"]:
        if model["knock_out"] != "nothing":
            continue
        line = f"{model['label']}: {model['model_class']}, {model['parameters']:,} parameters"
        if model["gates_on"] is not None:
            gates = ", ".join(f"layer {layer} {value:+.4f}" for layer, value in model["gates"].items())
            line += f", branches {'on' if model['gates_on'] else 'off'} (gates: {gates})"
        if model["method"] or model["step"]:
            line += f", trained by {model['method']}" if model["method"] else ", trained"
            line += f" for {model['step']:,} steps" if model["step"] is not None else ""
        lines.append(f"{line}, on {model['base']}" if model["base"] else line)
    return lines


def rich_tables(report: dict[str, Any]) -> list[RichTable]:
    """What the terminal shows."""
    tables = [overall_table(report)]
    tables += group_tables(report, distance_table)
    tables += group_tables(report, depth_table)
    return [table.rich() for table in tables]


def remarks(report: dict[str, Any], only_intact: bool = False) -> list[str]:
    """Sentences on what a reader could otherwise take wrongly; empty if there is nothing of the kind."""
    sentences = []
    for model in report["models"]:
        if only_intact and model["knock_out"] != "nothing":
            continue
        if model["gates_on"] is False and model["knock_out"] == "nothing":
            sentences.append(f"All gates of {model['label']} are exactly 0: it computes what its base computes.")
        if model["answers_cut"]:
            sentences.append(
                f"{model['answers_cut']:,} of {report['rows']:,} answers of {model['label']} had not ended at the "
                "length limit and were cut there."
            )
    return sentences


def findings(report: dict[str, Any]) -> list[str]:
    """The report in sentences, by rule: a difference is one if its 95 % interval excludes zero."""
    name, names, sentences = subject(report), intact_names(report), []
    for group in report["groups"]:
        for other in names:
            if other != name:
                result = compared(report, group, name, other)
                sentences.append(f"{name} against {other}{of_group(group)}: {_verdict(result)}")
                # By the first model's own length, a difference from it is one that the bins have chosen.
                if report["lengths_of"][group] == "reference" or names[0] not in (name, other):
                    sentences += _length_finding(result["by_length"], name, other, group)
        for entry, kind in knocked_out(report, name).items():
            result = compared(report, group, entry, name)
            what = FINDING[kind].format(name=name, layer=entry.rpartition(" ")[2])
            sentences.append(f"{what}{of_group(group)}: {_verdict(result)}")
    return sentences


# What a knock-out is called where its effect is told.
LIST_NUMBER = re.compile(r"^([0-9]+)([.)])")  # as which a name may begin that is none
IN_TWO_PARTS = (
    "In `another_memory`, `hidden_image` and `blind`, only text after the last image lacks it: where a question has "
    "several images, the text between them has seen the first ones, and tells of them."
)
FEW_ROWS = 10  # of which no interval is worth a sentence
FINDING = {
    "branch_off": "{name} with its branches off, against intact",
    "branch_alone": "{name} with the branch of layer {layer} alone, against intact",
    "blank_image": "{name} shown a gray image, against its own",
    "another_image": "{name} shown another image, against its own",
    "another_memory": "{name} with its branches reading another image, against its own",
    "hidden_image": "{name} with its image visible to its branches alone, against intact",
    "blind": "{name} without any sight of its image, against intact",
}


def _verdict(entry: dict[str, Any]) -> str:
    kinds = [kind for kind in ("answers", "pieces") if entry[kind]]
    return "; ".join(f"{'of its pieces ' * (kind == 'pieces')}{_direction(entry[kind], kind)}" for kind in kinds)


def _direction(result: dict[str, Any], what: str) -> str:
    low, high = result["interval"]
    if result["rows"] < FEW_ROWS:
        return f"{difference(result)} points, of {_plural(result['rows'], 'question')}, too few to say more"
    if low == high != 0:
        return f"{100 * low:+.1f} points, the same on each of {_plural(result['rows'], 'question')}"
    if low > 0:
        sign = "better by"
    elif high < 0:
        sign = "worse by"
    else:
        n = f"{result['n']:,} {what}" + (f" of {result['rows']:,} answers" if what == "pieces" else "")
        return f"no difference that {n} could show, {difference(result)} points"
    points, bounds = difference(result).lstrip("+-").split(" ", 1)
    return f"{sign} {points} points {bounds}"


def _plural(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _length_finding(spans: list[dict[str, Any]], name: str, other: str, group: str) -> list[str]:
    if len(spans) < 2 or spans[0]["rows"] < FEW_ROWS or spans[-1]["rows"] < FEW_ROWS:
        return []
    shortest, longest = (
        f"{difference(span)} points in the {which} answers ({bin_label(span)} tokens, n = {span['n']})"
        for span, which in ((spans[0], "shortest"), (spans[-1], "longest"))
    )
    return [f"{name} against {other}, by length{of_group(group)}: {shortest}, {longest}"]


def markdown_report(report: dict[str, Any], pictures: dict[str, str]) -> str:
    """
    report.md: what was found, what was measured, how to read it, pictures and tables.

    Args:
        report (`dict`): the content of report.json.
        pictures (`dict`): file names by what they show, as [`draw_all`] returns them.
    """
    arguments, names = report["arguments"], intact_names(report)

    def picture(what: str, alt: str) -> list[str]:
        return [f"![{alt}]({quote(pictures[what])})"] if what in pictures else []

    parts = [
        f"# {', '.join(names)} on {report['dataset']['name']}",
        f"{'Each model answered the same' if len(names) > 1 else 'The model answered'} "
        f"{_plural(report['rows'], 'question')} (split `{arguments['dataset_split']}`), always with the most likely "
        f"next token.{_runs(report)}",
        *picture("accuracy", "Accuracy by distance and by depth"),
    ]
    if found := findings(report):
        parts += ["## In short", "Differences in percentage points of correct answers, with 95 % intervals:"]
        parts += [_bullets(found)]
    distances, depths, lengths = (
        list(group_tables(report, make)) for make in (distance_table, depth_table, length_table)
    )
    parts += [
        "## What this cannot tell",
        _bullets(cautions(report)),
        "## How to read this",
        reading_guide(report, bool(distances), bool(depths), bool(lengths)),
        *([_bullets(remarks(report))] if remarks(report) else []),
        "## Correct answers",
        overall_table(report).markdown(),
        *([runs_table(report).markdown()] if runs_table(report) else []),
    ]
    for heading, tables in (("By distance", distances), ("By depth", depths), ("By length", lengths)):
        if tables:
            parts.append(f"## {heading}")
        if heading == "By length":
            parts += picture("lengths", "Accuracy by length")
        for table in tables:
            parts += [f"**{table.title}**", table.markdown()]
    parts += _differences(report)
    parts += _knock_outs(report, picture("knock_outs", "What each knock-out costs"))
    parts += _inside(report, pictures)
    parts += ["## Checkpoints", checkpoint_guide(report), _bullets(checkpoint_lines(report))]
    parts += [
        "## How it was measured",
        _bullets(
            [
                f"{m['label']}: `{m['path']}`{at_commit(m)}, {m['dtype']}, answered in "
                + ("several goes" if m["seconds"] is None else f"{m['seconds']:.0f} s")
                for m in report["models"]
            ]
        ),
        "Versions: " + ", ".join(f"{package} {number}" for package, number in report["versions"].items()) + ".",
        "Arguments: "
        + ", ".join(
            f"`{key}: {value}`"
            for key, value in arguments.items()
            if value is not None and key not in ("model", "names")
        )
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def at_commit(model: dict[str, Any]) -> str:
    """Which commit of a Hub name was loaded, as a part of a sentence."""
    return f" at {model['commit']}" if model["commit"] else ""


def _runs(report: dict[str, Any]) -> str:
    counts = {name: result["runs"] for name, result in report["overall"].items() if "runs" in result}
    counts = {name: runs for name, runs in counts.items() if name in intact_names(report)}
    if not counts:
        return ""
    return (
        " Several runs of a method are reported together: "
        + ", ".join(f"{runs} of {name}" for name, runs in counts.items())
        + "."
    )


def cautions(report: dict[str, Any]) -> list[str]:
    """What must not be concluded, from what was and was not varied."""
    names = intact_names(report)
    single = [name for name in names if "runs" not in report["overall"][name]]
    trained = [name for name in single if any(m["name"] == name and m["step"] for m in report["models"])]
    counts = [result["runs"] for name, result in report["overall"].items() if name in names and "runs" in result]
    without = sum(scores[names[0]]["by_distance"]["without_image"]["n"] for scores in report["groups"].values())
    sentences = ["One data set: what holds here need not hold elsewhere."]
    if trained:
        sentences.append(
            f"{', '.join(trained)}: one training each. The intervals cover the choice of questions, not that of "
            "training runs, which may differ by more."
        )
    if counts:
        sentences.append(
            f"The number of runs is small (down to {min(counts)}): intervals that draw runs again are then too narrow "
            "and hold the truth less often than they say."
        )
    if without:
        sentences.append(
            f"{without:,} of {report['rows']:,} questions have no image. They count in every number, and knock-outs "
            "of images take nothing from them."
        )
    if any(report["comparisons"].values()):
        sentences.append(
            "Many differences are reported, each with a 95 % interval. Where nothing differs, one in twenty excludes "
            "zero by chance."
        )
        sentences.append(
            "That an interval includes zero is no proof that there is no difference: look at how wide it is."
        )
    if report["probes"]:
        rows = next(iter(report["probes"].values()))["rows"]
        sentences.append(
            f"What is seen inside comes from {rows} rows and the first run of each model. Attention that goes to the "
            "image need not be used: what an answer rests on is told by knock-outs, not by heat maps."
        )
    if not any(knocked_out(report, name) for name in names):
        sentences.append("Without knock-outs nothing is told about what the answers rest on (`--knock_outs`).")
    return sentences


def _differences(report: dict[str, Any]) -> list[str]:
    first, name = intact_names(report)[0], subject(report)
    parts = []
    tables = list(group_tables(report, lambda report, group: difference_table(report, group, first)))
    if tables:
        parts += ["## Differences from the first model", difference_guide(first)]
    for table in tables:
        parts += [f"**{table.title}**", table.markdown()]
    if name != first and len(intact_names(report)) > 2:
        parts.append(f"## Differences of {name} from each")
        for group in report["groups"]:
            table = difference_table(report, group, name, is_second=True)
            parts += [f"**{table.title}**", table.markdown()]
    return parts


def _knock_outs(report: dict[str, Any], picture: list[str]) -> list[str]:
    kinds = [kind for kind in KNOCK_OUTS if kind in {model["knock_out"] for model in report["models"]}]
    if not kinds:
        return []
    parts = [
        "## What was taken away",
        "The same checkpoint answers the same questions with something missing. What is lost rested on it, at least "
        "in part; what is kept had another source as well, or was guessed (`blind` shows how much guessing gives). A "
        "model that was never trained without it may also fail for being disturbed.",
        _bullets([f"**{kind.replace('_', ' ')}**: {KNOCK_OUTS[kind]}." for kind in kinds]),
        *([IN_TWO_PARTS] if set(kinds) & set(SPLIT) else []),
        *picture,
    ]
    for table in knock_out_tables(report):
        parts += [f"**{table.title}**", table.markdown()]
    return parts


def _inside(report: dict[str, Any], pictures: dict[str, str]) -> list[str]:
    """Attention, logit lens, gates: pictures with what they show."""
    if not report["probes"]:
        return []
    rows, first = next(iter(report["probes"].values()))["rows"], intact_names(report)[0]
    parts = [
        "## Inside",
        f"On {_plural(rows, 'question')} each model was made to write the same text, {first}'s answer, and was looked "
        "at wherever it predicts a token of it. Shaded: 95 % of resamples of these rows.",
        "### Where self-attention goes",
        "The share of a text token's self-attention that goes to visual tokens, a mean over heads and layers: on the "
        f"left as an answer of at least {LONG_TEXT} tokens grows, in the middle by how many text tokens there are for "
        "each visual one, on the right by layer. In the middle, dotted: what the image would get if every token got "
        "the same.",
    ]
    if "attention" in pictures:
        parts.append(f"![Share of self-attention on the image]({quote(pictures['attention'])})")
    if table := attention_table(report):
        parts += [
            "The paper bounds the share by a curve that falls like 1/t. The dashed lines in the middle are fits of "
            "`share = 1 / (1 + (x / half)^exponent)`, which is that curve where the **exponent** is 1; less is "
            "slower. **Half at**: the text tokens per visual token at which half of the attention is on the image, if "
            "any that were looked at. An R² far below 1 says that the fit does not describe what was measured.",
            table.markdown(),
        ]
    if "lens" in pictures:
        parts += [
            "### When the prediction is made",
            "The distance (KL divergence, in nats) from the final prediction to that which the model's own last norm "
            "and head would make of the stream after each layer (logit lens): low is near. In early layers this says "
            "little: the stream there is not written in the head's language, and a large value means only that.",
            f"![KL divergence by layer]({quote(pictures['lens'])})",
        ]
    if table := branch_table(report):
        parts += [
            "### What branches add",
            "Root mean squares of what a branch and the FFN add to the residual stream at a text token, and of the "
            "stream before. What a branch adds is normalised, so that its size is its gate's; a control without an "
            "image has the same.",
            table.markdown(),
        ]
        if "branches" in pictures:
            parts.append(f"![Size of what branches add]({quote(pictures['branches'])})")
    maps = {what.removeprefix("heat "): file for what, file in pictures.items() if what.startswith("heat ")}
    if maps:
        parts += [
            "### What is looked at",
            "For some tokens, about to be written: the attention of each branch over the image, and that of "
            "self-attention (a mean over layers), each of sum 1. Every map has its own scale, whose strongest red is "
            "the share that is written above it. Beside the image is the end of the question.",
        ]
        parts += [f"![Attention over the image of {name}]({quote(file)})" for name, file in maps.items()]
    return parts


def _bullets(lines: list[str]) -> str:
    return "\n".join("- " + LIST_NUMBER.sub(r"\1\\\2", line) for line in lines)


def reading_guide(report: dict[str, Any], has_distances: bool, has_depths: bool, has_lengths: bool) -> str:
    """One paragraph for each kind of number that the report has."""
    parts = [
        f"**Correct**: {CORRECT[report['arguments']['match']]}. Each entry "
        "is the share of correct ones among n, and in brackets its 95% confidence interval (Wilson's; where several "
        "runs of a method are reported together, their mean, and the range of 95% of the means when questions and "
        "runs are drawn again)."
    ]
    if has_lengths:
        parts.append(
            "**Length** is the number of tokens of the reference answer, in quartiles: the same questions for all "
            "models. Long answers with several pieces are harder for any model: compare models within a row."
        )
        first = intact_names(report)[0]
        varying = [group for group, scores in report["groups"].items() if len(scores[first]["by_length"]["bins"]) > 1]
        if by_answer := [group for group in varying if report["lengths_of"][group] == "answer"]:
            where = "" if by_answer == ["all"] else f" ({', '.join(by_answer)})"
            parts.append(
                f"Where references are all about as long{where}, it is the number of tokens of {first}'s answer. "
                f"That depends on whether {first} was right, so that such a table makes {first} look good in some "
                "rows and bad in others: compare the other models with one another there, not with it."
            )
    if has_distances:
        parts.append(
            "**Distance** is the number of tokens between the last visual token and the first token of the answer: "
            "how much text stands between the image and the place where it is needed."
        )
    if has_depths:
        pattern = report["arguments"]["scored_pattern"]
        parts.append(
            "**Depth** is the number of tokens that the reference has before a scored piece of it: how long a model "
            f"that answers alike has already been writing. Pieces are the matches of `{pattern}`; the k-th of the "
            "answer must be the text of the k-th of the reference. Only references with more than one piece count "
            "here, and n counts pieces."
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


def difference_guide(first: str) -> str:
    return (
        f"Percentage points by which a model is better (+) or worse (-) than {first} on the same rows; in brackets, "
        "the range of 95% of the differences when the rows, and runs where there are several, are drawn again (paired "
        "bootstrap). It has no width where the difference is the same on every row."
    )


def checkpoint_guide(report: dict[str, Any]) -> str:
    guide = "The class that was evaluated, and what the checkpoint says about its training."
    if any(model["gates"] for model in report["models"]):
        guide += (
            " A PVM branch reads the image's tokens directly; what it finds is multiplied by its layer's gate, which "
            "starts at 0 (no effect) and is learned."
        )
    return guide
