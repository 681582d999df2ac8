"""
vLLM computes what transformers computes: the same greedy tokens, log-probabilities within 1e-4 (float32).

An engine takes long to start, so there are few, each in a mode that differs in several ways, and all cases go through
each. Run in the environment of requirements-vllm.txt: `make test`.
"""

import base64
import io
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoProcessor, Qwen3VLConfig
from transformers.video_utils import VideoMetadata

from configuration_qwen3vl_pvm import REFERENCE_ARCHITECTURE, Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.training.methods import LORA_TARGETS
from pvm.worlds.conversations import filler


SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in this process, where tests reach its model
    "VLLM_LOGGING_LEVEL": "WARNING",
}
os.environ.update(SETTINGS)  # vLLM reads them when it is imported

vllm = pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers import utils as vllm_layers  # noqa: E402

from pvm.vllm import branch  # noqa: E402
from pvm.vllm import model as vllm_model  # noqa: E402
from pvm.vllm.model import Qwen3VLPVMForConditionalGeneration as VLLMModel  # noqa: E402
from pvm.vllm.plugin import register  # noqa: E402


BACKBONE = Path(__file__).parent.parent / "assets" / "digits-backbone"
NEW_TOKENS = 10
TOLERANCE = 1e-4
# Less than most images here, so that they are computed in several steps.
CHUNK = 96
KV_CACHE_BYTES = 2**27


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A prompt, and what transformers answers: greedy tokens and their log-probabilities."""

    prompt: str
    images: list[Image.Image] = field(default_factory=list)
    videos: list[np.ndarray] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def inputs(self, processor) -> dict[str, torch.Tensor]:
        metadata = [VideoMetadata(**video_metadata(video)) for video in self.videos]
        return processor(
            text=[self.prompt],
            images=self.images or None,
            videos=self.videos or None,
            **({"video_metadata": metadata, "do_sample_frames": False} if self.videos else {}),
            return_tensors="pt",
        )

    def answered(self, model, processor) -> "Case":
        """This case with the answer of a model of transformers."""
        inputs = self.inputs(processor)
        output = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logprobs = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(output.logits, tokens)]
        return Case(self.prompt, self.images, self.videos, tokens, logprobs)

    def request(self) -> dict:
        """For `LLM.generate`."""
        data = {"image": self.images} if self.images else {}
        if self.videos:
            data["video"] = [(video, {**video_metadata(video), "do_sample_frames": False}) for video in self.videos]
        return {"prompt": self.prompt, "multi_modal_data": data} if data else {"prompt": self.prompt}


def video_metadata(video: np.ndarray) -> dict:
    frames = len(video)
    return {"total_num_frames": frames, "fps": 2.0, "duration": frames / 2, "frames_indices": list(range(frames))}


def make_cases() -> list[Case]:
    rng = np.random.default_rng(0)
    image_mark, video_mark = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))

    def image(height: int, width: int) -> Image.Image:
        return Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8))

    def video(frames: int) -> np.ndarray:
        return rng.integers(256, size=(frames, 32, 32, 3), dtype=np.uint8)

    def turn(*parts: str) -> str:
        return f"<|im_start|>user\n{''.join(parts)}<|im_end|>\n<|im_start|>assistant\n"

    def words(count: int) -> str:
        return filler(count, rng)

    cases = []
    for count in (1, 3, 12, 40, 200, 900):
        cases.append(Case(turn(words(count))))
    for height, width in itertools.product((16, 32, 72, 128, 256), (24, 64, 200)):
        cases.append(Case(turn(image_mark, words(20), "\nCell golf?"), [image(height, width)]))
    for count in (1, 30, 300, 1500, 3300):
        cases.append(Case(turn(image_mark, words(count), "\nRead alpha to charlie."), [image(32, 32)]))
    for before, after in itertools.product((1, 50, 400), (0, 60)):  # text first
        cases.append(Case(turn(words(before), image_mark, words(after)), [image(64, 40)]))
    for number, gap in itertools.product((2, 3, 4, 5), (0, 7, 90)):  # several images of different sizes
        images = [image(16 * (1 + k % 3), 24 * (1 + k)) for k in range(number)]
        cases.append(Case(turn(words(4), *(image_mark + words(gap) for _ in images)), images))
    for turns in (2, 3, 4):  # an image in every turn, or in some
        for every in (1, 2):
            seen = [turn_number % every == 0 for turn_number in range(turns)]
            prompt = "7<|im_end|>\n".join(turn(image_mark if shown else "", words(25)) for shown in seen)
            cases.append(Case(prompt, [image(48, 32 * (1 + k)) for k in range(sum(seen))]))
    same = image(96, 96)
    for number in (1, 2, 3):  # the same image, in one prompt and across prompts
        cases.append(Case(turn(*(image_mark + words(12) for _ in range(number))), [same] * number))
    for frames in (4, 8):
        cases.append(Case(turn(video_mark, words(15)), [], [video(frames)]))
        cases.append(Case(turn(words(9), video_mark, words(15), image_mark, "Cell papa?"), [same], [video(frames)]))
    for count in (5, 80):  # a beginning in common, which ends inside the text or right after the image
        cases.append(Case(turn(image_mark, "apple " * count, "Cell kilo?"), [same]))
        cases.append(Case(turn(image_mark, "apple " * count, "Name papa."), [same]))
    return cases


# --- checkpoints -----------------------------------------------------------------------------------------------------


def build(block: str = "pvm", seed: int = 0) -> Qwen3VLPVMForConditionalGeneration:
    """The demo's backbone with strong random branches."""
    config = Qwen3VLPVMConfig.from_stock(
        Qwen3VLConfig.from_pretrained(BACKBONE), pvm_layers=[0, 2, 3], pvm_hidden_size=64, pvm_block=block
    )
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(BACKBONE, config=config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".pvm_block." in name:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * 1.5 / weight.shape[-1] ** 0.5 if weight.ndim == 2 else 1 + 0.3 * noise)
    model.config.base_model_name_or_path = str(BACKBONE)
    return model


