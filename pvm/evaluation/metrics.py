"""
Accuracy: overall, by distance from the image, by length of the answer, and by depth in the answer.

The metrics are `evaluate.Metric`s that need no network. A result is a proportion: `{"n", "correct", "accuracy",
"interval"}`, where `interval` is Wilson's 95 % interval; a bin of an axis adds `low`, `high` (both included), `mean`.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from pvm.evaluation.bootstrap import FIRST_RUNS, central_95, counts, resampled_accuracies
from pvm.evaluation.matching import Verdict, judge, normalise


Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval

# Distances of a synthetic test set lie in narrow clusters (the same filler, questions of slightly different length),
# which get a bin each. Other distances are binned by powers of two.
CLUSTER_GAP, CLUSTER_WIDTH, MAX_CLUSTERS = 8, 16, 12
MAX_DEPTHS, DEPTH_BINS = 20, 10


verdict = functools.cache(judge)  # several metrics judge the same answers


def score_pieces(prediction: str, reference: str, pattern: str) -> list[bool]:
    """
    For the k-th match of the regular expression `pattern` in `reference`, whether the k-th in `prediction` is the same
    text after [`normalise`]. A missing one is wrong; additional ones are ignored.
    """
    found, wanted = (
        [normalise(piece.group()) for piece in re.finditer(pattern, text)] for text in (prediction, reference)
    )
    return [k < len(found) and found[k] == piece for k, piece in enumerate(wanted)]


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """
    Wilson's 95 % interval of a proportion. Unlike the normal approximation it stays within [0, 1] and has a width at 0
    and 1.

    Raises:
        ValueError: if `n` is 0 or `correct` is not between 0 and `n`.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} of {n} is not a proportion.")
    share, shift = correct / n, Z_95**2 / n
    centre = share + shift / 2
    spread = Z_95 * math.sqrt(share * (1 - share) / n + shift / (4 * n))
    return max(0.0, (centre - spread) / (1 + shift)), min(1.0, (centre + spread) / (1 + shift))


def proportion(outcomes: Sequence[bool] | Sequence[Sequence[bool]]) -> dict[str, Any]:
    """
    The result for `outcomes` `[questions]` or `[runs, questions]`; accuracy and interval are `None` if there are none.
    For several runs, `accuracy` is the mean, `by_run` has each, and `interval` is a bootstrap over questions and runs.
    """
    table = np.atleast_2d(np.asarray(outcomes, dtype=float))
    runs, n = table.shape
    result: dict[str, Any] = {"n": n, "correct": int(table.sum()), "accuracy": None, "interval": None}
    if n == 0:
        return result
    result["accuracy"] = float(table.mean())
    if runs == 1:
        return {**result, "interval": list(wilson_interval(result["correct"], n))}
    if table.min() == table.max():  # all resamples are equal, as if nothing were uncertain
        interval = list(wilson_interval(int(table.max()) * n, n))
    else:
        interval = central_95(resampled_accuracies(table, np.ones(n), counts(runs, FIRST_RUNS)))
    return {**result, "interval": interval, "runs": runs, "by_run": table.mean(axis=1).tolist()}


def distance_bins(distances: Sequence[int]) -> list[tuple[int, int]]:
    """Bins, both ends included: one per cluster if they are few and narrow, else powers of two."""
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
    """Bins, both ends included: one per depth if there are at most 20, else 10 of equal width."""
    values = sorted(set(depths))
    if len(values) <= MAX_DEPTHS:
        return [(value, value) for value in values]
    width = math.ceil((values[-1] - values[0] + 1) / DEPTH_BINS)
    starts = range(values[0], values[-1] + 1, width)
    return [(start, start + width - 1) for start in starts]


def quartile_bins(values: Sequence[int]) -> list[tuple[int, int]]:
    """Bins, both ends included, with about a quarter of the values each; fewer if many values are equal."""
    cuts = sorted({int(cut) for cut in np.quantile(values, [0.25, 0.5, 0.75, 1], method="inverted_cdf")})
    lows = [min(values), *(cut + 1 for cut in cuts[:-1])]
    return list(zip(lows, cuts))


