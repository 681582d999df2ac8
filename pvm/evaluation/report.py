"""The report of an evaluation in words and tables: report.md, and what the terminal shows."""

import re
from typing import Any
from urllib.parse import quote

from rich.table import Table as RichTable

from pvm.evaluation.ablations import ABLATIONS, IN_TWO_PARTS
from pvm.evaluation.conclusions import conclusions, reading
from pvm.evaluation.diagnostics import LONG_TEXT
from pvm.evaluation.tables import (
    ablation_tables,
    ablations_of,
    attention_table,
    bin_label,
    branch_table,
    compared,
    depth_table,
    difference,
    difference_table,
    distance_table,
    group_tables,
    intact_names,
    length_table,
    of_group,
    overall_table,
    runs_table,
    subject,
)


CORRECT = {
    "exact": "the answer is the reference answer, ignoring case, spaces and a final full stop",
    "choice": "the answer chooses the same option as the reference, however it is phrased",
    "number": "the number that the answer gives as its result is that of the reference, within a relative error of "
    "1e-4; units are not compared",
    "math": "the answer is the same mathematical object as the reference, according to math-verify",
}
EFFECT = {
    "branch_off": "{name} with its branches off, compared with intact",
    "branch_alone": "{name} with only the branch of layer {layer} on, compared with intact",
    "blank_image": "{name} with a gray image, compared with its own",
    "another_image": "{name} with another image, compared with its own",
    "another_memory": "{name} with its branches attending to another image, compared with its own",
    "hidden_image": "{name} with the image hidden from self-attention, compared with intact",
    "evict": "{name} with the image out of the KV cache after the prompt, compared with intact",
    "skip": "{name} with the image never in the decoder, compared with intact",
    "blind": "{name} with the image hidden from self-attention and branches, compared with intact",
}
FEW_ROWS = 10  # with fewer an interval is not reported in a sentence
LIST_NUMBER = re.compile(r"^([0-9]+)([.)])")  # in markdown, a name that starts like this would start a list


def checkpoint_lines(report: dict[str, Any]) -> list[str]:
    """For each model its class, the state of its branches, and its training."""
    lines = []
    for model in report["models"]:
        if model["ablation"] != "none":
            continue
        line = f"{model['label']}: {model['model_class']}, {model['parameters']:,} parameters"
        if model["gates_on"] is not None:
            gates = ", ".join(f"layer {layer} {value:+.4f}" for layer, value in model["gates"].items())
            line += f", {model['block']} branches {'on' if model['gates_on'] else 'off'} (gates: {gates})"
        if model["method"] or model["step"]:
            line += f", trained with {model['method']}" if model["method"] else ", trained"
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
    """Sentences about gates that are zero, answers that were cut, and ambiguous ones."""
    sentences = []
    for model in report["models"]:
        if only_intact and model["ablation"] != "none":
            continue
        if model["gates_on"] is False and model["ablation"] == "none":
            sentences.append(f"All gates of {model['label']} are exactly 0: it computes what its base computes.")
        if model["answers_cut"]:
            sentences.append(
                f"{model['answers_cut']:,} of {report['rows']:,} answers of {model['label']} were cut at the length "
                "limit."
            )
    for name, count in report["ambiguous"].items():
        if count and not (only_intact and name not in intact_names(report)):
            answers = report["overall"][name]["n"] * report["overall"][name].get("runs", 1)
            sentences.append(f"{count:,} of {answers:,} answers of {name} are ambiguous and count as wrong.")
    return sentences


def findings(report: dict[str, Any]) -> list[str]:
    """The main results in sentences. A difference is called one if its 95 % interval excludes zero."""
    name, names, sentences = subject(report), intact_names(report), []
    for group in report["groups"]:
        for other in names:
            if other != name:
                result = compared(report, group, name, other)
                sentences.append(f"{name} compared with {other}{of_group(group)}: {_verdict(result)}")
                # Bins by the length of the first model's answers are biased in comparisons with it.
                if report["lengths_of"][group] == "reference" or names[0] not in (name, other):
                    sentences += _length_finding(result["by_length"], name, other, group)
        for entry, kind in ablations_of(report, name).items():
            result = compared(report, group, entry, name)
            what = EFFECT[kind].format(name=name, layer=entry.rpartition(" ")[2])
            sentences.append(f"{what}{of_group(group)}: {_verdict(result)}")
    return sentences


