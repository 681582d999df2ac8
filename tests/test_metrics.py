"""Metrics and intervals, compared with results computed by hand."""

import numpy as np
import pytest

from pvm.evaluation.bootstrap import mean_interval, paired_difference
from pvm.evaluation.matching import MATCHES
from pvm.evaluation.metrics import (
    Accuracy,
    AccuracyByDepth,
    AccuracyByDistance,
    AccuracyByLength,
    depth_bins,
    distance_bins,
    proportion,
    quartile_bins,
    score_pieces,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (8, 10, 0.490162, 0.943318),  # (0.8 + 0.192073 -+ 0.313613) / 1.384146
        (0, 10, 0.0, 0.277533),  # z^2 / (n + z^2)
        (10, 10, 0.722467, 1.0),
    ],
)
def test_wilson_interval(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_counts(correct, n):
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(correct, n)


def test_accuracy_of_exact_matches():
    result = Accuracy(keep_in_memory=True).compute(
        predictions=["7", "8", "", "the cat"], references=["7", "7", "7", "The cat."]
    )
    assert result == {"n": 4, "correct": 2, "accuracy": 0.5, "interval": list(wilson_interval(2, 4))}


def test_distances_in_clusters_get_a_bin_each():
    assert distance_bins([12, 14, 12, 76, 78, 1036]) == [(12, 14), (76, 78), (1036, 1036)]


def test_distances_that_spread_get_powers_of_two():
    assert distance_bins([0, 1, 2, 3, *range(10, 40)]) == [(0, 0), (1, 1), (2, 3), (8, 15), (16, 31), (32, 63)]
    assert len(distance_bins(range(0, 2000, 100))) == 6  # 20 clusters are too many: 0, then 64-127 to 1024-2047


def test_few_depths_get_a_bin_each_and_many_get_ten():
    assert depth_bins([9, 20, 9, 31]) == [(9, 9), (20, 20), (31, 31)]
    bins = depth_bins(range(95))
    assert len(bins) == 10 and bins[0] == (0, 9) and bins[-1] == (90, 99)


def test_accuracy_by_distance():
    result = AccuracyByDistance(keep_in_memory=True).compute(
        predictions=["1", "2", "3", "4"], references=["1", "2", "x", "4"], distances=[10, 80, 80, None]
    )
    assert [(span["low"], span["high"], span["n"], span["correct"]) for span in result["bins"]] == [
        (10, 10, 1, 1),
        (80, 80, 2, 1),
    ]
    assert (result["without_image"]["n"], result["without_image"]["correct"]) == (1, 1)


def test_pieces_pair_up_by_number_and_missing_ones_are_wrong():
    assert score_pieces("a 1 b 9", "a 1 b 2 c 3", r"\d") == [True, False, False]
    assert score_pieces("", "1 2", r"\d") == [False, False]
    assert score_pieces("1 2 3", "1 2", r"\d") == [True, True]
    assert score_pieces("The CAT", "the cat", r"\S+") == [True, True]


def test_accuracy_by_depth_counts_answers_with_several_pieces_only():
    result = AccuracyByDepth(keep_in_memory=True).compute(
        predictions=["1 2", "1", "7"],
        references=["1 3", "1 2", "7"],
        depths=[[0, 4], [0, 4], [0]],
        scored_pattern=r"\d",
    )
    assert [(span["low"], span["n"], span["correct"]) for span in result["bins"]] == [(0, 2, 2), (4, 2, 0)]
    assert result["all"]["accuracy"] == 0.5 and result["answers"] == 2


def test_accuracy_by_depth_without_any_depth():
    result = AccuracyByDepth(keep_in_memory=True).compute(
        predictions=["1"], references=["1"], depths=[[0]], scored_pattern=r"\d"
    )
    assert result["bins"] == [] and result["all"]["accuracy"] is None


def test_paired_difference():
    first, second = [[True]] * 50 + [[False]] * 50, [[True]] * 80 + [[False]] * 20
    result = paired_difference([first], [second])
    low, high = result["interval"]
    # 30 of 100 rows gained: the differences of resamples have a standard deviation of sqrt(.3 * .7 / 100) = .046.
    assert result["difference"] == pytest.approx(0.3)
    assert low == pytest.approx(0.3 - 1.96 * 0.0458, abs=0.02) and high == pytest.approx(0.3 + 1.96 * 0.0458, abs=0.02)
    assert paired_difference([first], [second]) == result
    assert paired_difference([first], [first])["interval"] == [0.0, 0.0]


def test_intervals_are_the_same_every_time():
    """All reports use these seeds, and stored reports can be compared with new ones."""
    rng = np.random.default_rng(0)
    runs = (rng.random((3, 30)) < [[0.3], [0.5], [0.7]]).tolist()
    assert proportion(runs)["interval"] == pytest.approx([0.28888888888888886, 0.7])
    assert mean_interval(rng.random(20).round(3).tolist())["interval"] == pytest.approx([0.49148625, 0.78400625])
    first = [[[right] for right in run] for run in runs]
    second = [[[True] if k % 2 else [not right] for k, right in enumerate(run)] for run in runs]
    assert paired_difference(first, second)["interval"] == pytest.approx([-0.05555555555555547, 0.5224999999999985])
    paired = paired_difference(first, second, same_runs=True)
    assert paired["interval"] == pytest.approx([-0.12222222222222223, 0.6002777777777764])


def test_several_runs_widen_the_interval_by_what_they_differ():
    rng = np.random.default_rng(0)
    alike = [(rng.random(400) < 0.5).tolist()] * 4
    apart = [(rng.random(400) < share).tolist() for share in (0.2, 0.4, 0.6, 0.8)]
    result, wider = proportion(alike), proportion(apart)
    assert result["n"] == 400 and result["runs"] == 4 and result["by_run"] == [result["accuracy"]] * 4
    # Equal runs count as one, with a standard error of sqrt(.25 / 400) = .025.
    assert np.diff(result["interval"])[0] == pytest.approx(2 * 1.96 * 0.025, rel=0.1)
    # The mean of four runs with a standard deviation of .22 adds one of .11.
    assert np.diff(wider["interval"])[0] == pytest.approx(2 * 1.96 * (0.112**2 + 0.02**2) ** 0.5, rel=0.15)

    rows = [[[right] for right in run] for run in apart]
    other = [[[True] for _ in range(400)]]
    difference = paired_difference(rows, other)
    assert difference["difference"] == pytest.approx(1 - wider["accuracy"])
    assert np.diff(difference["interval"])[0] == pytest.approx(np.diff(wider["interval"])[0], rel=0.1)
    # Ablations of the same checkpoints: runs are paired.
    worse = [[[right and k >= 40] for k, (right,) in enumerate(run)] for run in rows]
    paired, free = (paired_difference(rows, worse, same_runs=same)["interval"] for same in (True, False))
    assert np.diff(paired)[0] < np.diff(free)[0] / 2


def test_quartiles():
    assert quartile_bins([1, 2, 3, 4, 5, 6, 7, 8]) == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert quartile_bins([2] * 6 + [9] * 2) == [(2, 2), (3, 9)]
    assert quartile_bins([5, 5, 5]) == [(5, 5)]
    result = AccuracyByLength(keep_in_memory=True).compute(
        predictions=["1", "2", "x", "x"], references=["1", "2", "3", "4"], lengths=[1, 2, 30, 40]
    )
    assert [(span["low"], span["high"], span["correct"]) for span in result["bins"]] == [
        (1, 1, 1), (2, 2, 1), (3, 30, 0), (31, 40, 0)]  # fmt: skip


def test_paired_difference_resamples_rows_not_pieces():
    """Sixteen pieces that are always right or wrong together are as good as one."""
    rows = [[False]] * 20, [[True]] * 10 + [[False]] * 10
    pieces = [[row * 16 for row in model] for model in rows]
    assert (
        paired_difference(*([model] for model in pieces))["interval"]
        == paired_difference(*([model] for model in rows))["interval"]
    )
    with pytest.raises(ValueError, match="same rows"):
        paired_difference([pieces[0]], [rows[1]])


def test_accuracy_by_every_kind_of_match():
    predictions, references = ["The answer is B.", "C"], ["B", "B"]
    for match, correct in (("exact", 0), ("choice", 1)):
        result = Accuracy(keep_in_memory=True).compute(predictions=predictions, references=references, match=match)
        assert (result["correct"], result["n"]) == (correct, 2)
    result = AccuracyByDistance(keep_in_memory=True).compute(
        predictions=predictions, references=references, distances=[3, None], match="choice"
    )
    assert result["bins"][0]["correct"] == 1 and result["without_image"]["correct"] == 0
    assert set(MATCHES) == {"exact", "choice", "number", "math"}
