"""The model card and the record of a training: true, complete, and without paths of this machine."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import eval as eval_script
import tiny
from pvm.checkpoints.card import read_gates, write_card
from pvm.checkpoints.names import public_name
from pvm.checkpoints.push import checkpoint_files, push
from pvm.checkpoints.record import RECORD, read_record
from pvm.errors import UserError
from pvm.evaluation import card
from training import PVM, run


BASE = "org/tiny-base"
METHODS = ("pvm", "pvm+lora", "lora", "full")


@pytest.fixture(scope="module")
def runs(base, conversations, tmp_path_factory) -> dict[str, Path]:
    """A training by each method, on a copy of a base that is on the Hub, by its name there."""
    folder = tmp_path_factory.mktemp("card")
    flags = ("--base_model_id", BASE, "--save_steps", "2", "--max_steps", "4")
    return {
        method: run(
            base, conversations, folder / method, *(PVM if "pvm" in method else ()), "--method", method, *flags
        )
        for method in METHODS
    }


@pytest.fixture(scope="module")
def report(base, runs, conversations, tmp_path_factory):
    """A report on the base and the PVM checkpoint, with the base's folder for its name."""
    copy = tmp_path_factory.mktemp("evaluated") / "copy"
    shutil.copytree(runs["pvm"], copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    output_dir = copy.parent / "eval"
    eval_script.main(
        ["--model", str(base), str(copy), "--names", "base", "PVM", "--dataset_name", str(conversations),
         "--dataset_split", "train", "--output_dir", str(output_dir), "--max_new_tokens", "4"]
    )  # fmt: skip
    return copy, output_dir / "report.json"


def test_every_checkpoint_has_a_card_and_a_record(runs):
    for folder, step in ((runs["pvm"], 4), (runs["pvm"] / "checkpoint-2", 2)):
        record = read_record(folder)
        assert (record["step"], record["steps"], record["method"]) == (step, 4, "pvm")
        assert record["base_model"] == BASE and record["base_revision"] is None
        assert record["datasets"] == [{"name": "data.jsonl", "on_hub": False, "weight": None}]
        assert record["trained_parameters"] == 77187 < record["all_parameters"]
        assert record["arguments"]["learning_rate"] == 1e-3 and record["last_loss"] > 0
        text = (folder / "README.md").read_text()
        assert ("Training in progress: step 2 of 4" in text) == (step == 2)


def test_the_card_s_metadata(runs):
    loaded = ModelCard.load(runs["pvm"] / "README.md")
    data = loaded.data
    assert (data.base_model, data.base_model_relation) == (BASE, "adapter")
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers", "image-text-to-text", "apache-2.0")  # fmt: skip
    assert "custom_code" in data.tags and data.datasets is None and data.eval_results is None
    assert "# pvm" in loaded.text and "Not evaluated yet." in loaded.text


def test_the_card_gives_the_gates_in_the_weights(runs):
    text = (runs["pvm"] / "README.md").read_text()
    gates = read_gates(runs["pvm"])
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


def test_a_report_on_another_checkpoint_is_refused(runs, report, tmp_path):
    with pytest.raises(UserError, match="is not one of them"):
        card.main([str(runs["pvm"]), "--report", str(report[1])])
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UserError, match="is not a report.json written by eval.py"):
        card.main([str(runs["pvm"]), "--report", str(tmp_path / "report.json")])
    with pytest.raises(UserError, match="is not a checkpoint"):
        card.main([str(tmp_path)])


@pytest.mark.parametrize("method", METHODS)
def test_no_path_of_this_machine_is_in_what_is_pushed(runs, base, conversations, method):
    names = checkpoint_files(runs[method])
    assert {"README.md", "training.json", "tokenizer.json", "processor_config.json"} <= set(names)
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth")) or "trainer_state" in name}
    for name in names:
        content = (runs[method] / name).read_bytes()
        for path in (base.parent, conversations.parent, runs[method].parent):
            assert str(path).encode() not in content, f"{name} mentions {path}"
    text = (runs[method] / "README.md").read_text()
    assert f"[{BASE}]" in text and "unknown training" not in text
    relation = ModelCard.load(runs[method] / "README.md").data.base_model_relation
    assert relation == ("finetune" if method == "full" else "adapter")


def test_a_base_without_a_hub_name(base, conversations, tmp_path):
    """Is not in the record or the card, and the checkpoint is not pushed."""
    folder = run(base, conversations, tmp_path / "run", *PVM, "--max_steps", "1")
    assert read_record(folder)["base_model"] is None and str(base) not in (folder / RECORD).read_text()
    assert ModelCard.load(folder / "README.md").data.base_model is None
    assert "a model that is not on the Hub" in (folder / "README.md").read_text()
    with pytest.raises(UserError, match=f"mentions {base}, a path of this machine"):
        push(folder, "me/pvm", "Not to be pushed")


@pytest.mark.parametrize("block", ["pvm", "parallel_mlp"])
def test_a_variant_says_what_it_is(tmp_path, block):
    """By its docstring; the block of the paper is not called a variant."""
    tiny.build(pvm_block=block).save_pretrained(tmp_path)
    write_card(tmp_path, "model")
    text = (tmp_path / "README.md").read_text()
    assert ("The branches of this checkpoint are a variant." in text) == (block != "pvm")
    assert f"| kind of branch | {block}: " in text and "Not recorded." in text
    assert 'AutoModelForImageTextToText.from_pretrained("model", trust_remote_code=True)' in text


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
