"""eval.py --tasks: real runs of lmms-eval on a tiny local task; nothing is downloaded."""

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as DatasetImage
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import eval as eval_script
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration, pvm_blocks
from pvm.checkpoints.loading import load_checkpoint
from pvm.errors import UserError
from pvm.lmms.report import compare, resample, t_interval
from pvm.lmms.run import PAPER, BenchmarkArguments, task_names
from pvm.training.methods import LORA_TARGETS


lmms_eval = pytest.importorskip("lmms_eval")

from lmms_eval.models.chat.qwen3_vl import Qwen3_VL  # noqa: E402
from lmms_eval.models.registry_v2 import ModelRegistryV2  # noqa: E402

from pvm.lmms.model import Qwen3VLPVM  # noqa: E402


QUESTIONS = 8
TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function {name}.visual
doc_to_text: !function {name}.text
doc_to_target: answer
process_results: !function {name}.score
generation_kwargs:
  max_new_tokens: 6
  temperature: 0
  top_p: 0
metric_list:
  - metric: even
    aggregation: mean
    higher_is_better: true
  - metric: by_cell
    aggregation: !function {name}.by_cell
    higher_is_better: true
  - metric: submission
    aggregation: !function {name}.submit
    higher_is_better: true
metadata:
  version: 1.0
"""
# A score that is not always 0 for an untrained model: whether the length of an answer is even.
SCORING = """
from lmms_eval.tasks._task_utils.file_utils import generate_submission_file


