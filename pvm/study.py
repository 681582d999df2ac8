"""
Compare methods: train each at several learning rates and seeds on the same data, then evaluate all of them.

    python -m pvm study --config recipes/digits_study.yaml

The recipe says what to train and how. The same command resumes an interrupted study.
"""

import json
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from tqdm import tqdm

from pvm.errors import UserError
from pvm.files import locked, write_atomically
from pvm.runs import RunCommand, run_command, train
from pvm.terminal import Terminal
from pvm.training.methods import METHODS


LAST_SHARE = 0.2  # of the logged losses, by whose mean learning rates are chosen


@dataclass
class Study:
    """
    A recipe.

    output_dir (`str`): folder of runs, logs and reports.
    seeds (`list[int]`): of the trainings. Learning rates are chosen at the first.
    train (`dict`): the fields of `pvm train` that all runs share.
    methods (`dict[str, dict]`): by name in the report, further fields of `pvm train`, the `learning_rates` to try, and
        other `seeds`, if any.
    evaluate (`dict[str, dict]`): by the name of the report's folder, fields of `pvm eval`, and the `methods`, if not
        all; the models are the base ("base") and the chosen runs.
    """

    output_dir: str
    seeds: list[int]
    train: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    evaluate: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, path: str) -> "Study":
        """
        Raises:
            UserError: if the file is not a valid recipe.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--config {path}: {' '.join(str(error).split())}") from error
        expected = {field.name for field in fields(cls)}
        found = set(content) if isinstance(content, dict) else set()
        if found != expected:
            wrong = ", ".join(sorted(f"`{key}`" for key in found ^ expected))
            raise UserError(
                f"{path}: a study has the keys {', '.join(sorted(expected))}; missing or unknown: {wrong}."
            )
        study = cls(**content)
        methods = study.methods
        check_seeds(path, study.seeds)
        for key, value in (("train", study.train), ("methods", methods), ("evaluate", study.evaluate)):
            if not isinstance(value, dict) or not value:
                raise UserError(f"{path}: `{key}` must contain `name: value` lines.")
        if "model_name_or_path" not in study.train:
            raise UserError(f"{path}: `train` lacks `model_name_or_path`, the base of all methods.")
        for name, method in methods.items():
            rates = method.get("learning_rates") if isinstance(method, dict) else None
            if not isinstance(rates, list) or not rates:
                raise UserError(f"{path}: methods: {name} has no `learning_rates`. Give a list of one or more.")
            if method.get("method") not in METHODS:
                raise UserError(f"{path}: methods: {name}: `method` must be one of {', '.join(METHODS)}.")
            for rate in rates:
                if not isinstance(rate, float):
                    raise UserError(
                        f"{path}: methods: {name}: YAML does not read the learning rate {rate!r} as a decimal number: "
                        "write 1.0e-3."
                    )
            if "seeds" in method:
                check_seeds(f"{path}: methods: {name}", method["seeds"])
        for name, settings in study.evaluate.items():
            chosen = settings.get("methods", list(methods)) if isinstance(settings, dict) else None
            if not isinstance(chosen, list) or not set(chosen) <= set(methods):
                raise UserError(
                    f"{path}: evaluate: {name} must contain fields of `pvm eval`, and may contain `methods`, a list "
                    f"of some of {', '.join(methods)}."
                )
        return study


def check_seeds(where: str, seeds: Any) -> None:
    """
    Raises:
        UserError: if they are not a list of integers.
    """
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{where}: `seeds` must be a list of integers, e.g. [0, 1, 2].")


@dataclass
class Run:
    """One training: the name of its method in the report, its learning rate and its seed."""

    study: Study
    name: str
    learning_rate: float
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.study.output_dir) / self.name / f"learning_rate_{self.learning_rate}-seed_{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `pvm train`."""
        settings = {**self.study.train, **self.study.methods[self.name]}
        for key in ("learning_rates", "seeds"):
            settings.pop(key, None)
        return {**settings, "learning_rate": self.learning_rate, "seed": self.seed}

    def check(self) -> None:
        """
        Raises:
            UserError: if the run was started with other settings.
        """
        file = self.folder.with_name(f"{self.folder.name}.json")
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else self.settings
        different = sorted(key for key in {*before, *self.settings} if before.get(key) != self.settings.get(key))
        if different:
            raise UserError(
                f"{self.folder} was trained with a different {', '.join(different)} than the recipe has now. Choose "
                "another `output_dir`, or delete that folder and the .json file next to it."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(self.settings) + "\n")

    def train(self, run_command: RunCommand) -> None:
        """
        Train, resume, or do nothing if the run is finished.

        Raises:
            UserError: if the training fails.
        """
        flags = as_flags({**self.settings, "output_dir": str(self.folder)})
        train(self.folder, flags, self.folder.with_name(f"{self.folder.name}.log"), run_command)

    @property
    def loss(self) -> float:
        """The mean of the last fifth of the logged training losses: in a first epoch, a loss on unseen rows."""
        state = json.loads((self.folder / "trainer_state.json").read_text(encoding="utf-8"))
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        last = losses[-max(round(LAST_SHARE * len(losses)), 1) :]
        return sum(last) / len(last)