def save(model, folder: Path, **kwargs) -> Path:
    model.save_pretrained(folder, **kwargs)
    AutoProcessor.from_pretrained(BACKBONE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BACKBONE)


@pytest.fixture(scope="module")
def pvm_model():
    return build()


@pytest.fixture(scope="module")
def cases(pvm_model, processor) -> list[Case]:
    cases = [case.answered(pvm_model, processor) for case in make_cases()]
    assert len(cases) >= 60 and max(len(case.inputs(processor)["input_ids"][0]) for case in cases) > 3300
    return cases


@pytest.fixture(scope="module")
def whole(pvm_model, tmp_path_factory) -> Path:
    return save(pvm_model, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def adapter(pvm_model, tmp_path_factory) -> Path:
    return save(pvm_model, tmp_path_factory.mktemp("adapter"), adapter_only=True)


# --- engines ---------------------------------------------------------------------------------------------------------


def start(folder: Path, **options) -> "vllm.LLM":
    defaults = {"dtype": "float32", "max_model_len": 4096, "max_num_seqs": 32, "kv_cache_memory_bytes": KV_CACHE_BYTES}
    return vllm.LLM(str(folder), **{**defaults, "enforce_eager": True, "disable_log_stats": False, **options})


def model_of(llm: "vllm.LLM") -> VLLMModel:
    return llm.llm_engine.model_executor.driver_worker.model_runner.model


def counter(llm: "vllm.LLM", name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def differences(llm: "vllm.LLM", cases: list[Case]) -> list[float]:
    """The largest difference of log-probabilities in each answer; infinite if the tokens differ."""
    settings = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    outputs = llm.generate([case.request() for case in cases], settings, use_tqdm=False)
    found = []
    for case, output in zip(cases, outputs):
        tokens, steps = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        found.append(difference(case, tokens, [step[token].logprob for step, token in zip(steps, tokens)]))
    return found


def difference(case: Case, tokens: list[int], logprobs: list[float]) -> float:
    if tokens != case.tokens:
        return float("inf")
    return max(abs(a - b) for a, b in zip(logprobs, case.logprobs))


@pytest.fixture(scope="module")
def llm(whole) -> Iterator["vllm.LLM"]:
    """Small chunks; so little memory that requests are preempted; linear weights that can be updated, as on a GPU."""

    def plain_linear(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    # A prompt starts although there is no room for all of it.
    little_memory = {"max_model_len": 3584, "num_gpu_blocks_override": 114, "scheduler_reserve_full_isl": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_layers, "dispatch_cpu_unquantized_gemm", plain_linear)
        engine = start(whole, max_num_batched_tokens=CHUNK, block_size=32, **little_memory)
    yield engine


def test_exact_in_chunks_with_preemption(llm, cases):
    found = differences(llm, cases)
    assert max(found) < TOLERANCE
    assert counter(llm, "num_preemptions") > 0


def test_exact_behind_a_cached_prefix(llm, cases):
    hits = counter(llm, "prefix_cache_hits")
    # Last ones first, before others take their place in the cache.
    found = differences(llm, cases[::-1])
    assert max(found) < TOLERANCE
    assert counter(llm, "prefix_cache_hits") - hits > 2000, "tokens"


@pytest.mark.parametrize("broken", ["text is not masked", "mask shifted by a token"])
def test_the_comparison_finds_a_broken_mask(llm, cases, monkeypatch, broken):
    if broken == "text is not masked":
        monkeypatch.setattr(branch, "QUERY_MARK", 0.0)
    else:
        embed_input_ids = VLLMModel.embed_input_ids

        def shifted(self, *args, **kwargs):
            embeds = embed_input_ids(self, *args, **kwargs)
            self.visual_tokens.mask.copy_(self.visual_tokens.mask.roll(1, dims=0))
            return embeds

        monkeypatch.setattr(VLLMModel, "embed_input_ids", shifted)
    chosen = [case for case in cases if case.images][::3]
    assert llm.reset_prefix_cache()
    found = differences(llm, chosen)
    assert sum(value < TOLERANCE for value in found) < len(found) / 4
    monkeypatch.undo()
    assert llm.reset_prefix_cache()
    assert max(differences(llm, chosen)) < TOLERANCE


def test_expanded_placeholders_are_not_expanded_again(llm, cases, processor):
    """As trl's GRPO trainer passes them: token ids, once with images that are in vLLM's cache of processed ones."""
    chosen = [case for case in cases if len(case.images) > 1 and not case.videos]
    settings = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    for _ in range(2):
        prompts = [case.inputs(processor)["input_ids"][0].tolist() for case in chosen]
        requests = [
            {"prompt_token_ids": prompt, "multi_modal_data": {"image": case.images}}
            for prompt, case in zip(prompts, chosen)
        ]
        outputs = llm.generate(requests, settings, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == [case.tokens for case in chosen]
        assert [output.prompt_token_ids for output in outputs] == prompts


def test_weights_can_be_updated(llm, cases, processor, pvm_model):
    """One tensor at a time, as by trl, and all at once."""
    other = build(seed=1)
    with torch.no_grad():
        for name, weight in other.model.language_model.named_parameters():
            if ".pvm_block." not in name:
                weight.add_(0.05 * weight.std() * torch.randn(weight.shape))
    chosen = [case for case in cases if case.images and len(case.prompt) < 2000][::6]
    for name, weight in other.state_dict().items():
        model_of(llm).load_weights([(name, weight)])
    assert llm.reset_prefix_cache()
    assert max(differences(llm, [case.answered(other, processor) for case in chosen])) < TOLERANCE
    loaded = model_of(llm).load_weights(pvm_model.state_dict().items())
    assert loaded == {name for name, _ in model_of(llm).named_parameters()}
    assert llm.reset_prefix_cache()
    assert max(differences(llm, chosen)) < TOLERANCE
    model_of(llm).branches_loaded = False  # as at the start
    with pytest.raises(ValueError, match=r"lacks 45 weights, e\.g\. layers\.0"):
        model_of(llm).load_weights(pvm_model.model.visual.state_dict(prefix="model.visual.").items())
    damaged = {**pvm_model.state_dict(), "model.language_model.layers.2.pvm_block.gate_alpha": torch.tensor([1e6])}
    with pytest.raises(ValueError, match=r"layers\.2\.pvm_block\.gate_alpha reaches 1000000"):
        model_of(llm).load_weights(damaged.items())


# --- other engines ---------------------------------------------------------------------------------------------------


def test_a_control_without_an_image_and_without_prefix_caching(cases, processor, tmp_path):
    model = build("parallel_mlp")
    engine = start(save(model, tmp_path), enable_prefix_caching=False)
    assert max(differences(engine, [case.answered(model, processor) for case in cases[::2]])) < TOLERANCE


def test_ordered_images_with_speculation(cases, processor, tmp_path, monkeypatch):
    """In small chunks, twice."""
    model = build("ordered_token_gate")
    lookup = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    engine = start(save(model, tmp_path), max_num_batched_tokens=CHUNK, speculative_config=lookup)
    expected = [case.answered(model, processor) for case in cases[::2]]
    assert max(differences(engine, expected)) < TOLERANCE
    assert max(differences(engine, expected)) < TOLERANCE
    assert counter(engine, "prefix_cache_hits") > 0
    assert counter(engine, "spec_decode_num_accepted_tokens") > 0

    monkeypatch.setattr(vllm_model, "MAX_IMAGES", 1)  # all images have the same number
    assert engine.reset_prefix_cache()
    several = [case for case in expected if len(case.images) + len(case.videos) > 1]
    assert min(differences(engine, several)) > TOLERANCE

    # Speculation has imported numba, over whose modules vLLM stumbles when it starts another engine in this process.
    for name in [name for name in sys.modules if name.startswith(("llvmlite", "numba"))]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def tuned(pvm_model, adapter, tmp_path_factory) -> Path:
    """The adapter checkpoint with LoRA in `lora/`, as `--method pvm+lora` writes it."""
    folder = tmp_path_factory.mktemp("tuned")
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    lora = LoraConfig(r=4, target_modules=LORA_TARGETS, init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(build(), lora).save_pretrained(folder / "lora")
    change_config(folder, peft_adapter="lora")
    return folder


def change_config(folder: Path, text_config: dict | None = None, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text_config or {}
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@dataclass
class Server:
    """vLLM's server with an OpenAI-compatible API."""

    url: str

    def ask(self, model: str, messages: list[dict]) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probabilities."""
        body = {"model": model, "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        body |= {"logprobs": True, "return_token_ids": True}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as response:
            (choice,) = json.load(response)["choices"]
        return choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]]


@pytest.fixture(scope="module")
def server(tuned, tmp_path_factory) -> Iterator[Server]:
    """An adapter checkpoint, its base from elsewhere, on two ranks (processes of their own), compiled, with LoRA."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tuned), "--dtype", "float32"),
        *("--served-model-name", "pvm", "--enable-lora", "--max-lora-rank", "8", "--lora-modules"),
        *(f"pvm+lora={tuned / 'lora'}", "--tensor-parallel-size", "2", "--max-model-len", "2048"),
        *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES)),
        *("--port", str(port), "--host", "localhost"),
    ]
    environment = {**os.environ, **SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        while True:
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield Server(f"http://localhost:{port}/v1/chat/completions")
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_server(server, tuned, processor):
    rng = np.random.default_rng(1)

    def image_part(height: int, width: int) -> dict:
        png = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)).save(png, "PNG")
        data = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": data}}

    def user(*parts: str | dict) -> dict:
        return {
            "role": "user",
            "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
        }

    chats = [
        [user("Name papa.")],
        [user(image_part(32, 32), "Cell golf?")],
        [user("Before: ", image_part(64, 40), "?")],
    ]
    chats += [[user(*(image_part(32, 24 * k) for k in range(1, 4)), filler(count, rng))] for count in (5, 500)]
    turn = [user(image_part(48, 48), "Cell alpha?"), {"role": "assistant", "content": "7"}]
    chats += [[*turn, user("Cell bravo?")], [*turn, user(image_part(32, 96), "Cell bravo?")]]

    def as_case(messages: list[dict]) -> Case:
        images, plain = [], []
        for message in messages:
            parts = message["content"]
            if not isinstance(parts, str):
                encoded = [part["image_url"]["url"].partition(",")[2] for part in parts if "image_url" in part]
                images += [Image.open(io.BytesIO(base64.b64decode(data))) for data in encoded]
                parts = [{"type": "image"} if "image_url" in part else part for part in parts]
            plain.append({**message, "content": parts})
        return Case(processor.apply_chat_template(plain, add_generation_prompt=True, tokenize=False), images)

    with_lora = Qwen3VLPVMForConditionalGeneration.from_pretrained(tuned).eval()
    answers = {}
    for name in ("pvm+lora", "pvm"):
        expected = [as_case(chat).answered(with_lora, processor) for chat in chats]
        with ThreadPoolExecutor(len(chats)) as pool:
            answers[name] = list(pool.map(lambda chat, name=name: server.ask(name, chat), chats))
        assert max(difference(case, *answer) for case, answer in zip(expected, answers[name])) < TOLERANCE
        with_lora.disable_adapters()
    assert [tokens for tokens, _ in answers["pvm"]] != [tokens for tokens, _ in answers["pvm+lora"]]


# --- refusals --------------------------------------------------------------------------------------------------------


def check(folder: Path, **options) -> None:
    """What vLLM does before it starts an engine."""
    EngineArgs(model=str(folder), dtype="float32", max_model_len=2048, **options).create_engine_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, r"`--pipeline-parallel-size` is not supported: .* Use `--tensor-para"),
        ({"ubatch_size": 2}, r"Micro-batch overlap .*is not supported: .* Leave it out"),
        (
            {"video_pruning_rate": 0.5},
            r"Pruning of video tokens is not supported: .* Leave `--video-pruning",
        ),
        (
            {"load_format": "sharded_state"},
            r"holds PVM branches only, and `--load-format sharded_state` would",
        ),
    ],
)
def test_refused_options(adapter, options, message):
    with pytest.raises(ValueError, match=message):
        check(adapter, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": {"pvm_causal": False}}, r"`pvm_causal` is off.*python -m pvm convert .* --to whole"),
        (
            {"model_type": "qwen3_vl", "architectures": [REFERENCE_ARCHITECTURE]},
            r"as in the authors' implementation.*python -m pvm convert .* --to whole",
        ),
        ({"peft_adapter": "lora"}, r"would be served without it\. Add `--enable-lora --lora-modules NAME=.*/lora`"),
        (
            {"base_model_name_or_path": "/nowhere/base"},
            r"their base, /nowhere/base, could not be loaded: .*--hf-overrides '\{\"base_model_name_or_path\"",
        ),
        ({"text_config": {"rms_norm_eps": 1e-5}}, r"is not the base of .*rms_norm_eps is 1e-06 and not 1e-05"),
    ],
)
def test_refused_checkpoints(adapter, tmp_path, fields, message):
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change_config(tmp_path, **fields)
    with pytest.raises((ValueError, OSError), match=message):
        check(tmp_path)


def test_a_moved_base(adapter, tmp_path):
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change_config(tmp_path, base_model_name_or_path="/nowhere/base")
    check(tmp_path, hf_overrides={"base_model_name_or_path": str(BACKBONE)})


def test_another_version_of_vllm_is_not_stopped(monkeypatch, caplog):
    """An exception in a plugin would stop vLLM for all models."""
    monkeypatch.setattr(vllm, "__version_tuple__", (0, 99, 0))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.config", None)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    register()
    assert "with vLLM 0.31 to 0.33" in caplog.text and "PVM checkpoints cannot be served" in caplog.text