def _verdict(entry: dict[str, Any]) -> str:
    verdict = _direction(entry["answers"], "answers")
    return f"{verdict}; for pieces {_direction(entry['pieces'], 'pieces')}" if entry["pieces"] else verdict


def _direction(result: dict[str, Any], what: str) -> str:
    low, high = result["interval"]
    if result["rows"] < FEW_ROWS:
        return f"{difference(result)} points on {_plural(result['rows'], 'question')}, too few for a conclusion"
    if low == high != 0:
        return f"{100 * low:+.1f} points, the same on each of {_plural(result['rows'], 'question')}"
    if low > 0:
        sign = "better by"
    elif high < 0:
        sign = "worse by"
    else:
        n = f"{result['n']:,} {what}" + (f" of {result['rows']:,} answers" if what == "pieces" else "")
        return f"no significant difference on {n}, {difference(result)} points"
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
    return [f"{name} compared with {other}, by length{of_group(group)}: {shortest}, {longest}"]


def markdown_report(report: dict[str, Any], pictures: dict[str, str]) -> str:
    """
    The text of report.md.

    Args:
        report (`dict`): the content of report.json.
        pictures (`dict`): file names by content, as returned by [`draw_all`].
    """
    arguments, names = report["arguments"], intact_names(report)

    def picture(what: str, alt: str) -> list[str]:
        return [f"![{alt}]({quote(pictures[what])})"] if what in pictures else []

    parts = [
        f"# {', '.join(names)} on {report['dataset']['name']}",
        f"{'Each model answered the same' if len(names) > 1 else 'The model answered'} "
        f"{_plural(report['rows'], 'question')} (split `{arguments['dataset_split']}`) with greedy decoding."
        f"{_runs(report)}",
        "## Verdict",
        "\n".join(
            f"{k}. **{sentence.claim}**: {sentence.evidence}." for k, sentence in enumerate(conclusions(report), 1)
        ),
        reading(report),
        "## Correct answers",
        *picture("accuracy", "Accuracy by distance and by depth"),
        overall_table(report).markdown(),
        *([runs_table(report).markdown()] if runs_table(report) else []),
    ]
    if found := findings(report):
        parts += ["## Comparisons", "Differences in percentage points of correct answers, with 95 % intervals:"]
        parts += [_bullets(found)]
    distances, depths, lengths = (
        list(group_tables(report, make)) for make in (distance_table, depth_table, length_table)
    )
    parts += [
        "## Limits",
        _bullets(cautions(report)),
        "## How to read this",
        reading_guide(report, bool(distances), bool(depths), bool(lengths)),
        *([_bullets(remarks(report))] if remarks(report) else []),
    ]
    for heading, tables in (("By distance", distances), ("By depth", depths), ("By length", lengths)):
        if tables:
            parts.append(f"## {heading}")
        if heading == "By length":
            parts += picture("lengths", "Accuracy by length")
        for table in tables:
            parts += [f"**{table.title}**", table.markdown()]
    parts += _differences(report)
    parts += _ablations(report, picture("ablations", "Effect of each ablation"))
    parts += _inside(report, pictures)
    parts += ["## Checkpoints", checkpoint_guide(report), _bullets(checkpoint_lines(report))]
    parts += [
        "## How it was measured",
        _bullets(
            [
                f"{m['label']}: `{m['path']}`{at_commit(m)}, {m['dtype']}, answered in "
                + ("several runs (interrupted)" if m["seconds"] is None else f"{m['seconds']:.0f} s")
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
    """The commit of a Hub name, as part of a sentence."""
    return f" at {model['commit']}" if model["commit"] else ""


def _runs(report: dict[str, Any]) -> str:
    counts = {name: result["runs"] for name, result in report["overall"].items() if "runs" in result}
    counts = {name: runs for name, runs in counts.items() if name in intact_names(report)}
    if not counts:
        return ""
    return (
        " The runs of a method are reported together: "
        + ", ".join(f"{runs} of {name}" for name, runs in counts.items())
        + "."
    )


def cautions(report: dict[str, Any]) -> list[str]:
    """What must not be concluded from this report."""
    names = intact_names(report)
    single = [name for name in names if "runs" not in report["overall"][name]]
    trained = [name for name in single if any(m["name"] == name and m["step"] for m in report["models"])]
    counts = [result["runs"] for name, result in report["overall"].items() if name in names and "runs" in result]
    without = sum(scores[names[0]]["by_distance"]["without_image"]["n"] for scores in report["groups"].values())
    sentences = ["This is one data set; others may give other results."]
    if trained:
        sentences.append(
            f"{', '.join(trained)}: one training each. The intervals cover the choice of questions, not the "
            "difference between training runs, which may be larger."
        )
    if counts:
        sentences.append(
            f"There are few runs (down to {min(counts)}), so intervals that resample runs are too narrow: they "
            "contain the true value less often than in 95 % of cases."
        )
    if without:
        sentences.append(
            f"{without:,} of {report['rows']:,} questions have no image. They are included in all numbers, and "
            "ablations of images do not affect them."
        )
    if any(report["comparisons"].values()):
        sentences.append(
            "Many differences are reported, each with a 95 % interval. Without any true difference, one in twenty "
            "excludes zero by chance."
        )
        sentences.append(
            "An interval that includes zero does not prove that there is no difference; consider its width."
        )
    if report["diagnostics"]:
        rows = next(iter(report["diagnostics"].values()))["rows"]
        sentences.append(
            f"The diagnostics come from {rows} rows and the first run of each model. Attention to the image does not "
            "mean that the answer depends on it: ablations show that, heat maps do not."
        )
    if not any(ablations_of(report, name) for name in names):
        sentences.append("Without ablations (`--ablations`) nothing shows what the answers depend on.")
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


def _ablations(report: dict[str, Any], picture: list[str]) -> list[str]:
    kinds = [kind for kind in ABLATIONS if kind in {model["ablation"] for model in report["models"]}]
    if not kinds:
        return []
    parts = [
        "## Ablations",
        "The same checkpoint answers the same questions with something removed. A loss means that answers depended on "
        "it, at least in part; no loss means that they had another source as well, or were guessed (`blind` shows how "
        "far guessing gets). A loss may also come from the disturbance itself, which the model has not been trained "
        "with.",
        _bullets([f"**{kind.replace('_', ' ')}**: {ABLATIONS[kind]}." for kind in kinds]),
    ]
    if set(kinds) & set(IN_TWO_PARTS):
        parts.append(
            f"In {', '.join(f'`{kind}`' for kind in IN_TWO_PARTS)} only the text after the last image is affected. If "
            "a question has several images, the text between them has attended to the first ones and passes on what "
            "it saw."
        )
    parts += picture
    for table in ablation_tables(report):
        parts += [f"**{table.title}**", table.markdown()]
    return parts


def _inside(report: dict[str, Any], pictures: dict[str, str]) -> list[str]:
    """Attention, logit lens and branches."""
    if not report["diagnostics"]:
        return []
    rows, first = next(iter(report["diagnostics"].values()))["rows"], intact_names(report)[0]
    parts = [
        "## Diagnostics",
        f"On {_plural(rows, 'question')} all models were made to write the same text, {first}'s answer, and were "
        "inspected wherever they predict one of its tokens. Shaded: 95 % intervals, from resampling these rows.",
        "### Self-attention to the image",
        "The share of a text token's self-attention that goes to visual tokens, a mean over heads and layers: left, "
        f"by position in answers of at least {LONG_TEXT} tokens; middle, by the number of text tokens per visual "
        "token; right, by layer. Dotted in the middle: equal attention to all tokens.",
    ]
    if "attention" in pictures:
        parts.append(f"![Share of self-attention on the image]({quote(pictures['attention'])})")
    if table := attention_table(report):
        parts += [
            "The paper bounds the share by a curve that falls like 1/t. The dashed lines in the middle are fits of "
            "`share = 1 / (1 + (x / half)^exponent)`, which is that curve if the **exponent** is 1; a smaller "
            "exponent is a slower decay. **Half at**: the text tokens per visual token at which half of the attention "
            "is on the image, if it is in the observed range. If R² is far below 1, the fit does not describe "
            "the data.",
            table.markdown(),
        ]
    if "lens" in pictures:
        parts += [
            "### Where the prediction is made",
            "The distance (KL divergence, in nats) from the final prediction to that of the logit lens, the model's "
            "own last norm and head applied to the stream after each layer. In early layers the stream is not in the "
            "form that the head expects, and a large value means only that.",
            f"![KL divergence by layer]({quote(pictures['lens'])})",
        ]
    if table := branch_table(report):
        parts += [
            "### What branches add",
            "Root mean squares of what a branch and the FFN add to the residual stream at a text token, and of the "
            "stream itself. The output of a branch is normalised before it is multiplied by the gate, so its size is "
            "that of the gate, whether or not the branch attends to the image.",
            table.markdown(),
        ]
        if "branches" in pictures:
            parts.append(f"![Size of what branches add]({quote(pictures['branches'])})")
    maps = {what.removeprefix("heat "): file for what, file in pictures.items() if what.startswith("heat ")}
    if maps:
        parts += [
            "### Attention over the image",
            "For some tokens, when they are predicted: the attention of each branch over the image, and that of "
            "self-attention (a mean over layers), each with sum 1. Every map has its own scale; the number above it "
            "is the largest share. Left of the image is the end of the question.",
        ]
        parts += [f"![Attention over the image of {name}]({quote(file)})" for name, file in maps.items()]
    return parts


def _bullets(lines: list[str]) -> str:
    return "\n".join("- " + LIST_NUMBER.sub(r"\1\\\2", line) for line in lines)


def reading_guide(report: dict[str, Any], has_distances: bool, has_depths: bool, has_lengths: bool) -> str:
    """A paragraph for each kind of number in the report."""
    first = intact_names(report)[0]
    parts = [
        f"**Correct**: {CORRECT[report['arguments']['match']]}. Entries are the share of correct answers among n, "
        "with a 95% confidence interval in brackets (Wilson's; for several runs of a method, their mean and a "
        "bootstrap interval over questions and runs)."
    ]
    if has_lengths:
        parts.append(
            "**Length** is the number of tokens of the reference answer, in quartiles of the same questions for all "
            "models. Long answers with several pieces are harder for any model: compare models within a row."
        )
        varying = [group for group, scores in report["groups"].items() if len(scores[first]["by_length"]["bins"]) > 1]
        if by_answer := [group for group in varying if report["lengths_of"][group] == "answer"]:
            where = "" if by_answer == ["all"] else f" ({', '.join(by_answer)})"
            parts.append(
                f"Where all references have about the same length{where}, it is the number of tokens of {first}'s "
                f"answer. That may depend on whether {first} is correct, so {first} looks too good in some rows and "
                "too bad in others: there, compare the other models with each other, not with it."
            )
    if has_distances:
        parts.append(
            "**Distance** is the number of tokens between the last visual token and the first token of the answer."
        )
    if has_depths:
        pattern = report["arguments"]["scored_pattern"]
        parts.append(
            "**Depth** is the number of tokens of the reference before a scored piece. Pieces are the matches of "
            f"`{pattern}`; the k-th of the answer must be the same text as the k-th of the reference. Only references "
            "with several pieces are included, and n counts pieces."
        )
        spans = [
            span
            for group in report["groups"].values()
            for scores in group.values()
            for span in scores["by_depth"]["bins"]
        ]
        if any(span["low"] != span["high"] for span in spans):
            parts.append(
                "Here a row of that table combines several pieces of one answer. These are not independent of each "
                "other, so the intervals are too narrow."
            )
    return "\n\n".join(parts)


def difference_guide(first: str) -> str:
    """How to read the differences from `first`."""
    return (
        f"Percentage points by which a model is better (+) or worse (-) than {first} on the same rows, with a 95% "
        "interval from a paired bootstrap over rows and, if there are several, runs. The interval has no width where "
        "the difference is the same on every row."
    )


def checkpoint_guide(report: dict[str, Any]) -> str:
    """How to read [`checkpoint_lines`]."""
    guide = "The class that was evaluated, and what the checkpoint records about its training."
    if any(model["gates"] for model in report["models"]):
        guide += " The output of a branch is multiplied by the gate of its layer; at 0 the branch has no effect."
    return guide
