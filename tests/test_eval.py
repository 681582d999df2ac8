"""eval.py: what it loads and refuses, how models answer, and what it writes."""

import json
import random
import re
import runpy
import shutil
import sys
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as DatasetImage
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import eval as eval_script
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration, pvm_blocks
from pvm.checkpoints.loading import load_checkpoint
from pvm.checkpoints.names import checkpoint_kind
from pvm.data.encoding import processor_state
from pvm.data.sources import load_conversations
from pvm.errors import UserError
from pvm.evaluation import questions as questions_module
from pvm.evaluation.answering import answer, make_batches, read_journal
from pvm.evaluation.arguments import EvalArguments
from pvm.evaluation.progress import Progress
from pvm.evaluation.questions import Prompts, read_questions
from pvm.evaluation.scoring import Entry, score_all
from pvm.files import locked
from pvm.training.methods import LORA_TARGETS
from pvm.worlds.backbone import build_backbone


REFERENCE_CASE = Path(__file__).parent / "reference_case"
GATE = 0.25
FILLER = "red house " * 20


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A stock checkpoint: an untrained digits backbone whose generation config samples."""
    folder = tmp_path_factory.mktemp("base")
    model, processor = build_backbone()
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, top_p=0.9, eos_token_id=ends)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pvm_folder(base, tmp_path_factory) -> Path:
    """A PVM checkpoint of the same backbone, with training metadata."""
    return save_pvm(base, tmp_path_factory.mktemp("pvm"), GATE, {"method": "pvm", "step": 7})


def save_pvm(base: Path, folder: Path, gate: float, training: dict | None) -> Path:
    config = Qwen3VLPVMConfig.from_stock(Qwen3VLConfig.from_pretrained(base), pvm_layers=[1, 2], pvm_hidden_size=64)
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(base, config=config)
    for block in pvm_blocks(model).values():
        torch.nn.init.constant_(block.gate_alpha, gate)
    model.config.text_config.pvm_training = training
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_folder(base, tmp_path_factory) -> Path:
    """A LoRA adapter for the stock checkpoint, without a processor."""
    folder = tmp_path_factory.mktemp("adapter")
    model = Qwen3VLForConditionalGeneration.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=LORA_TARGETS, init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


def conversation(question: str, answer: str, task: str, seed: int | None) -> dict:
    """A row with a random image, or without one if `seed` is `None`."""
    content = [{"type": "text", "text": question}]
    images = []
    if seed is not None:
        content = [{"type": "image", "text": None}, *content]
        pixels = np.random.default_rng(seed).integers(256, size=(32, 32, 3), dtype=np.uint8)
        images = [Image.fromarray(pixels)]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return {"images": images, "messages": messages, "task": task}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six cells at two distances, five answers of four pieces, and a question without an image."""
    folder = tmp_path_factory.mktemp("data")
    rows = [conversation(f"{filler}Cell?", str(seed), "cell", seed) for filler in ("", FILLER) for seed in range(3)]
    rows += [
        conversation("Read.", " ".join(f"the digit {seed + k}" for k in range(4)), "read", seed) for seed in range(5)
    ]
    rows.append(conversation("Cell?", "1", "cell", None))
    features = Features(
        {
            "images": List(DatasetImage()),
            "messages": List(
                {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
            ),
            "task": Value("string"),
        }
    )
    Dataset.from_list(rows, features=features).to_parquet(folder / "test.parquet")
    return folder


def copy_of(source: Path, target: Path, config: dict | None = None, drop: str | None = None) -> Path:
    """A checkpoint with fields of its config replaced, without the weights whose names contain `drop`."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    if config is not None:
        stored = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**stored, **config}))
    if drop is not None:
        (weights,) = target.glob("*.safetensors")
        kept = {name: weight for name, weight in load_file(weights).items() if drop not in name}
        save_file(kept, weights, metadata={"format": "pt"})
    return target


# --- loading ---------------------------------------------------------------------------------------------------------


def test_stock_checkpoint(base):
    checkpoint = load_checkpoint(str(base))
    assert type(checkpoint.model) is Qwen3VLForConditionalGeneration and not checkpoint.model.training
    assert checkpoint.description.kind == "stock" and checkpoint.description.gates_on is None
    assert not checkpoint.model.generation_config.do_sample


def test_pvm_checkpoint(pvm_folder):
    checkpoint = load_checkpoint(str(pvm_folder))
    description = checkpoint.description
    assert type(checkpoint.model) is Qwen3VLPVMForConditionalGeneration
    assert (description.kind, description.method, description.step) == ("pvm", "pvm", 7)
    assert description.gates == {"1": GATE, "2": GATE} and description.gates_on


def test_reference_checkpoint_is_known_by_its_architectures():
    assert json.loads((REFERENCE_CASE / "config.json").read_text())["model_type"] == "qwen3_vl"
    assert checkpoint_kind(str(REFERENCE_CASE)) == "pvm"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter(base, adapter_folder, dtype):
    """Merged in float32, wrapped in smaller dtypes; its config names the base, which also has the processor."""
    checkpoint = load_checkpoint(str(adapter_folder), dtype)
    description = checkpoint.description
    assert (description.kind, description.method, description.base) == ("peft", "lora", str(base))
    assert description.model_class == "Qwen3VLForConditionalGeneration" and description.dtype == dtype
    assert isinstance(checkpoint.model, PeftModel) == (dtype == "bfloat16")
    assert processor_state(checkpoint.processor) == processor_state(load_checkpoint(str(base)).processor)

    stock = Qwen3VLForConditionalGeneration.from_pretrained(base, dtype=dtype).eval()
    reference = PeftModel.from_pretrained(stock, adapter_folder)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == "float32" else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(checkpoint.model(ids).logits, reference(ids).logits, **tolerance)


def test_step_of_a_control_comes_from_its_trainer(adapter_folder, tmp_path):
    folder = copy_of(adapter_folder, tmp_path / "adapter")
    (folder / "trainer_state.json").write_text('{"global_step": 12}')
    assert load_checkpoint(str(folder)).description.step == 12


@pytest.mark.parametrize("training", [{"method": "pvm", "step": 7}, None], ids=["trained", "untrained"])
def test_pvm_checkpoint_without_its_weights_is_refused(base, pvm_folder, tmp_path, training):
    text_config = {**json.loads((pvm_folder / "config.json").read_text())["text_config"], "pvm_training": training}
    stripped = copy_of(pvm_folder, tmp_path / "stripped", {"text_config": text_config}, drop=".pvm_block.")
    with pytest.raises(UserError, match="weights"):
        load_checkpoint(str(stripped))


def test_pvm_weights_under_a_stock_config_are_refused(pvm_folder, base, tmp_path):
    folder = copy_of(pvm_folder, tmp_path / "disguised", json.loads((base / "config.json").read_text()))
    with pytest.raises(UserError, match="answer without them"):
        load_checkpoint(str(folder))


def test_stock_checkpoint_without_all_weights_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="would be random"):
        load_checkpoint(str(copy_of(base, tmp_path / "incomplete", drop="layers.3.mlp")))


def test_adapter_without_all_weights_is_refused(adapter_folder, tmp_path):
    with pytest.raises(UserError, match="lacks weights"):
        load_checkpoint(str(copy_of(adapter_folder, tmp_path / "incomplete", drop="lora_B")))


def test_adapter_without_its_base_is_refused(adapter_folder, tmp_path):
    folder = copy_of(adapter_folder, tmp_path / "orphan")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone/away"}))
    with pytest.raises(UserError, match="PEFT adapter for gone/away"):
        load_checkpoint(str(folder))


def test_refused_checkpoints(base, tmp_path):
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint_kind(str(tmp_path))
    with pytest.raises(UserError, match="There is no folder"):
        checkpoint_kind(str(tmp_path / "nothing" / "here"))
    with pytest.raises(UserError, match="model type 'llama'"):
        checkpoint_kind(str(copy_of(base, tmp_path / "llama", {"model_type": "llama"})))


# --- questions and answers -------------------------------------------------------------------------------------------


def test_distance_and_depths(base, data):
    processor = AutoProcessor.from_pretrained(base)
    tokenizer, rows = processor.tokenizer, load_conversations(str(data), "test")

    def tokens_after_image(question: str) -> int:
        return len(tokenizer(f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"])

    near, far, read = (tokens_after_image(question) for question in ("Cell?", f"{FILLER}Cell?", "Read."))
    assert far > near + 30
    prompts = Prompts(rows, processor)
    assert prompts.distances == [near] * 3 + [far] * 3 + [read] * 5 + [None]

    questions = read_questions(rows, "task", r"\d", tokenizer)
    assert questions[0].depths == [0] and questions[0].reference == "0" and questions[0].question == "Cell?"
    answer = questions[6]
    assert answer.group == "read" and answer.reference == "the digit 0 the digit 1 the digit 2 the digit 3"
    ids = tokenizer(answer.reference)["input_ids"]
    pieces = [tokenizer.decode(ids[depth : depth + 1]).strip() for depth in answer.depths]
    assert pieces == ["0", "1", "2", "3"]


def test_batches_have_equal_limits_and_similar_lengths():
    lengths, limits = [5, 9, 7, 3, 8], [16, 16, 64, 16, 16]
    assert make_batches(lengths, limits, 2) == [[2], [1, 4], [0, 3]]


@pytest.mark.parametrize("folder", ["base", "pvm_folder"])
def test_batches_answer_as_single_rows_do(folder, data, request):
    checkpoint = load_checkpoint(str(request.getfixturevalue(folder)))
    checkpoint.model.double()  # an untrained model's logits nearly tie, and float32 rounds differently in a batch
    prompts = Prompts(load_conversations(str(data), "test"), checkpoint.processor)
    limits = [random.Random(k).choice([8, 16]) for k in range(len(prompts.lengths))]
    together = answer(checkpoint, prompts, limits, 5, "batched")
    assert together == answer(checkpoint, prompts, limits, 1, "one by one")
    texts = [given.prediction for given in together]
    assert all(texts) and len(set(texts)) > 1
    for given, limit in zip(together, limits):
        assert given.length == limit if given.cut else given.length < limit


def test_rows_beyond_the_kept_bytes_are_processed_again(base, data, monkeypatch):
    monkeypatch.setattr(questions_module, "KEPT_BYTES", 0)
    processor = AutoProcessor.from_pretrained(base)
    prompts = Prompts(load_conversations(str(data), "test"), processor)
    assert prompts.kept == [None] * 12 and len(prompts[3]["input_ids"]) == prompts.lengths[3]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(base, pvm_folder, data) -> list[str]:
    models = ["--model", str(base), str(pvm_folder), "--names", "base", "PVM"]
    return [*models, "--dataset_name", str(data), "--group_by", "task", "--scored_pattern", r"\d", "--batch_size", "4"]


@pytest.fixture(scope="module")
def output_dir(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new"
    eval_script.main([*flags, "--output_dir", str(folder)])
    return folder


def read_records(output_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "predictions" / f"{name}.jsonl").read_text().splitlines()]


def test_files(output_dir):
    names = {"report.html", "report.json", "report.md", "diagnostics.json", "predictions", "report.png"}
    names |= {f"report_{what}.png" for what in ("attention", "lens", "branches", "heat PVM")}
    assert {file.name for file in output_dir.iterdir()} - {"report_lengths.png"} == names
    assert {file.name for file in (output_dir / "predictions").iterdir()} == {"base.jsonl", "PVM.jsonl"}
    for file in output_dir.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_the_page_is_self_contained(output_dir):
    page = (output_dir / "report.html").read_text()
    pictures = re.findall(r'<img src="([^"]+)"', page)
    assert len(pictures) == len(list(output_dir.glob("*.png")))
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    embedded = {b64decode(source.partition(",")[2]) for source in pictures}
    assert embedded == {file.read_bytes() for file in output_dir.glob("*.png")}
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page
    assert page.count("<h2") == (output_dir / "report.md").read_text().count("\n## ") == page.count("<details") + 1


def test_report_follows_from_the_predictions(output_dir):
    report = json.loads((output_dir / "report.json").read_text())
    records = {name: read_records(output_dir, name) for name in ("base", "PVM")}
    scores = ("overall", "ambiguous", "groups", "lengths_of", "comparisons", "overall_comparisons")
    assert {key: report[key] for key in scores} == json.loads(
        json.dumps(score_all([Entry(name, [lines]) for name, lines in records.items()], r"\d"))
    )
    for name, lines in records.items():
        assert [line["row"] for line in lines] == list(range(12))
        assert report["overall"][name]["n"] == 12
        assert report["overall"][name]["correct"] == sum(line["correct"] for line in lines)
        by_distance = report["groups"]["cell"][name]["by_distance"]
        assert [span["n"] for span in by_distance["bins"]] == [3, 3]
        assert by_distance["without_image"]["n"] == 1
        assert [span["n"] for span in report["groups"]["read"][name]["by_depth"]["bins"]] == [5] * 4


def test_report_says_what_was_evaluated(output_dir):
    report = json.loads((output_dir / "report.json").read_text())
    stock, pvm_model = report["models"]
    assert stock["model_class"] == "Qwen3VLForConditionalGeneration" and stock["gates_on"] is None
    assert pvm_model["model_class"] == "Qwen3VLPVMForConditionalGeneration" and pvm_model["gates_on"] is True
    text = (output_dir / "report.md").read_text()
    assert "pvm branches on (gates: layer 1 +0.2500, layer 2 +0.2500), trained with pvm for 7 steps" in text
    for heading in ("## By distance", "## By depth", "PVM − base"):  # noqa: RUF001
        assert heading in text


def test_a_pvm_model_with_its_gates_at_zero_answers_as_its_base_and_the_report_says_so(base, data, tmp_path, capsys):
    off = save_pvm(base, tmp_path / "off", gate=0.0, training=None)
    flags = ["--model", str(base), str(off), "--names", "base", "off", "--max_samples", "4"]
    flags += ["--max_new_tokens", "4", "--diagnostic_rows", "0"]
    eval_script.main([*flags, "--dataset_name", str(data), "--output_dir", str(tmp_path / "report")])
    assert "All gates of off are exactly 0" in (tmp_path / "report" / "report.md").read_text()
    printed = capsys.readouterr().out
    assert "All gates of off are exactly 0" in printed.replace("\n", " ")
    assert printed.rindex("\n- ") > printed.index("Correct answers")  # the verdict is what stays on the screen
    records = read_records(tmp_path / "report", "base")
    assert records == read_records(tmp_path / "report", "off")
    assert [record["row"] for record in records] == [0, 3, 6, 9]  # spread over the data set


def test_a_report_is_overwritten_only_on_request(flags, output_dir, tmp_path):
    folder = shutil.copytree(output_dir, tmp_path / "report")
    with pytest.raises(UserError, match="--overwrite true"):
        eval_script.main([*flags, "--output_dir", str(folder)])
    other = [
        *flags,
        "--names",
        "first",
        "second",
        "--max_samples",
        "2",
        "--max_new_tokens",
        "2",
        "--diagnostic_rows",
        "0",
    ]
    eval_script.main([*other, "--output_dir", str(folder), "--overwrite", "true"])
    assert len(read_records(folder, "first")) == 2
    left = {file.name for file in folder.rglob("*")} - {"report_lengths.png"}
    assert left == {
        "report.html",
        "report.json",
        "report.md",
        "report.png",
        "predictions",
        "first.jsonl",
        "second.jsonl",
    }


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--names", "one"], "1 names for 2 models"),
        (["--diagnostic_rows", "-1"], "--diagnostic_rows -1"),
        (["--scored_pattern", "x*"], "matches the empty text"),
        (["--names", "a", "b - c"], "without a dash between spaces"),
        (["--names", "a", "modèle"], "ASCII letters"),
        (["--names", "a/b", "c"], "file name"),
        (["--group_by", "colour"], "The columns are"),
        (["--group_by", "messages"], "values; a report has at most"),
        (["--scored_pattern", "("], "is not a regular expression"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--dataset_split", "train"], "split `train`"),
    ],
)
def test_refusals(flags, more, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        eval_script.main([*flags, *more, "--output_dir", str(tmp_path / "report")])
    assert not (tmp_path / "report").exists()


def test_two_models_of_one_name_need_names(base, data, tmp_path):
    other = copy_of(base, tmp_path / base.name)
    flags = ["--dataset_name", str(data), "--output_dir", str(tmp_path / "report")]
    with pytest.raises(UserError, match="Choose others with --names"):
        eval_script.main(["--model", str(base), str(other), *flags])
    with pytest.raises(UserError, match="names a checkpoint twice"):
        eval_script.main(["--model", str(base), str(base), "--names", "a", "b", *flags])
    with pytest.raises(UserError, match="would have the same label"):
        eval_script.main(["--model", str(base), str(other), str(tmp_path), "--names", "a", "a", "a run 2", *flags])


def test_runs_of_a_method_are_reported_together(base, data, tmp_path):
    """Two runs with one name, and the base: means, each run's accuracy, and ablations compared with their own run."""
    runs = [
        save_pvm(base, tmp_path / f"run{k}", gate, {"method": "pvm", "step": 1}) for k, gate in enumerate((0.2, 4))
    ]
    eval_script.main(
        ["--model", str(base), *map(str, runs), "--names", "base", "PVM", "PVM", "--dataset_name", str(data),
         "--group_by", "task", "--scored_pattern", r"\d", "--max_new_tokens", "4", "--ablations", "branch_off",
         "--diagnostic_rows", "0", "--output_dir", str(tmp_path / "report")]
    )  # fmt: skip
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    labels = [model["label"] for model in report["models"]]
    assert labels == ["base", "PVM run 1", "PVM run 1 - branch off", "PVM run 2", "PVM run 2 - branch off"]
    assert list(report["overall"]) == ["base", "PVM", "PVM - branch off"]
    result = report["overall"]["PVM"]
    own = [read_records(tmp_path / "report", label) for label in ("PVM run 1", "PVM run 2")]
    assert result["by_run"] == [sum(record["correct"] for record in records) / 12 for records in own]
    assert result["accuracy"] == pytest.approx(sum(result["by_run"]) / 2) and result["runs"] == 2
    pairs = [(entry["of"], entry["minus"]) for entry in report["comparisons"]["cell"]]
    assert pairs == [("PVM", "base"), ("PVM - branch off", "PVM")]
    # With the branches off both runs are the base.
    for k in (1, 2):
        off, stock = (
            [record["prediction"] for record in read_records(tmp_path / "report", name)]
            for name in (f"PVM run {k} - branch off", "base")
        )
        assert off == stock
    text = (tmp_path / "report" / "report.md").read_text()
    assert "2 of PVM." in text and "PVM with its branches off, compared with intact (cell)" in text


def test_an_interrupted_evaluation_is_resumed(flags, output_dir, tmp_path, monkeypatch):
    """Interrupted in the second model, it answers only what is missing, and writes the same report."""
    folder = tmp_path / "report"
    made, plain = [], GenerationMixin.generate

    def until(batches: int):
        def generate(self, *args, **kwargs):
            if len(made) == batches:
                raise KeyboardInterrupt
            made.append(kwargs["input_ids"].shape[0])
            return plain(self, *args, **kwargs)

        return generate

    monkeypatch.setattr(GenerationMixin, "generate", until(5))
    with pytest.raises(KeyboardInterrupt):
        eval_script.main([*flags, "--output_dir", str(folder)])
    assert sorted(file.name for file in folder.iterdir()) == ["unfinished"]
    with pytest.raises(UserError, match="with different batch_size"):
        eval_script.main([*flags, "--batch_size", "5", "--output_dir", str(folder)])
    before = sum(made)
    # --overwrite keeps answers of the same evaluation.
    with pytest.raises(KeyboardInterrupt):
        eval_script.main([*flags, "--output_dir", str(folder), "--overwrite", "true"])
    assert sum(made) == before
    monkeypatch.setattr(GenerationMixin, "generate", until(1000))
    eval_script.main([*flags, "--output_dir", str(folder)])
    assert before < 24 and sum(made) == 24, "each of 12 rows once for each model"
    whole, again = (json.loads((path / "report.json").read_text()) for path in (output_dir, folder))
    assert [model["seconds"] is None for model in again["models"]] == [False, True]
    assert "answered in several runs (interrupted)" in (folder / "report.md").read_text()
    for key in ("overall", "groups", "comparisons", "diagnostics"):
        assert whole[key] == again[key]
    assert not (folder / "unfinished").exists()


def test_ablations_of_stock_and_pvm_models_on_rows_with_and_without_images(base, pvm_folder, data, tmp_path):
    """The stock class does not accept `use_pvm`, and a row without an image has nothing to hide."""
    eval_script.main(
        ["--model", str(base), str(pvm_folder), "--names", "base", "PVM", "--dataset_name", str(data),
         "--max_new_tokens", "2", "--ablations", "blind", "branch_off", "--diagnostic_rows", "0",
         "--output_dir", str(tmp_path / "report")]
    )  # fmt: skip
    records = {name: read_records(tmp_path / "report", name) for name in ("base", "base - blind", "PVM - blind")}
    assert records["base"][-1]["distance"] is None
    assert records["base"][-1]["prediction"] == records["base - blind"][-1]["prediction"]
    blind = [[record["prediction"] for record in records[f"{name} - blind"]] for name in ("base", "PVM")]
    assert blind[0] == blind[1], "blind and with its branches off, the model is the base"
    assert "1 of 12 questions have no image" in (tmp_path / "report" / "report.md").read_text()


def test_images_out_of_the_cache_as_ablations_and_as_a_way_to_evaluate(base, pvm_folder, data, tmp_path):
    flags = ["--model", str(base), str(pvm_folder), "--names", "base", "PVM", "--dataset_name", str(data),
             "--max_new_tokens", "2", "--diagnostic_rows", "0"]  # fmt: skip
    eval_script.main([*flags, "--ablations", "evict", "skip", "--output_dir", str(tmp_path / "ablations")])
    eval_script.main([*flags, "--image_kv_cache", "skip", "--output_dir", str(tmp_path / "way")])
    records = {
        name: [record["prediction"] for record in read_records(tmp_path / folder, name)]
        for folder, name in (("ablations", "PVM - skip"), ("ablations", "base"), ("way", "PVM"))
    }
    assert records["PVM"] == records["PVM - skip"]
    reports = [json.loads((tmp_path / folder / "report.json").read_text()) for folder in ("ablations", "way")]
    sizes = [{model["name"]: model["cache_bytes"] for model in report["models"]} for report in reports]
    assert sizes[0]["PVM"] > sizes[0]["base"] > max(sizes[0]["PVM - evict"], sizes[0]["PVM - skip"])
    assert sizes[0]["PVM - skip"] == sizes[1]["PVM"]  # (evict differs by the lengths of answers)
    assert f"{sizes[0]['PVM - skip'] / 1000:,.1f} kB" in (tmp_path / "ablations" / "report.md").read_text()

    with pytest.raises(UserError, match="none of the models has PVM branches that read the image"):
        eval_script.main(
            [
                "--model",
                str(base),
                "--dataset_name",
                str(data),
                "--image_kv_cache",
                "evict",
                "--output_dir",
                str(tmp_path),
            ]
        )
    with pytest.raises(UserError, match="cannot be combined with --ablations hidden_image"):
        eval_script.main(
            [
                *flags,
                "--image_kv_cache",
                "evict",
                "--ablations",
                "hidden_image",
                "--output_dir",
                str(tmp_path / "other"),
            ]
        )


def test_changed_data_is_not_mixed_with_earlier_answers(base, data, tmp_path, monkeypatch):
    folder = shutil.copytree(data, tmp_path / "data")
    flags = ["--model", str(base), "--dataset_name", str(folder), "--output_dir", str(tmp_path / "report")]

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GenerationMixin, "generate", interrupted)
        eval_script.main(flags)
    rows = Dataset.from_parquet(str(folder / "test.parquet"))
    rows.select(range(len(rows) - 1, -1, -1)).to_parquet(folder / "test.parquet")
    with pytest.raises(UserError, match="with different rows"):
        eval_script.main(flags)


