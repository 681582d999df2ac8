"""
grpo.py with vLLM itself in the rollouts. In the environment of requirements-vllm.txt: `make test`.

Two things differ from a GPU, where they need nothing: on a CPU vLLM repacks linear weights, which could then not be
updated, and trl cannot ask it for float32.
"""

import os
from pathlib import Path

import pytest
import torch


os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING")

vllm = pytest.importorskip("vllm")
pytest.importorskip("trl")

import trl.generation.vllm_generation as generation  # noqa: E402
from vllm.model_executor.layers import utils as vllm_layers  # noqa: E402

import grpo  # noqa: E402
import tiny  # noqa: E402
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration  # noqa: E402
from pvm.errors import UserError  # noqa: E402
from test_grpo import DIFFERENCE, FLAGS, history, rewards  # noqa: E402, F401
from training import ROOT, run, weights  # noqa: E402


BACKBONE = ROOT / "assets" / "digits-backbone"


@pytest.fixture(scope="module")
def start(conversations, tmp_path_factory) -> Path:
    """Branches with open gates, on a backbone that has learned not to write placeholders."""
    folder = run(BACKBONE, conversations, tmp_path_factory.mktemp("start") / "pvm", "--pvm_hidden_size", "32")
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(folder)
    tiny.set_gates(model, 0.5)
    model.save_pretrained(folder, adapter_only=True)
    return folder


@pytest.fixture
def engines(monkeypatch) -> list["vllm.LLM"]:
    """The engines that trl starts."""
    started = []

    def start(*args, **options):
        started.append(vllm.LLM(*args, **options, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**27))
        return started[-1]

    def plain_linear(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(generation, "LLM", start)
    monkeypatch.setattr(vllm_layers, "dispatch_cpu_unquantized_gemm", plain_linear)
    return started


STEPS = 4


def test_rollouts_are_from_the_weights_that_are_trained(
    start,
    conversations,
    rewards,  # noqa: F811
    engines,
    tmp_path,
    monkeypatch,
):
    """In every step; without the last update of the engine's weights, the comparison stops the run."""
    sync, syncs = generation.VLLMGeneration.sync_weights, []

    def sync_weights(self):
        syncs.append(self)
        if len(syncs) < STEPS:
            sync(self)

    monkeypatch.setattr(generation.VLLMGeneration, "sync_weights", sync_weights)
    names = ("--model_name_or_path", start, "--dataset_name", conversations, "--output_dir", tmp_path / "run")
    flags = ("--reward_functions", f"{rewards}:letters", "--reward_weights", "1", "--use_vllm", "true")
    flags += ("--trains", "branches", "--learning_rate", "1e-4", "--max_steps", str(STEPS))
    with pytest.raises(UserError, match="Rollouts and trainer do not compute the same"):
        grpo.main([*map(str, names), *FLAGS, *flags])
    assert len(engines) == 1 and len(syncs) == STEPS
    log = history(tmp_path / "run" / f"checkpoint-{STEPS - 1}")
    assert len(log) == STEPS - 1 and all(0 <= entry[DIFFERENCE] < 1e-4 for entry in log)
    assert any(entry["reward_std"] > 0 for entry in log)
    first, last = (weights(tmp_path / "run" / f"checkpoint-{step}") for step in (1, STEPS - 1))
    assert any(not torch.equal(first[name], last[name]) for name in first)
