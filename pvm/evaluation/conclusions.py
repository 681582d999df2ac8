"""
The verdict that a report opens with: three sentences for a reader who has not read the paper.

Is the method better than its base, and than the best of the other models? Do its answers depend on what its branches
see? What does more text after the image do? Each claim follows from a difference by the rules of [`effect`].
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pvm.evaluation.tables import ablations_of, bin_label, cache_size, compared, difference, intact_names, subject
from variants_qwen3vl_pvm import BLOCKS


MARGIN = 0.03  # a difference that is certainly smaller is called none
# With fewer answers that changed, all in one direction, an exact sign test does not reach 5 %; a bootstrap would.
FEWEST_CHANGED = 6
FEWEST_IN_BIN = 20  # in a bin that is compared with another

COMPARED = {
    "better": "answers better than",
    "worse": "answers worse than",
    "same": "answers as well as",
    "unclear": "cannot be told apart from",
}
WITH_TEXT = {
    "better": "With more text after the image, {name} answers better",
    "worse": "With more text after the image, {name} answers worse",
    "same": "More text after the image does not change how well {name} answers",
    "unclear": "Whether more text after the image changes how well {name} answers cannot be told",
}
# Of ablations, the first that was run is what the second sentence is about.
OF_BRANCHES_SIGHT = {"another_memory": "with another question's image in them"}
OF_THE_IMAGE = {
    "another_image": "with another question's image",
    "blank_image": "with a gray image",
    "blind": "with the image hidden",
}
WITH_BRANCHES_ALONE = {
    "skip": "with the image only in them",
    "hidden_image": "with the image hidden from all but them",
    "evict": "with the image out of the KV cache after the prompt",
}


@dataclass
class Sentence:
    """What is claimed, and the numbers that it follows from."""

    claim: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.claim}: {self.evidence}."


def effect(result: dict[str, Any]) -> str:
    """
    What a difference shows: "better" or "worse" if its 95 % interval excludes zero and at least `FEWEST_CHANGED`
    answers changed; "same" if the interval is within `MARGIN` of zero and, for 95 % certainty where no answer changed,
    comes from `3 / MARGIN` rows; else "unclear".
    """
    low, high = result["interval"]
    if (low > 0 or high < 0) and round(abs(result["difference"]) * result["rows"], 6) >= FEWEST_CHANGED:
        return "better" if low > 0 else "worse"
    if -MARGIN <= low and high <= MARGIN and result["rows"] * MARGIN >= 3:
        return "same"
    return "unclear"


def change(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """
    The difference of two accuracies on different rows, with the interval that follows from theirs (Newcombe 1998,
    method 10).
    """
    (low, high), (floor, ceiling) = first["interval"], second["interval"]
    difference = second["accuracy"] - first["accuracy"]
    down = math.hypot(second["accuracy"] - floor, high - first["accuracy"])
    up = math.hypot(ceiling - second["accuracy"], first["accuracy"] - low)
    interval = [difference - down, difference + up]
    return {"rows": min(first["n"], second["n"]), "difference": difference, "interval": interval}


def conclusions(report: dict[str, Any]) -> list[Sentence]:
    """The three sentences, about the model that the report is about."""
    name = subject(report)
    return [_compared_with_others(report, name), _use_of_the_image(report, name), _more_text(report, name)]


def reading(report: dict[str, Any]) -> str:
    """How to read the three sentences, in small print."""
    name, result = subject(report), report["overall"][subject(report)]
    runs = f"Means of {result['runs']} trainings of {name}" if "runs" in result else f"One training of {name}"
    parts = [
        "In brackets: differences in percentage points of right answers, with 95 % intervals. Better and worse: the "
        f"interval excludes zero, and at least {FEWEST_CHANGED} answers changed. As well: it lies within "
        f"±{100 * MARGIN:.0f} points."
    ]
    if any(model["name"] == name and model["step"] for model in report["models"]):
        parts.append(f"{runs}{'' if 'runs' in result else '; another might do better or worse'}.")
    if _reads_image(report, name):
        parts.append("Branches are what PVM adds to a model to look at the image while it writes.")
    return " ".join(parts)


def base_of(report: dict[str, Any]) -> str | None:
    """The first model, besides the one that the report is about, that was not trained here."""
    names = [
        model["name"]
        for model in report["models"]
        if model["ablation"] == "none" and not (model["method"] or model["step"] or model["block"])
    ]
    return next((name for name in names if name != subject(report)), None)


def best_other(report: dict[str, Any]) -> str | None:
    """
    The best of all models besides the one that the report is about and its base; of those without branches that read
    the image, if there are any, as these are the controls.
    """
    others = [name for name in intact_names(report) if name not in (subject(report), base_of(report))]
    controls = [name for name in others if not _reads_image(report, name)]
    return max(controls or others, key=lambda other: report["overall"][other]["accuracy"], default=None)


def _right(result: dict[str, Any]) -> str:
    return f"{result['accuracy']:.1%}"


def _compared_with_others(report: dict[str, Any], name: str) -> Sentence:
    base, other, overall = base_of(report), best_other(report), report["overall"]
    rivals = [rival for rival in (base, other) if rival is not None]
    parts = [f"{_right(overall[name])} of {overall[name]['n']:,} questions are right"]
    if not rivals:
        return Sentence(f"Whether {name} is better than another model was not measured", *parts)
    effects = {}
    for rival in rivals:
        result = compared(report, None, name, rival)["answers"]
        effects[rival] = effect(result)
        best = "the best control, " if rival == other and not _reads_image(report, other) else ""
        parts.append(f"{best}{rival} {_right(overall[rival])} ({difference(result)})")
        parts += _exceptions(report, name, rival)
    if base is None:
        parts.append("the base was not evaluated")
    elif other is None and effects[base] == "better" and _reads_image(report, name):
        parts.append("no other model was trained on the same data, so the data alone may explain it")
    if len(set(effects.values())) == 1:
        claims = f"{COMPARED[effects[rivals[0]]]} {' and '.join(rivals)}"
    else:
        claims = ", but ".join(f"{COMPARED[effects[rival]]} {rival}" for rival in rivals)
    return Sentence(f"{name} {claims}", "; ".join(parts))


def _exceptions(report: dict[str, Any], of: str, minus: str) -> list[str]:
    """The groups in which a difference is clear and another than on all rows."""
    overall = effect(compared(report, None, of, minus)["answers"])
    results = {group: compared(report, group, of, minus)["answers"] for group in report["groups"]}
    return [
        f"but in {group} {effect(result)}: {difference(result)}"
        for group, result in results.items()
        if effect(result) in ("better", "worse") and effect(result) != overall
    ]


def _reads_image(report: dict[str, Any], name: str) -> bool:
    (block, *_) = (model["block"] for model in report["models"] if model["name"] == name)
    return block is not None and BLOCKS[block].reads_image


def _use_of_the_image(report: dict[str, Any], name: str) -> Sentence:
    entries = {kind: entry for entry, kind in ablations_of(report, name).items()}
    reads, overall = _reads_image(report, name), report["overall"]
    what, ablations = ("what its branches see", OF_BRANCHES_SIGHT) if reads else ("the image", OF_THE_IMAGE)
    alone, needs = _with_branches_alone(report, name, entries) if reads else ([], "")
    for kind in (kind for kind in ablations if kind in entries):
        result = compared(report, None, entries[kind], name)["answers"]
        claim = {
            "worse": f"The answers of {name} depend on {what}{needs}",
            "same": f"The answers of {name} do not depend on {what}",
            "better": f"{name} answers better without {what}",
            "unclear": f"Whether the answers of {name} depend on {what} cannot be told",
        }[effect(result)]
        found = f"{ablations[kind]} {_right(overall[entries[kind]])} are right ({difference(result)})"
        return Sentence(claim, "; ".join([found, *_exceptions(report, entries[kind], name), *alone]))
    if reads and {"hidden_image", "blind"} <= entries.keys():
        blind, hidden = (overall[entries[kind]] for kind in ("blind", "hidden_image"))
        result = change(blind, hidden)
        claim = {
            "better": f"The branches of {name} see what it needs of the image",
            "unclear": f"Whether the branches of {name} see what it needs of the image cannot be told",
        }.get(effect(result), f"The branches of {name} alone do not see what it needs of the image")
        found = f"with the image hidden from all but them {_right(hidden)} are right, from them too {_right(blind)}"
        return Sentence(claim, f"{found} ({difference(result)})")
    measure = "another_memory hidden_image" if reads else "another_image"
    claim = f"Whether the answers of {name} depend on {what} was not measured"
    return Sentence(claim, "; ".join([f"`--ablations {measure}` does it", *alone]))


def _with_branches_alone(report: dict[str, Any], name: str, entries: dict[str, str]) -> tuple[list[str], str]:
    """What is found when only the branches see the image, if it was measured, and what that adds to the claim."""
    for kind, condition in WITH_BRANCHES_ALONE.items():
        if kind in entries:
            result = compared(report, None, entries[kind], name)["answers"]
            exceptions = _exceptions(report, entries[kind], name)
            size, whole = (cache_size(report, entry) for entry in (entries[kind], name))
            saved = f", with a cache of {size} instead of {whole}" if size != whole else ""
            found = f"{condition} {_right(report['overall'][entries[kind]])} ({difference(result)}){saved}"
            needs = {"same": ", and need nothing else of the image", "worse": ", but not on that alone"}
            known = kind != "evict" and not exceptions  # the question has seen an image that is evicted after it
            return [found, *exceptions], needs.get(effect(result).replace("better", "same"), "") if known else ""
    return [], ""


def _more_text(report: dict[str, Any], name: str) -> Sentence:
    other, groups = best_other(report) or base_of(report), report["groups"]

    def bins(axis: str, group: str, entry: str = name) -> list[dict[str, Any]]:
        return [span for span in groups[group][entry][axis]["bins"] if span["n"] >= FEWEST_IN_BIN]

    for axis, where, what in (
        ("by_distance", "tokens after it", "are right"),
        ("by_depth", "tokens into the answer", "of its pieces are right"),
    ):
        group = max(groups, key=lambda group: (len(bins(axis, group)) > 1, sum(b["n"] for b in bins(axis, group))))
        if len(bins(axis, group)) < 2:
            continue
        near, far = (bins(axis, group)[k] for k in (0, -1))
        fall = change(near, far)
        claim = WITH_TEXT[effect(fall)].format(name=name)
        places = f"{bin_label(near)} {where} {_right(near)} {what}, {bin_label(far)} {where} {_right(far)}"
        parts = [f"{'' if group == 'all' else f'in {group}, '}{places} ({difference(fall)})"]
        if other is not None:
            theirs = bins(axis, group, other)
            parts.append(f"{other} {_right(theirs[0])} and {_right(theirs[-1])}")
            if axis == "by_distance":
                spans = [span for span in compared(report, group, name, other)[axis] if span["n"] >= FEWEST_IN_BIN]
                effects = [effect(span) for span in spans]
                if effects[-1] in ("better", "worse"):
                    claim += f"; {bin_label(far)} tokens after it {name} is {effects[-1]} than {other}"
                at = [
                    f"{found} than {other} at {_places(spans, effects, found)}"
                    for found in ("better", "worse")
                    if found in effects
                ]
                parts.append(f"{name} is {' and '.join(at) or f'nowhere clearly better or worse than {other}'}")
        return Sentence(claim, "; ".join(parts))
    claim = f"What more text after the image does to {name} was not measured"
    return Sentence(claim, f"no two distances have {FEWEST_IN_BIN} answers each")


def _places(spans: Sequence[dict[str, Any]], effects: Sequence[str], wanted: str) -> str:
    """The bins with an effect: those next to each other as a range."""
    if all(found == wanted for found in effects):
        return "every distance"
    texts = []
    for found, pairs in itertools.groupby(zip(effects, spans), key=lambda pair: pair[0]):
        if found == wanted:
            places = [span for _, span in pairs]
            whole = {"low": places[0]["low"], "high": places[-1]["high"]}
            texts.append(bin_label(whole) if len(places) == 1 else f"{whole['low']:,} to {whole['high']:,}")
    return f"{', '.join(texts)} tokens"