def visual(doc):
    return [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def score(doc, results):
    even = len(results[0]) % 2 == 0
    return {"even": float(even), "by_cell": {"cell": doc["question"], "even": even}, "submission": results[0]}

def by_cell(results):
    cells = {}
    for result in results:
        cells.setdefault(result["cell"], []).append(result["even"])
    return 100 * sum(sum(scores) / len(scores) for scores in cells.values()) / len(cells)

def submit(results, args):
    with open(generate_submission_file("answers.txt", args), "w") as file:
        file.write("\\n".join(results))
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with a task `boards` of eight questions; its `top_p: 0` would make sampling greedy."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "image": Image.fromarray(np.random.default_rng(k).integers(256, size=(64, 64, 3), dtype=np.uint8)),
            "question": f"Cell {('alpha', 'bravo')[k % 2]}?",
            "answer": str(k),
        }
        for k in range(QUESTIONS)
    ]
    features = Features({"image": DatasetImage(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(folder / "boards.parquet")
    (folder / "boards.yaml").write_text(TASK.format(name="boards", data=folder / "boards.parquet"))
    (folder / "boards.py").write_text(SCORING)
    return folder


@pytest.fixture(scope="module")
def pvm_folder(base, tmp_path_factory) -> Path:
    """A whole PVM checkpoint of the same backbone with large gates."""
    return save_pvm(base, tmp_path_factory.mktemp("pvm"), gate=2.0)


def save_pvm(base: Path, folder: Path, gate: float) -> Path:
    config = Qwen3VLPVMForConditionalGeneration.config_class.from_stock(
        Qwen3VLConfig.from_pretrained(base), pvm_layers=[1, 2], pvm_hidden_size=64
    )
    torch.manual_seed(0)
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(base, config=config)
    for block in pvm_blocks(model).values():
        torch.nn.init.constant_(block.gate_alpha, gate)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


def run(models: dict[str, Path], tasks: Path, folder: Path, *flags: str) -> dict:
    """lmms.json of eval.py --tasks boards."""
    eval_script.main(
        [
            *("--model", *map(str, models.values()), "--names", *models, "--output_dir", str(folder)),
            *("--tasks", "boards", "--task_path", str(tasks), *flags),
        ]
    )
    return json.loads((folder / "lmms.json").read_text())


def answers(folder: Path, name: str, seed: int = 0) -> list[str]:
    stored = json.loads((folder / "lmms_runs" / name / "boards" / f"seed_{seed}.json").read_text())
    return [question["submission"] for question in stored["questions"]]


@pytest.fixture(scope="module")
def greedy(base, pvm_folder, tasks, tmp_path_factory) -> tuple[dict, Path]:
    """The report of one greedy run, and its folder."""
    folder = tmp_path_factory.mktemp("greedy")
    off = save_pvm(base, folder / "off", gate=0.0)
    return run({"base": base, "PVM": pvm_folder, "off": off}, tasks, folder), folder


@pytest.fixture(scope="module")
def sampled(base, pvm_folder, tasks, tmp_path_factory) -> tuple[dict, Path]:
    """The report of two runs at temperature 0.7, and its folder."""
    folder = tmp_path_factory.mktemp("sampled")
    flags = ("--temperature", "0.7", "--runs", "2", "--seed", "3", "--batch_size", "3")
    return run({"base": base, "PVM": pvm_folder}, tasks, folder, *flags), folder


# --- the model -------------------------------------------------------------------------------------------------------


def test_classes(base, pvm_folder, tmp_path):
    lora = get_peft_model(
        Qwen3VLForConditionalGeneration.from_pretrained(base),
        LoraConfig(r=4, target_modules=LORA_TARGETS, init_lora_weights=False),
    )
    lora.save_pretrained(tmp_path)
    assert type(Qwen3VLPVM(str(base)).model) is Qwen3VLForConditionalGeneration
    assert type(Qwen3VLPVM(str(pvm_folder)).model) is Qwen3VLPVMForConditionalGeneration
    assert type(Qwen3VLPVM(str(tmp_path), dtype="bfloat16").model) is PeftModel


def test_lmms_evals_own_class_would_drop_the_branches(pvm_folder):
    """The reason for our own class. If this fails, lmms-eval has learnt to load branches or to refuse them."""
    model = Qwen3_VL(str(pvm_folder), device="cpu", device_map="cpu").model
    assert type(model) is Qwen3VLForConditionalGeneration and not pvm_blocks(model)


def test_branches_under_a_stock_config_are_refused(pvm_folder, tmp_path):
    for file in pvm_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    stock = {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "auto_map": {}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **stock}))
    with pytest.raises(UserError, match="holds PVM weights"):
        Qwen3VLPVM(str(tmp_path))


def test_the_entry_point_names_a_class_that_lmms_eval_accepts():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    (value,) = project["entry-points"]["lmms_eval.models"].values()
    registry = ModelRegistryV2()
    registry.register_manifest(EntryPoint("qwen3_vl_pvm", value, "lmms_eval.models").load())
    assert registry.get_model_class("qwen3_vl_pvm") is Qwen3VLPVM


# --- answers ---------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_the_models_own(greedy, pvm_folder, tasks):
    """The same tokens as for the same chat outside lmms-eval."""
    checkpoint = load_checkpoint(str(pvm_folder))
    expected = []
    for row in Dataset.from_parquet(str(tasks / "boards.parquet")):
        content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["question"]}]
        system = {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]}
        inputs = checkpoint.processor.apply_chat_template(
            [system, {"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"do_resize": False},
        )
        tokens = checkpoint.model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
        expected += checkpoint.processor.batch_decode(tokens, skip_special_tokens=True)
    assert answers(greedy[1], "PVM") == [answer.strip() for answer in expected]


def test_gates_decide(greedy):
    report, folder = greedy
    assert answers(folder, "off") == answers(folder, "base") != answers(folder, "PVM")
    assert [model["model_class"] for model in report["models"]] == [
        "Qwen3VLForConditionalGeneration",
        *["Qwen3VLPVMForConditionalGeneration"] * 2,
    ]
    assert [model["gates_on"] for model in report["models"]] == [None, True, False]


def test_temperature_samples_and_seeds_act(greedy, sampled, pvm_folder, tasks, tmp_path):
    folder = sampled[1]
    for name in ("base", "PVM"):
        assert answers(folder, name, 3) != answers(folder, name, 4)
        assert answers(greedy[1], name) not in (answers(folder, name, 3), answers(folder, name, 4))
    run({"PVM": pvm_folder}, tasks, tmp_path, "--temperature", "0.7", "--seed", "4", "--batch_size", "3")
    assert answers(tmp_path, "PVM", 4) == answers(folder, "PVM", 4)


# --- the report ------------------------------------------------------------------------------------------------------


def test_report(sampled):
    report, folder = sampled
    assert report["seeds"] == [3, 4] and report["generation"].startswith("temperature=0.7,do_sample=True,top_p=0.8")
    metrics = report["tasks"]["boards"]["metrics"]
    assert set(metrics) == {"even,none", "by_cell,none"}, "metrics that are not numbers are left to lmms-eval"
    for name in ("base", "PVM"):
        shares = [np.mean([len(answer) % 2 == 0 for answer in answers(folder, name, seed)]) for seed in (3, 4)]
        even, by_cell = (metrics[metric]["models"][name] for metric in ("even,none", "by_cell,none"))
        assert even["runs"] == pytest.approx(shares) and even["mean"] == pytest.approx(np.mean(shares))
        low, high = even["interval"]
        assert low <= even["mean"] <= high and low < high
        assert by_cell["mean"] == pytest.approx(100 * even["mean"]) and by_cell["interval"] is not None
    gain = metrics["even,none"]["differences"]["PVM"]
    assert gain["interval"][0] <= gain["difference"] <= gain["interval"][1]
    assert (folder / "lmms_runs" / "PVM" / "boards" / "seed_4" / "submissions" / "answers.txt").exists()
    text = (folder / "lmms.md").read_text()
    assert "temperature 0.7, 2 runs (seeds 3, 4)" in text and "| boards: even | 8 |" in text and "## Runs" in text


def test_intervals_by_hand(tasks):
    class Task:
        """The part of lmms-eval's class that is used here."""

        def aggregation(self):
            return {"right": np.mean, "odd": lambda values: 0.5}

    def made(values):
        questions = [{"doc_id": k, "right": value, "odd": value} for k, value in enumerate(values)]
        return {"metrics": {"right,none": np.mean(values), "odd,none": 0.1}, "questions": questions}

    runs = {"a": [made([0, 0, 1, 1])] * 2, "b": [made([1, 1, 1, 1])] * 2}
    result = compare(Task(), "right,none", runs)
    assert result["n"] == 4 and result["differences"]["b"]["difference"] == 0.5
    assert result["differences"]["b"]["interval"] == [0.0, 1.0]
    assert result["models"]["b"]["interval"] == [1.0, 1.0] and result["models"]["a"]["t_interval"] == [0.5, 0.5]
    assert compare(Task(), "odd,none", runs)["models"]["a"]["interval"] is None, "not computed from these questions"
    means = resample({"a": [[0.0, 1, 1, 0, 1, 1, 0, 1]]}, np.mean)["a"][0]
    assert np.quantile(means, [0.025, 0.975]).tolist() == [0.25, 0.875], "seeded"
    assert t_interval([1.0]) is None
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx([2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5])


# --- resuming and refusals -------------------------------------------------------------------------------------------


def test_finished_runs_are_kept(sampled, base, pvm_folder, tasks):
    report, folder = sampled
    models = {"base": base, "PVM": pvm_folder}
    flags = ("--temperature", "0.7", "--runs", "2", "--seed", "3", "--batch_size", "3")
    files = {file: file.stat().st_mtime_ns for file in folder.glob("lmms_runs/*/boards/seed_*.json")}
    lost = folder / "lmms_runs" / "PVM" / "boards" / "seed_4.json"
    assert len(files) == 4
    lost.unlink()
    assert run(models, tasks, folder, *flags) == report, "a repeated run is the same"
    assert [file for file, time in files.items() if file.stat().st_mtime_ns != time] == [lost]

    with pytest.raises(UserError, match=r"temperature 0\.7, and not 0\.5.*--overwrite"):
        run(models, tasks, folder, "--temperature", "0.5", *flags[2:])
    with pytest.raises(UserError, match=r"max_samples None, and not 4"):
        run(models, tasks, folder, *flags, "--max_samples", "4")
    with pytest.raises(UserError, match=r"seed_3\.json was made with model .*, and not"):
        run({"base": pvm_folder}, tasks, folder, *flags)
    (tasks / "boards.py").touch()
    (pvm_folder / "config.json").touch()
    with pytest.raises(UserError, match="made with another state of this checkpoint"):
        run(models, tasks, folder, *flags)
    fewer = run(
        {"PVM": pvm_folder}, tasks, folder, *flags[:2], "--seed", "4", "--max_samples", "4", "--overwrite", "true"
    )
    assert fewer["tasks"]["boards"]["metrics"]["even,none"]["n"] == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "paper"], r"mmbench_cn_dev_lite, mmbench_en_dev_lite, mathverse.*Set OPENAI_API_KEY"),
        (["--tasks", "mmstar", "--runs", "3"], r"--runs 3 gives the same answers"),
        (["--tasks", "mmstar", "--top_p", "0.9"], r"--top_p does nothing at --temperature 0"),
        (["--tasks", "mmstar", "--temperature", "-1"], r"--temperature -1"),
        (["--tasks", "mmstar", "--task_path", "nowhere"], r"--task_path nowhere: this is not a folder"),
        (["--tasks", "mmstar", "--match", "choice"], r"--match is about a data set, and does nothing with --tasks"),
        (["--tasks", "mmstar", "--dataset_name", "x"], r"--dataset_name is about a data set"),
        (["--dataset_name", "x", "--temperature", "0.7"], r"--temperature does nothing without --tasks"),
        ([], r"give --dataset_name or --tasks"),
        (["--tasks", "mmstar", "--model", "nowhere/nothing"], r"nowhere/nothing is not a folder"),
    ],
)
def test_refusals(base, tmp_path, monkeypatch, flags, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=message):
        eval_script.main(["--model", str(base), "--output_dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_waiting(monkeypatch):
    """lmms-eval waits between its attempts."""
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_waiting")
def test_a_task_that_cannot_score_is_refused_before_a_model_is_loaded(base, tasks, tmp_path):
    """Like MathVision with another latex2sympy2 than that of requirements-lmms.txt."""
    (tmp_path / "boards.yaml").write_text((tasks / "boards.yaml").read_text())
    (tmp_path / "boards.py").write_text(SCORING.replace("len(results[0])", "length(results[0])"))
    with pytest.raises(UserError, match=r"cannot score answers here \(NameError: name 'length' is not defined\)"):
        run({"nothing": base}, tmp_path, tmp_path / "out")


@pytest.mark.usefixtures("no_waiting")
def test_missing_data(base, tasks, tmp_path):
    (tmp_path / "boards.yaml").write_text((tasks / "boards.yaml").read_text().replace("boards.parquet", "no.parquet"))
    (tmp_path / "boards.py").write_text(SCORING)
    with pytest.raises(UserError, match=r"--tasks boards: its data could not be loaded: .*no\.parquet"):
        run({"nothing": base}, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("package", ["lmms_eval", "decord"])
def test_without_the_extra(base, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"which is not installed: pip install -r requirements-lmms\.txt"):
        eval_script.main(["--model", str(base), "--output_dir", str(tmp_path), "--tasks", "mmstar"])


def test_unknown_tasks_are_refused_and_the_papers_are_known(base, tmp_path, monkeypatch):
    flags = BenchmarkArguments(tasks=["paper", "mmstar,ai2d"])
    assert task_names(flags) == [*PAPER.values(), "ai2d"] and len(PAPER) == 8
    monkeypatch.setenv("OPENAI_API_KEY", "for the judge")
    with pytest.raises(UserError, match="--tasks mmstarr: .* no such task. Did you mean mmstar"):
        flags = ["--tasks", "paper,mmstarr", "--output_dir", str(tmp_path / "out")]  # the first unknown one is named
        eval_script.main(["--model", str(base), *flags])
    assert not (tmp_path / "out").exists()
