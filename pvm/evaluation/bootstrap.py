"""
The bootstrap behind the intervals of reports: rows (and runs) are drawn again with replacement, and the statistic is
computed for each of these resamples. All draws are seeded, so the same data gives the same interval.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


RESAMPLES = 2000
# Seeds of what is drawn independently of each other.
ROWS, FIRST_RUNS, SECOND_RUNS = range(3)


def resamples(n: int, number: int, seed: int | Sequence[int]) -> Iterator[np.ndarray]:
    """`number` times the indices `[n]` of a resample of `n` rows."""
    rng = np.random.default_rng(seed)
    return (rng.integers(n, size=n) for _ in range(number))


@functools.lru_cache(maxsize=8)
def counts(n: int, stream: int) -> np.ndarray:
    """How often each of `n` rows is drawn in each resample: `[RESAMPLES, n]` uint8."""
    drawn = resamples(n, RESAMPLES, [stream, n])
    return np.array([np.bincount(rows, minlength=n).astype(np.uint8) for rows in drawn])


def central_95(values: np.ndarray) -> list[float]:
    """The 2.5 % and 97.5 % quantiles."""
    return np.quantile(values, [0.025, 0.975]).tolist()


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """The `mean` of `n` values and its 95 % `interval`."""
    column = np.asarray(values, dtype=float)
    means = counts(len(column), ROWS) @ column / len(column)
    return {"n": len(column), "mean": float(column.mean()), "interval": central_95(means)}


def resampled_accuracies(correct: np.ndarray, sizes: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """
    The accuracy of each resample of rows and runs, `[RESAMPLES]`.

    Args:
        correct (`np.ndarray` `[runs, rows]`): how many pieces of each row are correct.
        sizes (`np.ndarray` `[rows]`): how many pieces it has.
        runs (`np.ndarray` `[RESAMPLES, runs]`): [`counts`] of the runs.
    """
    accuracies = []
    rows = counts(len(sizes), ROWS)
    for start in range(0, RESAMPLES, 100):  # as floats, all resamples at once would take too much memory
        row_counts, run_counts = (drawn[start : start + 100].astype(float) for drawn in (rows, runs))
        totals = np.maximum(row_counts @ sizes, 1) * run_counts.sum(axis=1)
        accuracies.append((row_counts @ correct.T * run_counts).sum(axis=1) / totals)
    return np.concatenate(accuracies)


def paired_difference(
    first: Sequence[Sequence[Sequence[bool]]], second: Sequence[Sequence[Sequence[bool]]], same_runs: bool = False
) -> dict[str, Any]:
    """
    By how much the second model's accuracy on the same questions is higher than the first's.

    Args:
        first, second (`Sequence` `[runs][rows][pieces]`): what is correct, rows in the same order. The pieces of a row
            are drawn together.
        same_runs (`bool`): the k-th runs of both are the same checkpoint and are drawn together.

    Returns:
        `dict`: `n` pieces per run in `rows` rows, the `difference` of the accuracies and its 95 % `interval`.

    Raises:
        ValueError: if the rows do not pair up.
    """
    sizes = [[len(row) for row in run] for run in [*first, *second]]
    if any(run != sizes[0] for run in sizes) or sum(sizes[0]) == 0:
        raise ValueError("The two models must have outcomes of the same rows, at least one.")
    before, after = (np.array([[sum(row) for row in run] for run in runs], dtype=float) for runs in (first, second))
    pieces = np.array(sizes[0], dtype=float)
    first_runs = counts(len(before), FIRST_RUNS)
    second_runs = first_runs if same_runs else counts(len(after), SECOND_RUNS)
    differences = resampled_accuracies(after, pieces, second_runs) - resampled_accuracies(before, pieces, first_runs)
    return {
        "n": int(pieces.sum()),
        "rows": int((pieces > 0).sum()),
        "difference": float((after.mean(axis=0) - before.mean(axis=0)).sum() / pieces.sum()),
        "interval": central_95(differences),
    }
