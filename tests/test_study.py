"""Studies: trainings and evaluations are stubs, but for one test that trains and evaluates."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

import eval as eval_script
from pvm import study as study_module
from pvm.arguments import parse_arguments
from pvm.data.sources import DataArguments
from pvm.errors import UserError
from pvm.evaluation.arguments import EvalArguments
from pvm.files import locked
from pvm.runs import run_command
from pvm.study import Run, Study, as_flags
from pvm.training.methods import ModelArguments
from pvm.training.trainer import PVMTrainingArguments
from training import ROOT


def recipe(tmp_path: Path, base: Path | str = "base", conversations: Path | str = "data.jsonl", **changes) -> Path:
    """Two methods with two learning rates each, and two seeds."""
    content = {
        "output_dir": str(tmp_path / "study"),
        "seeds": [0, 1],
        "train": {
            "model_name_or_path": str(base),
            "dataset_name": str(conversations),
            "per_device_train_batch_size": 3,
            "max_steps": 2,
            "logging_steps": 1,
            "use_cpu": True,
        },
        "methods": {
            "PVM": {"method": "pvm", "pvm_hidden_size": 32, "learning_rates": [1.0e-3, 1.0e-9]},
            "MLP": {"method": "pvm", "pvm_block": "parallel_mlp", "learning_rates": [1.0e-9, 1.0e-3]},
        },
        "evaluate": {
            "report": {
                "dataset_name": str(conversations), "dataset_split": "train", "max_samples": 2, "max_new_tokens": 2,
                "diagnostic_rows": 0,
            },
        },
        **changes,
    }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


class Scripts:
    """Stubs of `pvm train` and `pvm eval`: they parse their flags, kept in `calls`, and write what a study reads."""

    def __init__(self):
        self.calls: list[tuple] = []

    def __call__(self, command: str, flags: list[str], log: Path | None = None) -> int:
        if command == "eval":
            (arguments,) = parse_arguments((EvalArguments,), "", flags)
            folder, written = Path(arguments.output_dir), {"report.json": {"arguments": vars(arguments)}}
            self.calls.append((command, arguments.model, arguments.names))
        else:
            model, _, training = parse_arguments((ModelArguments, DataArguments, PVMTrainingArguments), "", flags)
            folder, rate = Path(training.output_dir), training.learning_rate
            # Three steps, of which the last one counts; the larger learning rate wins.
            history = [{"loss": loss} for loss in (9.0, rate, 1 - rate)]
            written = {"trainer_state.json": {"log_history": history}, "model.pvm.safetensors": {}}
            self.calls.append((command, model.pvm_block, rate, training.seed, training.resume_from_checkpoint))
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in written.items():
            (folder / name).write_text(json.dumps(content))
        return 0


def test_a_study(tmp_path, capsys):
    file, scripts = recipe(tmp_path), Scripts()
    study_module.main(["--config", str(file)], scripts)
    *trainings, evaluation = scripts.calls
    tries = [(block, rate, 0, None) for block in (None, "parallel_mlp") for rate in (1e-3, 1e-9)]
    seeds = [(block, 1e-3, 1, None) for block in (None, "parallel_mlp")]
    assert {call[1:] for call in trainings} == {*tries, *seeds} and len(trainings) == 6
    losses = json.loads((tmp_path / "study" / "learning_rates.json").read_text())
    assert losses["MLP"] == {"1e-09": 1 - 1e-9, "0.001": 1 - 1e-3}
    folders = [
        str(tmp_path / "study" / name / f"learning_rate_0.001-seed_{k}") for name in ("PVM", "MLP") for k in (0, 1)
    ]
    assert evaluation == ("eval", ["base", *folders], ["base", "PVM", "PVM", "MLP", "MLP"])
    assert "0.001 (at the edge of those tried)" in capsys.readouterr().out

    # The same command again trains and evaluates nothing.
    study_module.main(["--config", str(file)], scripts)
    assert len(scripts.calls) == 7 and "The report exists already" in capsys.readouterr().out
    # Results of another recipe are not used.
    content = yaml.safe_load(file.read_text())
    evaluate = content["evaluate"]["report"]
    recipe(tmp_path, evaluate={"report": {**evaluate, "max_samples": 1}})
    with pytest.raises(UserError, match="is a report with a different max_samples"):
        study_module.main(["--config", str(file)], scripts)
    # Another evaluation, of some methods.
    recipe(tmp_path, evaluate={"report": evaluate, "ablations": {**evaluate, "methods": ["MLP"]}})
    study_module.main(["--config", str(file)], scripts)
    assert len(scripts.calls) == 8 and scripts.calls[-1] == ("eval", ["base", *folders[2:]], ["base", "MLP", "MLP"])
    recipe(tmp_path, train={**content["train"], "max_steps": 3})
    with pytest.raises(UserError, match="was trained with a different max_steps than the recipe has now"):
        study_module.main(["--config", str(file)], scripts)


def test_a_study_with_a_real_training(base, conversations, tmp_path):
    """`pvm train` as a command, and `pvm eval` in this process."""
    methods = {"PVM": {"method": "pvm", "pvm_hidden_size": 32, "learning_rates": [1.0e-3]}}
    file = recipe(tmp_path, base, conversations, methods=methods, seeds=[0])

    def run(command: str, flags: list[str], log: Path | None = None) -> int:
        return run_command(command, flags, log) if command == "train" else eval_script.main(flags) or 0

    study_module.main(["--config", str(file)], run)
    report = json.loads((tmp_path / "study" / "report" / "report.json").read_text())
    assert [(model["label"], model["step"]) for model in report["models"]] == [("base", None), ("PVM", 2)]


def test_a_failed_training_is_named(tmp_path):
    def fail(command: str, flags: list[str], log: Path | None = None) -> int:
        log.write_text("Traceback\npvm train: error: no rows\n")
        return 1

    with pytest.raises(UserError, match=r"seed_0 failed, see .*\.log: pvm train: error: no rows"):
        study_module.main(["--config", str(recipe(tmp_path))], fail)


def test_after_ctrl_c_no_training_begins(tmp_path):
    calls = []

    def interrupted(command: str, flags: list[str], log: Path | None = None) -> int:
        calls.append(command)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2)  # until the main thread has seen it, on a busy machine too
        return 1

    # What a shell starts in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            study_module.main(["--config", str(recipe(tmp_path))], interrupted)
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == ["train"]


def test_a_folder_takes_one_study_at_a_time(tmp_path):
    with locked(tmp_path / "study"), pytest.raises(UserError, match="Another process is writing into"):
        study_module.main(["--config", str(recipe(tmp_path))], Scripts())


def test_the_status_of_eval_is_passed_on(tmp_path):
    scripts = Scripts()

    def run(command: str, flags: list[str], log: Path | None = None) -> int:
        return 3 if command == "eval" else scripts(command, flags, log)

    with pytest.raises(SystemExit) as ended:
        study_module.main(["--config", str(recipe(tmp_path))], run)
    assert ended.value.code == 3


def test_a_training_is_resumed_from_its_last_checkpoint(tmp_path):
    run, scripts = Run(Study.load(str(recipe(tmp_path))), "PVM", 1.0e-3, 0), Scripts()
    (run.folder / "checkpoint-1").mkdir(parents=True)
    run.train(scripts)
    assert scripts.calls == [("train", None, 1e-3, 0, "last")]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"colour": "red"}, "missing or unknown: `colour`"),
        ({"methods": {"PVM": {"method": "pvm"}}}, "PVM has no `learning_rates`"),
        ({"methods": {"PVM": {"method": "pvm", "learning_rates": ["1e-3"]}}}, "does not read .* write 1.0e-3"),
        ({"methods": {"PVM": None}}, "PVM has no `learning_rates`"),
        ({"methods": ["PVM"]}, "`methods` must contain"),
        ({"methods": {"PVM": {"method": "magic", "learning_rates": [1.0e-3]}}}, "`method` must be one of pvm, lora"),
        ({"seeds": 3}, "`seeds` must be a list"),
        ({"seeds": []}, "`seeds` must be a list"),
        (
            {"methods": {"PVM": {"method": "pvm", "learning_rates": [1.0e-3], "seeds": 1}}},
            "PVM: `seeds` must be a list",
        ),
        ({"evaluate": {"report": {"methods": ["LoRA"]}}}, "evaluate: report .* some of PVM, MLP"),
        ({"train": {"max_steps": 1}}, "`train` lacks `model_name_or_path`"),
    ],
)
def test_invalid_recipes(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        Study.load(str(recipe(tmp_path, **changes)))
    with pytest.raises(UserError, match="--config .*nothing.yaml"):
        Study.load(str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*_study*.yaml")))
def test_the_recipes_are_valid_and_fair(recipe):
    """All flags parse, shared settings are shared, and every method with a choice of learning rates has as many."""
    study = Study.load(str(ROOT / "recipes" / f"{recipe}.yaml"))
    for name, method in study.methods.items():
        run = Run(study, name, method["learning_rates"][0], study.seeds[0])
        flags = [*as_flags(run.settings), "--output_dir", str(run.folder)]
        model, _, training = parse_arguments((ModelArguments, DataArguments, PVMTrainingArguments), "", flags)
        assert (model.method, model.pvm_block) == (method["method"], method.get("pvm_block"))
        assert training.learning_rate == method["learning_rates"][0]
        assert training.per_device_train_batch_size == study.train["per_device_train_batch_size"]
    assert {len(method["learning_rates"]) for method in study.methods.values()} <= {1, 3}
    for settings in study.evaluate.values():
        flags = as_flags({key: value for key, value in settings.items() if key != "methods"})
        (evaluation,) = parse_arguments((EvalArguments,), "", [*flags, "--model", "a", "--output_dir", "b"])
        assert evaluation.dataset_split == "test" and evaluation.group_by == "task"