def test_an_incomplete_line_of_a_journal_is_removed(tmp_path):
    journal = tmp_path / "answers.jsonl"
    lines = [json.dumps({"row": row, "prediction": "\u2028", "length": 1, "cut": False}) + "\n" for row in range(4)]
    journal.write_text("".join(lines[:2]) + lines[2][:-1])
    assert list(read_journal(journal)) == [0, 1]
    with open(journal, "a") as file:
        file.write(lines[3])
    assert list(read_journal(journal)) == [0, 1, 3]
    journal.write_bytes(lines[0].encode() + b"\xff\n")
    assert list(read_journal(journal)) == [0] and read_journal(tmp_path / "none") == {}


def test_damaged_parts_are_named(tmp_path):
    first = Progress(tmp_path, {"a": 1})
    first.save("base", {"records": []})
    (tmp_path / "parts" / "base.json").write_text('{"rec')
    again = Progress(tmp_path, {"a": 1})
    with pytest.raises(UserError, match=r"base\.json is damaged"):
        again.load("base")
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        Progress(tmp_path, {"a": 1})


def test_groups_and_texts_that_look_like_markup(base, tmp_path, capsys):
    """rich takes `[/x]` for the end of a style, matplotlib what is between dollars for a formula."""
    group = "[/INST] $x_{$ b"
    for k in range(2):
        Image.new("RGB", (32, 32), (99 * k, 0, 0)).save(tmp_path / f"{k}.png")
    turns = [{"role": "user", "content": f"{FILLER} $x_{{$?"}, {"role": "assistant", "content": "1. $x_{$ [/b] 2"}]
    rows = [{"images": [f"{k}.png"], "messages": turns, "task": group} for k in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = copy_of(base, tmp_path / "1. [b]")
    eval_script.main(
        ["--model", str(base), str(other), "--names", "1. base", "other",
         "--dataset_name", str(tmp_path / "rows.jsonl"), "--dataset_split", "train", "--group_by", "task",
         "--max_new_tokens", "4", "--diagnostic_rows", "1",
         "--ablations", "blank_image", "--output_dir", str(tmp_path / "report")]
    )  # fmt: skip
    assert group in capsys.readouterr().out
    page = (tmp_path / "report" / "report.html").read_text()
    assert group in page and page.count("<ol>") == 1 and "1. base: Qwen3VLForConditionalGeneration" in page


def test_only_exact_matches_have_pieces_by_default():
    made = {"model": ["a"], "output_dir": "b"}
    assert EvalArguments(**made).scored_pattern == r"\S+"
    assert EvalArguments(**made, match="choice").scored_pattern is None
    assert EvalArguments(**made, match="choice", scored_pattern="x").scored_pattern == "x"


def test_files_that_are_not_part_of_a_report_are_kept(base, data, tmp_path):
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(UserError, match=r"report\.md is not part of a report"):
        eval_script.main(
            ["--model", str(base), "--dataset_name", str(data), "--output_dir", str(tmp_path), "--overwrite", "true"]
        )
    assert (tmp_path / "report.md").read_text() == "mine"


def test_a_folder_takes_one_evaluation_at_a_time(flags, tmp_path):
    with locked(tmp_path / "report"), pytest.raises(UserError, match="Another process is writing into"):
        eval_script.main([*flags, "--output_dir", str(tmp_path / "report")])
    assert not (tmp_path / "report").exists()


def test_errors_are_one_sentence(tmp_path, monkeypatch, capsys):
    command = ["eval.py", "--model", str(tmp_path), "--dataset_name", "x", "--output_dir", str(tmp_path / "report")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(eval_script.__file__, run_name="__main__")
    assert re.fullmatch(r"pvm eval: error: .* is not a checkpoint.*\n", capsys.readouterr().err)
