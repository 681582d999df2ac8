"""transformers' own server, over HTTP: the answers of generate()."""

import base64
import io
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import tiny
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.errors import UserError
from pvm.serve import main
from pvm.training.methods import ModelArguments, load_model


pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

NEW_TOKENS = 8
# `python -m pvm`, with Pillow to decode images where torchvision lacks its compiled part, as beside some CPU builds.
SERVER = """
import io, sys
import pvm, torch, torchvision.io
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

png = io.BytesIO()
Image.new("RGB", (8, 8)).save(png, "PNG")
try:
    torchvision.io.decode_image(torch.frombuffer(bytearray(png.getvalue()), dtype=torch.uint8))
except RuntimeError:
    torchvision.io.decode_image = lambda data, mode: pil_to_tensor(Image.open(io.BytesIO(bytes(data))).convert("RGB"))
from pvm.__main__ import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter checkpoint with large gates."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load_model(ModelArguments(str(base), pvm_hidden_size=32))
    tiny.set_gates(model, 2.0)
    model.config.base_model_name_or_path = str(base)
    model.save_pretrained(folder, adapter_only=True)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(adapter, tmp_path_factory) -> Iterator[str]:
    """A running `python -m pvm serve`."""
    port = 18000 + os.getpid() % 1000
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-c", SERVER, "serve", str(adapter), "--port", str(port), "--device", "cpu"]
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=Path(__file__).parent.parent)
    try:
        while True:
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield f"http://localhost:{port}/v1/chat/completions"
    finally:
        server.terminate()
        server.wait(timeout=30)


def image(index: int) -> Image.Image:
    return Image.effect_noise((32, 32 + 8 * index), 90).convert("RGB")


def chat(images: list[Image.Image], text: str) -> list[dict]:
    parts = [{"type": "image", "image": picture} for picture in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def ask(url: str, name: Path, images: list[Image.Image], text: str) -> str:
    """The answer to a chat whose images are sent as PNG in base64."""
    content = []
    for picture in images:
        png = io.BytesIO()
        picture.save(png, "PNG")
        data = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": data}})
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    body = {"model": str(name), "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": False}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def test_answers_are_those_of_generate(url, adapter):
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(adapter).eval()
    processor = AutoProcessor.from_pretrained(adapter)

    @torch.no_grad()
    def generated(images, text, use_pvm):
        inputs = processor.apply_chat_template(
            chat(images, text), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, use_pvm=use_pvm)
        return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    questions = [([image(k) for k in range(number)], f"Cell {name}?") for number, name in
                 ((0, "alpha"), (1, "bravo"), (1, "golf"), (2, "papa"), (3, "kilo"))]  # fmt: skip
    expected = [generated(*question, use_pvm=True) for question in questions]
    assert expected != [generated(*question, use_pvm=False) for question in questions], "the branch decides"
    assert [ask(url, adapter, *question) for question in questions] == expected
    with ThreadPoolExecutor(len(questions)) as pool:
        assert list(pool.map(lambda question: ask(url, adapter, *question), questions)) == expected


def test_refusals(base, tmp_path):
    with pytest.raises(UserError, match="nowhere could not be loaded|nowhere is not a folder"):
        main(["nowhere"])
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a PEFT adapter, which transformers' server does not load"):
        main([str(tmp_path)])
