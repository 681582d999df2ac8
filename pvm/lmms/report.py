"""From runs of benchmarks to numbers with intervals, and lmms.md."""

import contextlib
import inspect
import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from pvm.errors import REFUSALS, UserError
from pvm.evaluation.bootstrap import central_95, resamples
from pvm.evaluation.report import at_commit, checkpoint_lines
from pvm.evaluation.tables import Table


if TYPE_CHECKING:  # an extra, and slow to import
    from lmms_eval.api.task import Task


RESAMPLES = 1000
TOLERANCE = 1e-9  # relative, between a number of lmms-eval and the same number computed here


def statistic(task: "Task", metric: str, runs: Sequence[dict[str, Any]]) -> Callable[[list[Any]], float] | None:
    """
    The function from a metric's values for all questions to its number: the task's own aggregation, or the mean if
    that writes files. `None` if it does not reproduce the number of each of the `runs`.
    """
    name = metric.partition(",")[0]
    aggregation = task.aggregation()[name]

    def aggregate(values: list[Any]) -> float:
        with contextlib.redirect_stdout(io.StringIO()):  # MMMU's prints a table
            return float(aggregation(values))

    function = aggregate
    if "args" in inspect.signature(aggregation).parameters:  # of those that write files
        function = mean
    for run in runs:
        try:
            again = function(question_values(run, metric)[1])
        except (ArithmeticError, LookupError, *REFUSALS):
            return None
        if abs(again - run["metrics"][metric]) > TOLERANCE * max(1, abs(again)):
            return None
    return function


def mean(values: list[float]) -> float:
    """
    Raises:
        TypeError: if they are not numbers.
    """
    return sum(values) / len(values)


def question_values(run: dict[str, Any], metric: str) -> tuple[list[int], list[Any]]:
    """The questions with a value of the metric, and the values."""
    name = metric.partition(",")[0]
    counted = [question for question in run["questions"] if name in question]
    return [question["doc_id"] for question in counted], [question[name] for question in counted]


def resample(values: dict[str, list[list[Any]]], function: Callable[[list[Any]], float]) -> dict[str, np.ndarray]:
    """
    The metric of each run on resampled questions, the same for all models and runs.

    Args:
        values: by model, for each run the values of each question.

    Returns:
        By model `[runs, resamples]`.
    """
    count = len(next(iter(values.values()))[0])
    drawn = [rows.tolist() for rows in resamples(count, RESAMPLES, seed=0)]
    return {
        name: np.array([[function([run[k] for k in rows]) for rows in drawn] for run in runs])
        for name, runs in values.items()
    }