def as_flags(settings: dict[str, Any]) -> list[str]:
    """The command line for fields of `pvm train` or `pvm eval`."""
    flags = []
    for key, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        else:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def train_all(runs: list[Run], jobs: int, run_command: RunCommand, description: str) -> None:
    """
    Train all runs, `jobs` at a time.

    Raises:
        UserError: if a run fails (after those that have started), or was started with other settings.
    """
    for run in runs:
        run.check()
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), desc=description, unit="run") as bar:
        futures = [pool.submit(run.train, run_command) for run in runs]
        try:
            for future in futures:
                future.result()
                bar.update()
        finally:  # after a failure or Ctrl-C, none that has not begun begins
            pool.shutdown(cancel_futures=True)


def choose_learning_rates(runs: list[Run], output_dir: str) -> dict[str, float]:
    """For each method the learning rate with the lowest loss. All losses are written to learning_rates.json."""
    losses: dict[str, dict[float, float]] = {}
    for run in runs:
        losses.setdefault(run.name, {})[run.learning_rate] = run.loss
    write_atomically(Path(output_dir, "learning_rates.json"), json.dumps(losses, indent=2) + "\n")
    chosen = {name: min(tried, key=tried.get) for name, tried in losses.items()}

    table = Table(title="learning rates, chosen by the loss of the last fifth of the training")
    for heading in ("method", "tried: loss", "chosen"):
        table.add_column(heading)
    for name, tried in losses.items():
        at_edge = len(tried) > 1 and chosen[name] in (min(tried), max(tried))
        tried_losses = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in tried.items())
        table.add_row(name, tried_losses, f"{chosen[name]:g}{' (at the edge of those tried)' if at_edge else ''}")
    Terminal().print(table)
    return chosen


def main(arguments: list[str] | None = None, run_command: RunCommand = run_command) -> None:
    """
    Args:
        run_command: runs `pvm train` and `pvm eval`.

    Raises:
        SystemExit: with the exit status of `pvm eval`, if it is not 0.
        UserError: if the recipe is wrong, a training fails, or earlier results belong to another recipe.
    """
    parser = ArgumentParser("python -m pvm study", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the recipe of the study")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    study = Study.load(args.config)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with locked(Path(study.output_dir)):
        run_study(study, args.jobs, run_command)


def run_study(study: Study, jobs: int, run_command: RunCommand) -> None:
    """
    Train and evaluate what has not been yet.

    Raises: see [`main`].
    """
    seeds = {name: method.get("seeds", study.seeds) for name, method in study.methods.items()}
    tries = [
        Run(study, name, rate, seeds[name][0])
        for name, method in study.methods.items()
        for rate in method["learning_rates"]
    ]
    train_all(tries, jobs, run_command, "learning rates")
    rates = choose_learning_rates(tries, study.output_dir)
    runs = {name: [Run(study, name, rates[name], seed) for seed in seeds[name]] for name in study.methods}
    train_all([run for same in runs.values() for run in same], jobs, run_command, "seeds")

    for name, fields_of_eval in study.evaluate.items():
        settings = {"output_dir": str(Path(study.output_dir) / name), **fields_of_eval}
        chosen = [run for method in settings.pop("methods", runs) for run in runs[method]]
        settings["model"] = [study.train["model_name_or_path"], *(str(run.folder) for run in chosen)]
        settings["names"] = ["base", *(run.name for run in chosen)]
        evaluate(settings, run_command)


def evaluate(settings: dict[str, Any], run_command: RunCommand) -> None:
    """
    `pvm eval` with these settings, unless its report exists.

    Raises: see [`main`].
    """
    file = Path(settings["output_dir"]) / "report.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))["arguments"]
        different = [key for key, value in settings.items() if before.get(key) != value]
        if different:
            raise UserError(f"{file} is a report with a different {', '.join(different)}. Move it to make a new one.")
        Terminal().print(f"The report exists already: {file.with_name('report.html')}")
        return
    if status := run_command("eval", as_flags(settings), None):
        sys.exit(status)
