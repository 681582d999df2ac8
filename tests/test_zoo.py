"""The table of checkpoints: what it says is in their files, and what is damaged is one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import EvalResult

import tiny
from hub_server import serve
from pvm.checkpoints.card import Results, write_card
from pvm.checkpoints.zoo import HEADER, main, zoo_page, zoo_row
from pvm.errors import UserError
from training import ROOT


PAGE = ROOT / "docs" / "zoo.md"
SFT = {
    **{"method": "pvm", "base_model": "org/base", "base_revision": None, "step": 2_800, "steps": 2_800},
    **{"datasets": [{"name": "org/data", "on_hub": True, "weight": None}], "arguments": {"image_dropout": 0.5}},
    **{"epochs": 1, "last_loss": 0.1, "trained_parameters": 1, "all_parameters": 2, "hardware": "", "versions": {}},
}
RL = {"name": "questions.jsonl", "on_hub": False, "weight": None}
GRPO = {**SFT, "stage": "grpo", "previous": SFT, "method": "branches", "step": 20, "steps": 40, "datasets": [RL]}
METRIC = EvalResult(
    task_type="image-text-to-text", dataset_type="digits", dataset_name="digits", dataset_split="test",
    metric_type="exact_match", metric_name="exact match, n = 8, 95 % interval 0.400 to 0.600", metric_value=0.5,
)  # fmt: skip

CARD = """---
model-index:
- name: a
  results: [{{task: {{type: a}}, dataset: {{type: a, name: a}}, metrics: [{{type: accuracy, value: {value}}}]}}]
---
"""


def write(folder: Path, record: dict | None = SFT, results: list[Results] = (), **pvm_fields) -> str:
    """A checkpoint's small files."""
    folder.mkdir()
    config = tiny.pvm_config(**pvm_fields)
    config.base_model_name_or_path = "/data/base"
    config.save_pretrained(folder)
    if record is not None:
        (folder / "training.json").write_text(json.dumps(record))
        write_card(folder, folder.name, results)
    return str(folder)


def columns(name: str) -> dict[str, str]:
    return dict(zip(HEADER, zoo_row(name), strict=True))


def test_a_row(tmp_path):
    assert columns(write(tmp_path / "mine", results=[Results("", [METRIC, METRIC])])) == {
        "checkpoint": "mine",
        "base": "[org/base](https://huggingface.co/org/base)",
        "stages": "SFT: pvm, step 2,800",
        "image dropout": "with, 0.5",
        "data": "org/data",
        "results": "<br>".join(["digits, test, exact match, n = 8, 95 % interval 0.400 to 0.600: **0.5**"] * 2),
    }


def test_other_trainings(tmp_path):
    found = columns(write(tmp_path / "grpo", GRPO, pvm_block="token_gate"))
    assert found["stages"] == "SFT: pvm (token_gate), step 2,800; then GRPO: branches (token_gate), step 20 of 40"
    assert found["image dropout"] == "with, 0.5" and found["results"] == "not evaluated"
    assert found["data"] == "org/data; questions.jsonl (a local file)"
    found = columns(write(tmp_path / "published", {**SFT, "base_model": None, "arguments": {}}))
    assert (found["base"], found["image dropout"]) == ("base", "without")
    found = columns(write(tmp_path / "no_record", None, pvm_training={**SFT, "image_dropout": 1.0, "step": 7}))
    assert (found["stages"], found["image dropout"], found["data"]) == ("SFT: pvm, step 7", "with, 1", "not recorded")
    assert columns(write(tmp_path / "unknown", None))["stages"] == "not recorded"


def test_a_card_of_others(tmp_path):
    name = write(tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text(CARD.format(value=71.25))
    assert columns(name)["results"] == "a, accuracy: **71.25**"


def test_names_stay_in_their_cells(tmp_path):
    record = {**SFT, "datasets": [{"name": "a|b\n<script>", "on_hub": True, "weight": None}]}
    assert columns(write(tmp_path / "mine", record))["data"] == "a\\|b &lt;script>"


def test_the_page(tmp_path, capsys):
    name, output = write(tmp_path / "mine"), tmp_path / "zoo.md"
    main([name, name, "--output", str(output)])
    page = output.read_text()
    assert page == zoo_page([zoo_row(name)] * 2) and page.count("\n| mine |") == 2
    main(["--output", str(output)])
    assert output.read_text() == zoo_page([]) and "None yet." in zoo_page([])
    capsys.readouterr()
    main([name])
    assert capsys.readouterr().out == zoo_page([zoo_row(name)])
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(UserError, match="README.md is not a page of this command"):
        main(["--output", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_the_page_of_the_documentation():
    """Is of this version of the command; its rows change with the demo."""
    assert PAGE.read_text().partition("\n| ")[0] in (zoo_page([HEADER]).partition("\n| ")[0], zoo_page([]))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("training.json", "[]", "does not hold a JSON object"),
        ("training.json", '{"method": "pvm"}', "is damaged: KeyError"),
        ("training.json", json.dumps({**SFT, "step": "many"}), "is damaged: "),
        ("training.json", json.dumps({**SFT, "arguments": {"image_dropout": [1]}}), "is damaged: "),
        ("training.json", json.dumps({**SFT, "datasets": [1]}), "is damaged: "),
        ("training.json", json.dumps({**SFT, "stage": "grpo", "previous": 1}), "is damaged: "),
        ("config.json", '{"model_type": "bert"}', "has the model type 'bert'"),
        ("config.json", "", "is not valid JSON"),
        ("README.md", "---\nmodel-index: [1]\n---\n", "is not a model card"),
        ("README.md", "---\n{\n---\n", "is not a model card"),
        ("README.md", CARD.format(value="[1]"), "is not a model card"),
    ],
)
def test_damaged_files(tmp_path, file, content, says):
    name = write(tmp_path / "mine")
    (tmp_path / "mine" / file).write_text(content)
    with pytest.raises(UserError, match=says) as error:
        main([name, "--output", str(tmp_path / "zoo.md")])
    assert name in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "zoo.md").exists()


def test_folders_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, says in ((tmp_path / "empty", "is not a checkpoint"), (tmp_path / "gone", "There is no folder")):
        with pytest.raises(UserError, match=says):
            zoo_row(str(name))


def test_a_checkpoint_on_the_hub(tmp_path):
    write(tmp_path / "mine", results=[Results("", [METRIC])])
    with serve() as hub:
        hub.add("org/mine", tmp_path / "mine")
        environment = hub.environment(tmp_path / "home")
        command = [sys.executable, "-m", "pvm", "zoo", "org/mine"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    row = zoo_row(str(tmp_path / "mine"))
    assert result.stdout == zoo_page([["[org/mine](https://huggingface.co/org/mine)", *row[1:]]])
