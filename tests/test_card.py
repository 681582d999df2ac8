"""The model card and the record of a training: true, complete, and without paths of this machine."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

import eval as eval_script
from pvm.checkpoints import card
from pvm.checkpoints.names import public_name
from pvm.checkpoints.push import checkpoint_files
from pvm.errors import UserError
from training import PVM, run


BASE = "org/tiny-base"


@pytest.fixture(scope="module")
def checkpoint(base, conversations, tmp_path_factory):
    """A PVM run on a copy of a base that is on the Hub, by its name there."""
    flags = (*PVM, "--base_model_id", BASE, "--save_steps", "2", "--gate_learning_rate", "0.05")
    return run(base, conversations, tmp_path_factory.mktemp("card") / "my-pvm", *flags)


@pytest.fixture(scope="module")
def report(base, checkpoint, conversations, tmp_path_factory):
    """A report on the base and the checkpoint, whose base is here and not on the Hub."""
    copy = tmp_path_factory.mktemp("evaluated") / "copy"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    output_dir = copy.parent / "eval"
    eval_script.main(
        ["--model", str(base), str(copy), "--names", "base", "PVM", "--dataset_name", str(conversations),
         "--dataset_split", "train", "--output_dir", str(output_dir), "--max_new_tokens", "4"]
    )  # fmt: skip
    return copy, output_dir / "report.json"


def test_every_checkpoint_has_a_card_and_a_record(checkpoint):
    for folder, step in ((checkpoint, 4), (checkpoint / "checkpoint-2", 2)):
        record = json.loads((folder / card.RECORD).read_text())
        assert (record["step"], record["steps"], record["method"]) == (step, 4, "pvm")
        assert record["base_model"] == BASE and record["base_revision"] is None
        assert record["datasets"] == [{"name": "data.jsonl", "on_hub": False, "weight": None}]
        assert record["trained_parameters"] == 77187 < record["all_parameters"]
        assert record["arguments"]["learning_rate"] == 1e-3 and record["last_loss"] > 0
        text = (folder / "README.md").read_text()
        assert ("Training in progress: step 2 of 4" in text) == (step == 2)


def test_the_card_s_metadata(checkpoint):
    loaded = ModelCard.load(checkpoint / "README.md")
    data = loaded.data
    assert (data.base_model, data.base_model_relation) == (BASE, "adapter")
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers", "image-text-to-text", "apache-2.0")  # fmt: skip
    assert "custom_code" in data.tags and data.datasets is None and data.eval_results is None
    assert "# my-pvm" in loaded.text and "Not evaluated yet." in loaded.text


def test_the_card_tells_the_gates_that_are_in_the_weights(checkpoint):
    text = (checkpoint / "README.md").read_text()
    gates = card.read_gates(checkpoint)
    assert list(gates) == [1, 2, 3] and all(gates.values())
    for layer, gate in gates.items():
        assert f"| {layer} | {gate:+.4f} |" in text


def test_results_come_from_a_report(report):
    checkpoint, path = report
    card.main([str(checkpoint), "--report", str(path), "--name", "me/my-pvm", "--license", "mit"])
    loaded = ModelCard.load(checkpoint / "README.md")
    content = json.loads(path.read_text())
    (result,) = loaded.data.eval_results
    assert result.metric_value == round(content["overall"]["PVM"]["accuracy"], 4)
    assert (result.dataset_name, result.metric_type) == ("data.jsonl", "exact_match")
    assert "95 % interval" in result.metric_name and loaded.data.license == "mit"
    assert loaded.data.to_dict()["model-index"][0]["name"] == "my-pvm"
    assert "this checkpoint is **PVM**" in loaded.text and 'from_pretrained("me/my-pvm"' in loaded.text
    assert "PVM − base" in loaded.text and "![Accuracy" in loaded.text  # noqa: RUF001
    assert (checkpoint / card.PICTURE).is_file() and card.PICTURE in checkpoint_files(checkpoint)


def test_a_run_of_several_gives_its_own_number(report, tmp_path):
    checkpoint, path = report
    content = json.loads(path.read_text())
    content["overall"]["PVM"] |= {"accuracy": 0.5, "by_run": [0.25, 0.75]}
    (mine,) = (model for model in content["models"] if model["name"] == "PVM")
    content["models"].append({**mine, "path": "elsewhere", "run": 0})
    mine["run"] = 1
    (tmp_path / "report.json").write_text(json.dumps(content))
    card.main([str(checkpoint), "--report", str(tmp_path / "report.json")])
    (result,) = ModelCard.load(checkpoint / "README.md").data.eval_results
    assert result.metric_value == 0.75 and "2 runs: 0.500" in result.metric_name


def test_a_report_on_another_checkpoint_is_refused(checkpoint, report, tmp_path):
    with pytest.raises(UserError, match="is none of them"):
        card.main([str(checkpoint), "--report", str(report[1])])
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UserError, match="no report.json of eval.py"):
        card.main([str(checkpoint), "--report", str(tmp_path / "report.json")])
    with pytest.raises(UserError, match="is no checkpoint"):
        card.main([str(tmp_path)])


@pytest.mark.parametrize("method", ["pvm", "pvm+lora", "mlp", "lora", "full"])
def test_no_path_of_this_machine_is_in_what_is_pushed(base, conversations, tmp_path, method):
    flags = PVM if "pvm" in method or method == "mlp" else ()
    folder = run(base, conversations, tmp_path / "run", *flags, "--method", method, "--base_model_id", BASE)
    names = checkpoint_files(folder)
    assert {"README.md", "training.json", "tokenizer.json", "processor_config.json"} <= set(names)
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth")) or "trainer_state" in name}
    for name in names:
        content = (folder / name).read_bytes()
        for path in (base.parent, conversations.parent, tmp_path):
            assert str(path).encode() not in content, f"{name} names {path}"
    text = (folder / "README.md").read_text()
    assert f"[{BASE}]" in text
    assert ModelCard.load(folder / "README.md").data.base_model_relation == (
        "finetune" if method == "full" else "adapter"
    )


def test_the_record_is_there_without_a_hub_name(base, conversations, tmp_path):
    folder = run(base, conversations, tmp_path / "run", *PVM)
    assert json.loads((folder / card.RECORD).read_text())["base_model"] is None
    assert ModelCard.load(folder / "README.md").data.base_model is None
    assert "a base that is not on the Hub" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "on_hub"),
    [
        ("org/data", True),
        ("squad", True),
        ("/gone/since/rows.parquet", False),
        ("gone/rows.jsonl", False),
        ("../x", False),
    ],
)
def test_no_path_is_taken_for_a_hub_name(name, on_hub):
    """Also where the file is gone by the time of a save."""
    assert public_name(name)["on_hub"] == on_hub and (on_hub or "/" not in public_name(name)["name"])