def by_bin(
    values: Sequence[int], outcomes: np.ndarray, make_bins: Callable[[Sequence[int]], list[tuple[int, int]]]
) -> list[dict[str, Any]]:
    """A result for each non-empty bin of `values` `[n]`, from `outcomes` `[runs, n]`; `mean` is that of its values."""
    values = np.asarray(values)
    results = []
    for low, high in make_bins(values.tolist()) if len(values) else []:
        inside = (low <= values) & (values <= high)
        if inside.any():
            mean = float(values[inside].mean())
            results.append({"low": low, "high": high, "mean": mean, **proportion(outcomes[:, inside])})
    return results


def _info(description: str, **features: Any) -> evaluate.MetricInfo:
    texts = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=f"predictions, references: texts. {description}",
        features=datasets.Features({**texts, **features}),
    )


def _outcomes(predictions: list[str], references: list[str], match: str, runs: int) -> np.ndarray:
    verdicts = [verdict(match, *pair) for pair in zip(predictions, references)]
    return np.array([found is Verdict.CORRECT for found in verdicts], dtype=bool).reshape(runs, -1)


class Accuracy(evaluate.Metric):
    """
    Correct answers. `match` is the rule: "exact", "choice", "number" or "math", see matching.py. With `runs`, the
    predictions are those of several models for the same questions, one model after the other.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of answers that match the reference's text, option, number or mathematical object.")

    def _compute(
        self, predictions: list[str], references: list[str], match: str = "exact", runs: int = 1
    ) -> dict[str, Any]:
        return proportion(_outcomes(predictions, references, match, runs))


class AccuracyByDistance(evaluate.Metric):
    """
    Correct answers by `distances`, the number of tokens between the last visual token and the answer; `None` for a row
    without an image. The result has `bins`, and `without_image` for those rows. `match` and `runs` as in [`Accuracy`].
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Correct answers by distance; distances: tokens from image to answer, or None.",
            distances=datasets.Value("int64"),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        distances: list[int | None],
        match: str = "exact",
        runs: int = 1,
    ) -> dict[str, Any]:
        outcomes = _outcomes(predictions, references, match, runs)
        distances = distances[: outcomes.shape[1]]
        seen = np.array([distance is not None for distance in distances], dtype=bool)
        values = [distance for distance in distances if distance is not None]
        return {
            "bins": by_bin(values, outcomes[:, seen], distance_bins),
            "without_image": proportion(outcomes[:, ~seen]),
        }


class AccuracyByLength(evaluate.Metric):
    """
    Correct answers by quartile of `lengths` in tokens, which must be the same for all models that are compared. The
    result has `bins`. `match` and `runs` as in [`Accuracy`].
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Correct answers by quartile of length; lengths: tokens.", lengths=datasets.Value("int64"))

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        lengths: list[int],
        match: str = "exact",
        runs: int = 1,
    ) -> dict[str, Any]:
        outcomes = _outcomes(predictions, references, match, runs)
        return {"bins": by_bin(lengths[: outcomes.shape[1]], outcomes, quartile_bins)}


class AccuracyByDepth(evaluate.Metric):
    """
    Correct pieces of long answers by `depths`: for each row the token offsets, in the reference answer, of the matches
    of `scored_pattern`. Answers with a single piece are left out. The result has `bins`, `all` pieces together, and
    the number of `answers` that count. `runs` as in [`Accuracy`].
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Correct pieces by depth; depths: for each reference the token offsets of its pieces.",
            depths=datasets.Sequence(datasets.Value("int64")),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        depths: list[list[int]],
        scored_pattern: str,
        runs: int = 1,
    ) -> dict[str, Any]:
        long = [k for k, offsets in enumerate(depths) if len(offsets) > 1]
        pieces = [piece for k in long for piece in score_pieces(predictions[k], references[k], scored_pattern)]
        outcomes = np.array(pieces, dtype=bool).reshape(runs, -1)
        offsets = [offset for k in long for offset in depths[k]][: outcomes.shape[1]]
        return {
            "bins": by_bin(offsets, outcomes, depth_bins),
            "all": proportion(outcomes),
            "answers": len(long) // runs,
        }