def compare(task: "Task", metric: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """
    A metric of all models.

    Returns:
        `dict`: `n` questions; by model under `models`: `runs` (one number each), their `mean`, `range`, `t_interval`
        (`None` for one run), and over questions `run_intervals` and `interval` of the mean; `differences` of the means
        to the first model with their `interval`. Intervals over questions are `None` if the number cannot be computed
        from the questions.

    Raises:
        UserError: if the runs do not have the same questions.
    """
    first = next(iter(runs))
    read = {name: [question_values(run, metric) for run in model_runs] for name, model_runs in runs.items()}
    questions = read[first][0][0]
    for name, model_runs in read.items():
        if any(asked != questions for asked, _ in model_runs):
            raise UserError(f"{task.config.task}: {name} and {first} did not answer the same questions.")
    several_filters = len(set(questions)) < len(questions)
    function = None
    if not several_filters:
        function = statistic(task, metric, [run for model_runs in runs.values() for run in model_runs])
    samples = None
    if function is not None:
        samples = resample({name: [values for _, values in model_runs] for name, model_runs in read.items()}, function)

    models, differences = {}, {}
    for name, model_runs in runs.items():
        numbers = [run["metrics"][metric] for run in model_runs]
        models[name] = {
            "runs": numbers,
            "mean": float(np.mean(numbers)),
            "range": [min(numbers), max(numbers)],
            "t_interval": t_interval(numbers),
            "run_intervals": None if samples is None else [central_95(row) for row in samples[name]],
            "interval": None if samples is None else central_95(samples[name].mean(0)),
        }
        if name != first:
            differences[name] = {
                "difference": models[name]["mean"] - models[first]["mean"],
                "interval": None if samples is None else central_95(samples[name].mean(0) - samples[first].mean(0)),
            }
    return {"n": len(set(questions)), "models": models, "differences": differences}


def t_interval(numbers: Sequence[float]) -> list[float] | None:
    """Student's 95 % interval of the mean over runs; `None` for one run."""
    if len(numbers) < 2:
        return None
    half = stats.t.ppf(0.975, len(numbers) - 1) * np.std(numbers, ddof=1) / np.sqrt(len(numbers))
    return [float(np.mean(numbers) - half), float(np.mean(numbers) + half)]


def number(value: float) -> str:
    return f"{value:.4g}"


def span(interval: Sequence[float] | None, sign: str = "") -> str:
    return "" if interval is None else f" [{interval[0]:{sign}.3g}, {interval[1]:{sign}.3g}]"


def metrics_of(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The label and numbers of each row of the tables."""
    for task, result in report["tasks"].items():
        for metric, numbers in result["metrics"].items():
            yield f"{task}: {metric.partition(',')[0]}", numbers


def results_table(report: dict[str, Any]) -> Table:
    first, *others = [model["name"] for model in report["models"]]
    rows = []
    for label, result in metrics_of(report):
        cells = [f"{number(model['mean'])}{span(model['interval'])}" for model in result["models"].values()]
        gains = [f"{gain['difference']:+.4g}{span(gain['interval'], '+')}" for gain in result["differences"].values()]
        rows.append([label, str(result["n"]), *cells, *gains])
    header = ["task: metric", "n", first, *others, *(f"{name} − {first}" for name in others)]  # noqa: RUF001
    return Table("Benchmarks [95 % over questions]", header, rows)


def runs_table(report: dict[str, Any]) -> Table | None:
    """`None` for a single run."""
    if len(report["seeds"]) < 2:
        return None
    rows = [
        [
            label,
            name,
            number(model["mean"]),
            span(model["t_interval"]).strip(),
            *(f"{number(value)}" for value in model["runs"]),
        ]
        for label, result in metrics_of(report)
        for name, model in result["models"].items()
    ]
    header = ["task: metric", "model", "mean", "95 % over runs", *(f"seed {seed}" for seed in report["seeds"])]
    return Table("Runs", header, rows)


def markdown_report(report: dict[str, Any]) -> str:
    """lmms.md."""
    settings, seeds = report["settings"], report["seeds"]
    sampled = settings["temperature"] > 0
    how = "greedy decoding" if not sampled else f"sampling at temperature {settings['temperature']}"
    table, runs = results_table(report), runs_table(report)
    parts = [
        f"# {', '.join(model['name'] for model in report['models'])} on {', '.join(report['tasks'])}",
        f"Made with lmms-eval {report['versions']['lmms-eval']}, with {how}, {len(seeds)} "
        f"run{'s' if len(seeds) > 1 else ''} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}).",
        "## How to read this",
        "Each number is the task's own metric, as lmms-eval computes it, on its own scale (some are 0 to 1, some 0 to "
        "100)" + (", averaged over the runs" if len(seeds) > 1 else "") + ". n counts questions. In brackets: 95 % "
        f"intervals over questions ({RESAMPLES:,} resamples, the same for all models and runs). If the interval of a "
        "difference contains 0, these questions show no difference. There are no brackets where the number cannot be "
        "computed from the questions.",
    ]
    if settings["max_samples"] is not None:
        first = settings["max_samples"]
        parts.append(f"Only the first {first} questions of each task were asked: these are not benchmark results.")
    if report["stand_ins"]:
        parts.append(f"Different from the paper: {'; '.join(report['stand_ins'])}.")
    parts += ["## Results", table.markdown()]
    if runs is not None:
        parts += [
            "## Runs",
            "The same questions with other seeds. Student's interval of the mean over runs: it covers other seeds, "
            "not other questions or trainings.",
            runs.markdown(),
        ]
    parts += [
        "## Checkpoints",
        "\n".join(
            f"- {line}; `{model['path']}`{at_commit(model)}, {model['dtype']}"
            for line, model in zip(checkpoint_lines(report), report["models"])
        ),
        "## How it was measured",
        f"Passed to every task: `{report['generation']}`; everything else is the task's own. Batch size "
        f"{settings['batch_size']}. The prompts are lmms-eval's for `{report['prompts']}`.",
        "Versions: " + ", ".join(f"{package} {release}" for package, release in report["versions"].items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"
