"""
What eval.py counts: right answers, by the distance of the image and by the depth in the answer.

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

from pvm.evaluation.matching import MATCHES, normalise


Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
BOOTSTRAP_SAMPLES = 2000

# Distances of a made test set lie in narrow clusters (N tokens of filler and a few more or less of question) and get a
# bin each; those of found data spread, and get powers of two.
CLUSTER_GAP, CLUSTER_WIDTH, MAX_CLUSTERS = 8, 16, 12
MAX_DEPTHS, DEPTH_BINS = 20, 10


def score_pieces(prediction: str, reference: str, pattern: str) -> list[bool]:
    """
    For each match of the regular expression `pattern` in `reference`, whether the match of the same number in
    `prediction` is the same text after [`normalise`]. A missing one is wrong; superfluous ones do not count.
    """
    found, wanted = (
        [normalise(piece.group()) for piece in re.finditer(pattern, text)] for text in (prediction, reference)
    )
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


def proportion(outcomes: Sequence[bool] | Sequence[Sequence[bool]]) -> dict[str, Any]:
    """
    `outcomes` `[questions]` or `[runs, questions]` as a result; of none, accuracy and interval are `None`. Of several
    runs, `accuracy` is the mean, `by_run` has each, and `interval` holds 95 % of the means over 2,000 resamples of
    questions and runs.
    """
    table = np.atleast_2d(np.asarray(outcomes, dtype=float))
    runs, n = table.shape
    result: dict[str, Any] = {"n": n, "correct": int(table.sum()), "accuracy": None, "interval": None}
    if n == 0:
        return result
    result["accuracy"] = float(table.mean())
    if runs == 1:
        return {**result, "interval": list(wilson_interval(result["correct"], n))}
    if table.min() == table.max():  # resamples of equal outcomes would say that nothing is uncertain
        interval = list(wilson_interval(int(table.max()) * n, n))
        return {**result, "interval": interval, "runs": runs, "by_run": table.mean(axis=1).tolist()}
    means = _resampled_means(table, np.ones(n), draws(runs, stream=1))
    return {**result, "interval": _central_95(means), "runs": runs, "by_run": table.mean(axis=1).tolist()}


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """`n` values' `mean` and the `interval` of 95 % of the means of 2,000 resamples of them."""
    column = np.asarray(values, dtype=float)
    means = draws(len(column), stream=0) @ column / len(column)
    return {"n": len(column), "mean": float(column.mean()), "interval": _central_95(means)}


def paired_difference(
    first: Sequence[Sequence[Sequence[bool]]], second: Sequence[Sequence[Sequence[bool]]], same_runs: bool = False
) -> dict[str, Any]:
    """
    How much more often the second model is right than the first on the same questions.

    Args:
        first, second (`Sequence` `[runs][rows][pieces]`): the outcomes of each row, one or several, in the same order.
            What belongs to one row is resampled together.
        same_runs (`bool`): the k-th runs of the two are the same checkpoint, and are resampled together, too.

    Returns:
        `dict`: `n` outcomes of each run in `rows` rows, the `difference` of their accuracies, and the `interval` that
        holds 95 % of the differences over 2,000 resamples (always the same ones) of the rows and, where there are
        several, the runs.

    Raises:
        ValueError: if the rows do not pair up.
    """
    sizes = [[len(row) for row in run] for run in [*first, *second]]
    if any(run != sizes[0] for run in sizes) or sum(sizes[0]) == 0:
        raise ValueError("The two models must have outcomes of the same rows, at least one.")
    before, after = (np.array([[sum(row) for row in run] for run in runs], dtype=float) for runs in (first, second))
    counts = np.array(sizes[0], dtype=float)
    first_draws = draws(len(before), stream=1)
    second_draws = first_draws if same_runs else draws(len(after), stream=2)
    differences = _resampled_means(after, counts, second_draws) - _resampled_means(before, counts, first_draws)
    return {
        "n": int(counts.sum()),
        "rows": int((counts > 0).sum()),
        "difference": float((after.mean(axis=0) - before.mean(axis=0)).sum() / counts.sum()),
        "interval": _central_95(differences),
    }


@functools.lru_cache(maxsize=8)
def draws(n: int, stream: int) -> np.ndarray:
    """How often each of `n` things is drawn in each resample: `[BOOTSTRAP_SAMPLES, n]` uint8, always the same."""
    rng = np.random.default_rng([stream, n])
    return np.array(
        [np.bincount(rng.integers(n, size=n), minlength=n).astype(np.uint8) for _ in range(BOOTSTRAP_SAMPLES)]
    )


def _resampled_means(correct: np.ndarray, sizes: np.ndarray, run_draws: np.ndarray) -> np.ndarray:
    """Accuracies over resamples of the rows and runs; `correct` `[runs, rows]` pieces of `sizes` `[rows]` each."""
    means = []
    row_draws = draws(len(sizes), stream=0)
    for start in range(0, BOOTSTRAP_SAMPLES, 100):  # of floats, all at once would be large
        rows, runs = (drawn[start : start + 100].astype(float) for drawn in (row_draws, run_draws))
        totals = np.maximum(rows @ sizes, 1) * runs.sum(axis=1)
        means.append((rows @ correct.T * runs).sum(axis=1) / totals)
    return np.concatenate(means)


def _central_95(values: np.ndarray) -> list[float]:
    return np.quantile(values, [0.025, 0.975]).tolist()


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


def quartile_bins(values: Sequence[int]) -> list[tuple[int, int]]:
    """Bins, both ends included, of about a quarter of the values each; fewer where many values are equal."""
    cuts = sorted({int(cut) for cut in np.quantile(values, [0.25, 0.5, 0.75, 1], method="inverted_cdf")})
    lows = [min(values), *(cut + 1 for cut in cuts[:-1])]
    return list(zip(lows, cuts))


def by_bin(
    values: Sequence[int], outcomes: np.ndarray, make_bins: Callable[[Sequence[int]], list[tuple[int, int]]]
) -> list[dict[str, Any]]:
    """
    A result for each bin of `values` `[n]` that holds any, of `outcomes` `[runs, n]`; `mean` is that of its values.
    """
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
    return np.array([MATCHES[match](*pair) for pair in zip(predictions, references)], dtype=bool).reshape(runs, -1)


class Accuracy(evaluate.Metric):
    """
    How many answers are right. `match` says when one is: "exact", "choice", "number" or "math"; see answers.py. With
    `runs`, the predictions are those of several models to the same questions, one model's after the other's.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of answers that are the reference's text, option, number or mathematical object.")

    def _compute(
        self, predictions: list[str], references: list[str], match: str = "exact", runs: int = 1
    ) -> dict[str, Any]:
        return proportion(_outcomes(predictions, references, match, runs))


class AccuracyByDistance(evaluate.Metric):
    """
    Right answers by `distances`, the number of tokens between the last visual token and the answer; `None` for a row
    without any image. The result has `bins`, and `without_image` for those rows. `match` and `runs` as in
    [`Accuracy`].
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
    Right answers in each quartile of `lengths`, numbers of tokens; the same for all models that are compared. The
    result has `bins`. `match` and `runs` as in [`Accuracy`].
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Right answers by quartiles of length; lengths: tokens.", lengths=datasets.Value("int64"))

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
    Pieces of long answers that are right, by `depths`: for each row the token offsets, in the reference answer, of
    the matches of `scored_pattern`. Answers of a single piece have no depth and do not count. The result has `bins`,
    `all` pieces together, and the number of `answers` that count. `runs` as in [`Accuracy`].
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Right pieces of answers by depth; depths: for each reference the token offsets of its pieces.",
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
