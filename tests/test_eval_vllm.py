"""eval.py --backend vllm answers what --backend transformers does. In the environment of requirements-vllm.txt."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration


os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING")

vllm = pytest.importorskip("vllm")

import eval as eval_script  # noqa: E402
from pvm.checkpoints.loading import load_checkpoint  # noqa: E402
from pvm.data.sources import load_conversations  # noqa: E402
from pvm.errors import UserError  # noqa: E402
from pvm.evaluation.answering import answer, answer_with_vllm, read_journal  # noqa: E402
from pvm.evaluation.questions import Prompts  # noqa: E402
from pvm.training.methods import LORA_TARGETS  # noqa: E402
from pvm.vllm.engine import Engine  # noqa: E402
from pvm.worlds.conversations import filler  # noqa: E402
from test_vllm import BACKBONE, adapter, build, pvm_model, save, tuned  # noqa: E402, F401


NEW_TOKENS = 10


@pytest.fixture(autouse=True)
def small_engines(monkeypatch):
    small = functools.partial(vllm.LLM, enforce_eager=True, kv_cache_memory_bytes=2**27)
    monkeypatch.setattr(vllm, "LLM", small)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twenty rows with one image, none, or two, in one or two turns; in `videos.jsonl` three of them and a video."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    rows = []
    for row in range(20):
        images = [f"{row}_{k}.png" for k in range((1, 0, 2, 1)[row % 4])]
        for k, name in enumerate(images):
            pixels = rng.integers(256, size=(32 + 16 * k, 24 + 8 * row, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        messages = [{"role": "user", "content": f"{filler(10 + 3 * row, rng)} Cell golf?"}]
        if row % 5 == 0:
            messages += [{"role": "assistant", "content": "7"}, {"role": "user", "content": "Cell alpha?"}]
        rows.append({"images": images, "messages": [*messages, {"role": "assistant", "content": str(row % 10)}]})
    video = {"images": [], "videos": [["0_0.png"] * 4], "messages": rows[1]["messages"]}
    for name, chosen in (("rows", rows), ("videos", [video, *rows[:3]])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """A PEFT adapter of the stock model."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=LORA_TARGETS, init_lora_weights=False)
    get_peft_model(Qwen3VLForConditionalGeneration.from_pretrained(BACKBONE), config).save_pretrained(folder)
    return folder


def test_reports_are_the_same(adapter, tuned, lora, data, tmp_path):  # noqa: F811
    """For branches alone, with LoRA, and LoRA alone; also with gray images."""
    models = {"PVM": adapter, "PVM+LoRA": tuned, "LoRA": lora}
    reports = {}
    for backend in ("transformers", "vllm"):
        flags = ["--model", *map(str, models.values()), "--names", *models, "--backend", backend]
        flags += ["--dataset_name", str(data / "rows.jsonl"), "--dataset_split", "train", "--ablations", "blank_image"]
        flags += [
            "--max_new_tokens",
            str(NEW_TOKENS),
            "--diagnostic_rows",
            "0",
            "--output_dir",
            str(tmp_path / backend),
        ]
        eval_script.main(flags)
        reports[backend] = json.loads((tmp_path / backend / "report.json").read_text())
    files = {path.name: path.read_text() for path in (tmp_path / "transformers" / "predictions").iterdir()}
    assert files == {path.name: path.read_text() for path in (tmp_path / "vllm" / "predictions").iterdir()}
    assert len(set(files.values())) == len(files) == 6, "the models and images matter"
    for first, second in zip(*(report["models"] for report in reports.values())):
        assert first.pop("cache_bytes") and second.pop("cache_bytes") is None
        assert first.pop("seconds") and second.pop("seconds")
        assert first == second
    assert reports["vllm"]["versions"].pop("vllm") == vllm.__version__
    assert reports["vllm"]["versions"] == reports["transformers"]["versions"]


def test_an_interrupted_evaluation_goes_on(tuned, data, tmp_path):  # noqa: F811
    """With what the journal lacks; and videos are read as by transformers."""
    checkpoint, engine = load_checkpoint(str(tuned)), Engine(str(tuned), batch_size=2)
    prompts = Prompts(load_conversations(str(data / "videos.jsonl"), "train"), checkpoint.processor)
    limits = [NEW_TOKENS, 4, NEW_TOKENS, NEW_TOKENS]
    expected = answer(checkpoint, prompts, limits, 1, "transformers")
    for given in expected:
        given.cache_bytes = None
    journal = tmp_path / "journal.jsonl"
    assert answer_with_vllm(engine, prompts, limits, "vLLM", journal) == expected
    assert len(journal.read_text().splitlines()) == 4
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:2]).replace('"prediction": "', '"prediction": "kept '))
    kept = read_journal(journal)
    again = answer_with_vllm(engine, prompts, limits, "vLLM", journal)
    assert [row for row, given in enumerate(again) if given == expected[row]] == sorted({0, 1, 2, 3} - kept.keys())
    with pytest.raises(UserError, match=r"videos\.jsonl.*row [0-9].*: vLLM makes \d+ tokens .* transformers 3"):
        prompts.lengths = [3] * 4
        answer_with_vllm(engine, prompts, limits, "vLLM")
    engine.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ablations", "branch_off"], r"--ablations branch_off: vLLM cannot do that.*--backend transformers"),
        (["--ablations", "blank_image", "blind"], r"--ablations blind: vLLM cannot"),
        (["--image_kv_cache", "evict"], r"--image_kv_cache evict: vLLM cannot"),
        (["--diagnostic_rows", "2"], r"--diagnostic_rows 2: vLLM cannot"),
    ],
)
def test_refused(adapter, data, tmp_path, flags, message):  # noqa: F811
    names = ["--model", str(adapter), "--dataset_name", str(data / "rows.jsonl"), "--output_dir", str(tmp_path)]
    with pytest.raises(UserError, match=message):
        eval_script.main([*names, "--backend", "vllm", *flags])


def test_what_vllm_refuses_is_a_sentence(tmp_path):
    model = build()
    model.config.text_config.pvm_causal = False
    with pytest.raises(UserError, match=r"^vLLM cannot serve .*: In .*`pvm_causal` is off"):
        Engine(str(save(model, tmp_path)))
