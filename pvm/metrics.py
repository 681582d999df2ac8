"""
What eval.py counts: right answers, by the distance of the image and by the depth in the answer.

The metrics are `evaluate.Metric`s that need no network. A result is a proportion: `{"n", "correct", "accuracy",
"interval"}`, where `interval` is Wilson's 95 % interval; a bin of an axis adds `low`, `high` (both included), `mean`.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from .answers import MATCHES


Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
BOOTSTRAP_SAMPLES = 2000

# Distances of a made test set lie in narrow clusters (N tokens of filler and a few more or less of question) and get a
# bin each; those of found data spread, and get powers of two.
CLUSTER_GAP, CLUSTER_WIDTH, MAX_CLUSTERS = 8, 16, 12
MAX_DEPTHS, DEPTH_BINS = 20, 10


def score_pieces(prediction: str, reference: str, pattern: str) -> list[bool]:
    """
    For each match of the regular expression `pattern` in `reference`, whether the match of the same number in
    `prediction` is the same text, whatever its case. A missing one is wrong; superfluous ones do not count.
    """
    found = [match.group().casefold() for match in re.finditer(pattern, prediction)]
    wanted = [match.group().casefold() for match in re.finditer(pattern, reference)]
    return [k < len(found) and found[k] == piece for k, piece in enumerate(wanted)]


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """
    Wilson's 95 % interval of a proportion; unlike the normal one it stays in [0, 1] and has a width at 0 and 1.

    Raises:
        ValueError: if `n` is 0 or `correct` is not between 0 and `n`.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} of {n} is no proportion.")
    share, shift = correct / n, Z_95**2 / n
    centre = share + shift / 2
    spread = Z_95 * math.sqrt(share * (1 - share) / n + shift / (4 * n))
    return max(0.0, (centre - spread) / (1 + shift)), min(1.0, (centre + spread) / (1 + shift))


def proportion(outcomes: Sequence[bool]) -> dict[str, Any]:
    """`outcomes` as a result; of none, accuracy and interval are `None`."""
    n, correct = len(outcomes), sum(outcomes)
    if n == 0:
        return {"n": 0, "correct": 0, "accuracy": None, "interval": None}
    return {"n": n, "correct": correct, "accuracy": correct / n, "interval": list(wilson_interval(correct, n))}


def paired_difference(first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """
    How much more often the second model is right than the first on the same questions.

    Args:
        first, second (`Sequence[Sequence[bool]]`): the outcomes of each row, one or several, in the same order. What
            belongs to one row is resampled together.

    Returns:
        `dict`: `n` outcomes of each model, the `difference` of their accuracies, and the `interval` that holds 95 % of
        the differences over 2,000 resamples of the rows (always the same ones).

    Raises:
        ValueError: if the rows do not pair up.
    """
    sizes = np.array([len(row) for row in first])
    if sizes.tolist() != [len(row) for row in second] or sizes.sum() == 0:
        raise ValueError("The two models must have outcomes of the same rows, at least one.")
    gains = np.array([sum(b) - sum(a) for a, b in zip(first, second)])
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(BOOTSTRAP_SAMPLES):
        rows = rng.integers(len(sizes), size=len(sizes))
        differences.append(gains[rows].sum() / max(sizes[rows].sum(), 1))
    low, high = np.quantile(differences, [0.025, 0.975])
    return {
        "n": int(sizes.sum()),
        "difference": float(gains.sum() / sizes.sum()),
        "interval": [float(low), float(high)],
    }


def distance_bins(distances: Sequence[int]) -> list[tuple[int, int]]:
    """Bins, both ends included: one for each cluster if they are few and narrow, else powers of two."""
    clusters: list[tuple[int, int]] = []
    for value in sorted(set(distances)):
        if clusters and value - clusters[-1][1] <= CLUSTER_GAP:
            clusters[-1] = (clusters[-1][0], value)
        else:
            clusters.append((value, value))
    if len(clusters) <= MAX_CLUSTERS and all(high - low <= CLUSTER_WIDTH for low, high in clusters):
        return clusters
    exponents = sorted({value.bit_length() for value in distances})
    return [(2**exponent // 2, 2**exponent - 1) for exponent in exponents]


def depth_bins(depths: Sequence[int]) -> list[tuple[int, int]]:
    """Bins, both ends included: one for each depth if they are at most 20, else 10 of equal width."""
    values = sorted(set(depths))
    if len(values) <= MAX_DEPTHS:
        return [(value, value) for value in values]
    width = math.ceil((values[-1] - values[0] + 1) / DEPTH_BINS)
    starts = range(values[0], values[-1] + 1, width)
    return [(start, start + width - 1) for start in starts]


def by_bin(
    values: Sequence[int], outcomes: Sequence[bool], make_bins: Callable[[Sequence[int]], list[tuple[int, int]]]
) -> list[dict[str, Any]]:
    """A result for each bin of `values` that holds any; `mean` is that of its values."""
    results = []
    for low, high in make_bins(values):
        inside = [(value, outcome) for value, outcome in zip(values, outcomes) if low <= value <= high]
        if inside:
            mean = sum(value for value, _ in inside) / len(inside)
            results.append({"low": low, "high": high, "mean": mean, **proportion([outcome for _, outcome in inside])})
    return results


def _info(description: str, **features: Any) -> evaluate.MetricInfo:
    texts = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=f"predictions, references: texts. {description}",
        features=datasets.Features({**texts, **features}),
    )


class Accuracy(evaluate.Metric):
    """How many answers are right. `match` says when one is: "exact", "choice", "number" or "math"; see answers.py."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of answers that are the reference's text, option, number or mathematical object.")

    def _compute(self, predictions: list[str], references: list[str], match: str = "exact") -> dict[str, Any]:
        return proportion([MATCHES[match](*pair) for pair in zip(predictions, references)])


class AccuracyByDistance(evaluate.Metric):
    """
    Right answers by `distances`, the number of tokens between the last visual token and the answer; `None` for a row
    without any image. The result has `bins`, and `without_image` for those rows. `match` is as in [`Accuracy`].
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Right answers by distance; distances: tokens from image to answer, or None.",
            distances=datasets.Value("int64"),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        distances: list[int | None],
        match: str = "exact",
    ) -> dict[str, Any]:
        outcomes = [MATCHES[match](*pair) for pair in zip(predictions, references)]
        seen = [k for k, distance in enumerate(distances) if distance is not None]
        return {
            "bins": by_bin([distances[k] for k in seen], [outcomes[k] for k in seen], distance_bins),
            "without_image": proportion([outcomes[k] for k, distance in enumerate(distances) if distance is None]),
        }


class AccuracyByDepth(evaluate.Metric):
    """
    Pieces of long answers that are right, by `depths`: for each row the token offsets, in the reference answer, of
    the matches of `scored_pattern`. Answers of a single piece have no depth and do not count. The result has `bins`,
    `all` pieces together, and the number of `answers` that count.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Right pieces of answers by depth; depths: for each reference the token offsets of its pieces.",
            depths=datasets.Sequence(datasets.Value("int64")),
        )

    def _compute(
        self, predictions: list[str], references: list[str], depths: list[list[int]], scored_pattern: str
    ) -> dict[str, Any]:
        long = [k for k, offsets in enumerate(depths) if len(offsets) > 1]
        offsets = [offset for k in long for offset in depths[k]]
        outcomes = [piece for k in long for piece in score_pieces(predictions[k], references[k], scored_pattern)]
        return {"bins": by_bin(offsets, outcomes, depth_bins), "all": proportion(outcomes), "answers": len(long)}
