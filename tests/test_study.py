"""A small study, for real: two learning rates, two seeds, the report, and the same line again."""

import json
from pathlib import Path

import pytest
import yaml

import eval as eval_script
from pvm import study as study_module
from pvm.arguments import parse_arguments
from pvm.data.sources import DataArguments
from pvm.errors import UserError
from pvm.study import Run, Study, choose
from pvm.training.methods import ModelArguments
from pvm.training.trainer import PVMTrainingArguments


def recipe(tmp_path: Path, base: Path, conversations: Path, **changes) -> Path:
    content = {
        "output_dir": str(tmp_path / "study"),
        "seeds": [0, 1],
        "train": {
            "model_name_or_path": str(base),
            "dataset_name": str(conversations),
            "per_device_train_batch_size": 3,
            "max_steps": 2,
            "logging_steps": 1,
            "save_steps": 1,
            "use_cpu": True,
        },
        "methods": {"PVM": {"method": "pvm", "pvm_hidden_size": 32, "learning_rates": [1.0e-3, 1.0e-9]}},
        "evaluate": {
            "dataset_name": str(conversations), "dataset_split": "train", "max_samples": 2, "max_new_tokens": 2,
            "probe_rows": 0,
        },
        **changes,
    }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_study(base, conversations, tmp_path, capsys):
    file = recipe(tmp_path, base, conversations)
    with pytest.raises(SystemExit) as ended:
        study_module.main(["--config", str(file)])
    assert ended.value.code == 0
    study = Study.load(str(file))
    losses = json.loads((tmp_path / "study" / "learning_rates.json").read_text())["PVM"]
    assert set(losses) == {"0.001", "1e-09"}
    (rate,) = choose(study, [Run(study, "PVM", rate, 0) for rate in (1.0e-3, 1.0e-9)]).values()
    assert rate == min(losses, key=losses.get) or losses[str(rate)] == min(losses.values())
    folders = sorted(path.name for path in (tmp_path / "study" / "PVM").iterdir() if path.is_dir())
    assert len(folders) == 3, "each rate at the first seed, the better one at the second"
    assert f"learning_rate_{rate}-seed_1" in folders
    assert "(the outermost that was tried)" in capsys.readouterr().out
    report = json.loads((tmp_path / "study" / "report" / "report.json").read_text())
    assert [model["label"] for model in report["models"]] == ["base", "PVM run 1", "PVM run 2"]

    # The same line again trains nothing, and says that the report is there.
    logs = {log: log.stat().st_size for log in (tmp_path / "study" / "PVM").glob("*.log")}
    study_module.main(["--config", str(file)])
    assert "The report is written" in capsys.readouterr().out
    assert len(logs) == 3 and logs == {log: log.stat().st_size for log in logs}
    # With another recipe it says so, and uses nothing of the old one.
    content = yaml.safe_load(file.read_text())
    changed = {**content, "evaluate": {**content["evaluate"], "max_samples": 1}}
    file.write_text(yaml.safe_dump(changed))
    with pytest.raises(UserError, match="is a report with another max_samples"):
        study_module.main(["--config", str(file)])
    file.write_text(yaml.safe_dump({**content, "train": {**content["train"], "max_steps": 3}}))
    with pytest.raises(UserError, match="was trained with another max_steps than the recipe has now"):
        study_module.main(["--config", str(file)])


def test_a_training_that_fails_is_named(base, conversations, tmp_path):
    methods = {"PVM": {"method": "pvm", "pvm_hidden_size": 32, "learning_rates": [1.0e-3]}}
    file = recipe(tmp_path, base, tmp_path / "nothing", methods=methods)
    with pytest.raises(UserError, match=r"seed_0 ended with an error, see .*\.log: train\.py: error"):
        study_module.main(["--config", str(file)])


def test_a_training_goes_on_from_its_last_checkpoint(base, conversations, tmp_path, monkeypatch):
    run = Run(Study.load(str(recipe(tmp_path, base, conversations))), "PVM", 1.0e-3, 0)
    (run.folder / "checkpoint-1").mkdir(parents=True)
    called = []

    class Result:
        returncode = 0

    monkeypatch.setattr(study_module.subprocess, "run", lambda command, **kwargs: called.append(command) or Result)
    run.train()
    assert "--resume_from_checkpoint=last" in called[0] and not run.finished


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"colour": "red"}, "missing or unknown: `colour`"),
        ({"methods": {"PVM": {"method": "pvm"}}}, "PVM has no `learning_rates`"),
        ({"methods": {"PVM": {"method": "pvm", "learning_rates": ["1e-3"]}}}, "is no number: write 1.0e-3"),
        ({"methods": {"PVM": None}}, "PVM has no `learning_rates`"),
        ({"methods": ["PVM"]}, "`methods` must hold"),
        ({"methods": {"PVM": {"method": "magic", "learning_rates": [1.0e-3]}}}, "`method` must be one of pvm, lora"),
        ({"seeds": 3}, "`seeds` must be a list"),
        ({"seeds": []}, "`seeds` must be a list"),
        ({"train": {"max_steps": 1}}, "`train` lacks `model_name_or_path`"),
    ],
)
def test_what_is_no_recipe_is_refused(base, conversations, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        Study.load(str(recipe(tmp_path, base, conversations, **changes)))
    with pytest.raises(UserError, match="--config .*nothing.yaml"):
        Study.load(str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize("recipe", ["digits_study", "digits_variants"])
def test_recipes_that_ship_are_understood_and_fair(recipe):
    """Every training and the evaluation parse; the shared settings are shared; nobody has more tries than another."""
    study = Study.load(str(study_module.ROOT / "recipes" / f"{recipe}.yaml"))
    for name, method in study.methods.items():
        run = Run(study, name, method["learning_rates"][0], study.seeds[0])
        flags = [*study_module._flags(run.settings), "--output_dir", str(run.folder)]
        model, _, training = parse_arguments((ModelArguments, DataArguments, PVMTrainingArguments), "", flags)
        assert model.method == method["method"] and training.learning_rate == method["learning_rates"][0]
        assert training.per_device_train_batch_size == study.train["per_device_train_batch_size"]
    assert len({len(method["learning_rates"]) for method in study.methods.values()}) == 1
    flags = study_module._flags({**study.evaluate, "model": ["a"], "output_dir": "b"})
    (evaluation,) = parse_arguments((eval_script.EvalArguments,), "", flags)
    assert evaluation.dataset_split == "test" and evaluation.group_by == "task"
