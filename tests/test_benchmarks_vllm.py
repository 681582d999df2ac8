"""eval.py --tasks --backend vllm. In an environment with both: `make test`."""

import os

import pytest


os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING")

vllm = pytest.importorskip("vllm")
pytest.importorskip("lmms_eval")

from pvm.errors import UserError  # noqa: E402
from test_benchmarks import answers, run, save_pvm, tasks  # noqa: E402, F401
from test_eval_vllm import BACKBONE, lora, small_engines  # noqa: E402, F401


def test_benchmarks_are_answered_by_the_branches(tasks, lora, tmp_path):  # noqa: F811
    """As with transformers, greedily; with gates at 0 an answer differs. Seeds act where answers are sampled."""
    models = {"PVM": save_pvm(BACKBONE, tmp_path / "on", 2.0), "off": save_pvm(BACKBONE, tmp_path / "off", 0.0)}
    greedy = {}
    for backend in ("transformers", "vllm"):
        folder = tmp_path / backend
        report = run({**models, "LoRA": lora}, tasks, folder, "--backend", backend, "--batch_size", "4")
        greedy[backend] = [answers(folder, name) for name in (*models, "LoRA")]
        assert [model["gates_on"] for model in report["models"]] == [True, False, None]
        classes = [model["model_class"] for model in report["models"]]
    assert greedy["vllm"] == greedy["transformers"] and greedy["vllm"][0] != greedy["vllm"][1] != greedy["vllm"][2]
    assert classes == [*["Qwen3VLPVMForConditionalGeneration"] * 2, "Qwen3VLForConditionalGeneration"]
    with pytest.raises(UserError, match="was made with versions .*vllm"):
        run({"PVM": models["PVM"]}, tasks, tmp_path / "vllm", "--batch_size", "4")
    sampled = ("--backend", "vllm", "--temperature", "0.7", "--runs", "2")
    run({"PVM": models["PVM"]}, tasks, tmp_path / "sampled", *sampled)
    first, second = (answers(tmp_path / "sampled", "PVM", seed) for seed in (0, 1))
    assert first != second and greedy["vllm"][0] not in (first, second)
