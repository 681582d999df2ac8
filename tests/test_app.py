"""The page: answers and what is shown of each token, what it refuses, the Space, and all of it in a browser."""

import ast
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import packages_distributions
from io import BytesIO
from pathlib import Path
from threading import Lock

import pytest
import torch
from huggingface_hub import RepoCard
from packaging.utils import canonicalize_name
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from modeling_qwen3vl_pvm import pvm_blocks
from pvm.app import answers, server
from pvm.app.answers import Question, data_uri, read_upload, write_answer
from pvm.app.examples import examples
from pvm.app.space import PACKAGES, write_space
from pvm.checkpoints.loading import load_checkpoint
from pvm.errors import UserError
from pvm.evaluation.ablations import Ablation, generate_in_two_parts
from pvm.evaluation.questions import image_distance
from pvm.worlds.conversations import NAMES
from training import PVM, ROOT, run


TEXT = "apple barn bell Read alpha to papa."
BACKBONE = ROOT / "assets" / "digits-backbone"


@pytest.fixture(scope="module")
def folder(conversations, tmp_path_factory) -> Path:
    """A PVM checkpoint on the demo's backbone whose branches change every prediction."""
    return run(BACKBONE, conversations, tmp_path_factory.mktemp("app") / "pvm", *PVM, "--gate_learning_rate", "0.4")


@pytest.fixture(scope="module")
def checkpoints(folder):
    loaded = {"stock": load_checkpoint(str(BACKBONE)), "PVM": load_checkpoint(str(folder))}
    for checkpoint in loaded.values():
        checkpoint.model.set_attn_implementation("eager")
    return loaded


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(answers, "MAX_ANSWER", 8)


def picture(seed: int) -> str:
    pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return data_uri(Image.fromarray(pixels.numpy()))


def ask(checkpoint, **fields) -> tuple[dict, list[dict], str]:
    """What is said about the prompt, the tokens, and the end."""
    question = Question(0, **{"text": TEXT, "image": picture(0), **fields})
    prompt, *tokens, end = write_answer(checkpoint, question, Lock())
    return prompt, tokens, end["end"]


def text_of(tokens: list[dict]) -> str:
    return "".join(token["text"] for token in tokens)


@pytest.mark.parametrize(
    "kwargs", [{}, {"use_pvm": False}, {"image_kv_cache": "evict"}, {"image_kv_cache": "skip"}], ids=str
)
def test_the_answer_is_that_of_generate(checkpoints, kwargs):
    """And what is said about its first and second token is what one pass without a cache finds."""
    checkpoint = checkpoints["PVM"]
    prompt, tokens, _ = ask(checkpoint, **kwargs)
    batch = answers._encode(checkpoint, TEXT, answers._image(picture(0)))
    output = checkpoint.model.generate(**batch, max_new_tokens=8, **kwargs)[0, batch["input_ids"].shape[1] :]
    assert text_of(tokens) == checkpoint.processor.tokenizer.decode(output, skip_special_tokens=True)
    assert len(tokens) >= 2

    in_sight = kwargs.get("image_kv_cache", "keep") == "keep"
    if in_sight:
        visual = batch["mm_token_type_ids"][0] > 0
        with torch.inference_mode():
            whole = checkpoint.model.model(
                **batch, **kwargs, output_attentions=True, output_pvm_attentions=kwargs.get("use_pvm", True)
            )
        attention = torch.stack(whole.attentions)[:, 0].mean(dim=1)[..., visual]  # [layer, position, visual]
        shares = attention.sum(dim=-1).mean(dim=0)
        start = len(visual) - image_distance(batch["mm_token_type_ids"][0])
        assert prompt["shares"] == pytest.approx(shares[start:].tolist(), abs=1e-4)
        assert tokens[0]["share"] == prompt["shares"][-1] > 0
        expected = attention[:, -1].mean(dim=0)
        assert tokens[0]["self_attention"] == pytest.approx((expected / expected.sum()).tolist(), abs=1e-4)
        if kwargs.get("use_pvm", True):
            branches = [weights[0, :, -1].mean(dim=0).tolist() for weights in whole.pvm_attentions]
            assert list(tokens[0]["branches"].values()) == [pytest.approx(map_, abs=1e-4) for map_ in branches]
    else:
        assert tokens[1]["share"] == 0 and tokens[1]["self_attention"] == []
        assert (tokens[0]["share"] > 0) == (kwargs["image_kv_cache"] == "evict"), "the question has seen it"
    assert all(sum(weights) == pytest.approx(1, abs=2e-3) for t in tokens for weights in t["branches"].values())
    assert bool(tokens[0]["branches"]) == bool(prompt["branch_shares"]) == kwargs.get("use_pvm", True)
    assert prompt["branch_shares"] == pytest.approx([1] * len(prompt["branch_shares"]), abs=1e-3)
    assert prompt["grid"] == [4, 4] and prompt["visual_tokens"] == 16


def test_bytes_saved_are_the_difference(checkpoints):
    kept, evicted, skipped = (ask(checkpoints["PVM"], image_kv_cache=kind)[1][0] for kind in ("keep", "evict", "skip"))
    assert kept["bytes_saved"] == 0 < evicted["bytes_saved"]
    for token in (evicted, skipped):
        assert token["cache_bytes"] + token["bytes_saved"] == kept["cache_bytes"]


def test_candidates_with_and_without_branches(checkpoints):
    (_, on, _), (_, off, _) = (ask(checkpoints["PVM"], use_pvm=use_pvm) for use_pvm in (True, False))
    assert on[0]["candidates"] == off[0]["candidates_otherwise"] != on[0]["candidates_otherwise"]
    assert on[0]["candidates_otherwise"] == off[0]["candidates"]
    text, probability = on[0]["candidates"][0]
    assert text == on[0]["text"] and probability >= on[0]["candidates"][1][1]


def test_scaled_gates(checkpoints):
    checkpoint = checkpoints["PVM"]
    gates = [block.gate_alpha.item() for block in pvm_blocks(checkpoint.model).values()]
    zero, off = ask(checkpoint, gate_scale=0)[1], ask(checkpoint, use_pvm=False)[1]
    assert [token["candidates"] for token in zero] == [token["candidates"] for token in off]
    assert ask(checkpoint, gate_scale=0.2)[1][0]["candidates"] != ask(checkpoint)[1][0]["candidates"]
    assert [block.gate_alpha.item() for block in pvm_blocks(checkpoint.model).values()] == gates


def test_another_image_in_memory(checkpoints):
    checkpoint = checkpoints["PVM"]
    prompt, tokens, _ = ask(checkpoint, memory=picture(1))
    batch, other = (answers._encode(checkpoint, TEXT, answers._image(picture(seed))) for seed in (0, 1))
    distance = image_distance(batch["mm_token_type_ids"][0])
    with torch.inference_mode():
        expected = generate_in_two_parts(
            checkpoint.model, batch, other, distance, Ablation("another_memory"), 8, torch.tensor([-1])
        )
    decoded = checkpoint.processor.tokenizer.decode(expected[0], skip_special_tokens=True)
    assert decoded.startswith(text_of(tokens)) and tokens[0]["branches"] != ask(checkpoint)[1][0]["branches"]
    assert (prompt["image"], prompt["memory"]) == (picture(0), picture(1))
    blind = [ask(checkpoint, use_pvm=False, memory=memory)[1][0]["candidates"] for memory in (None, picture(1))]
    assert blind[0] == blind[1], "without branches, memory is not read"


def test_conversations_in_turn_do_not_mix(checkpoints):
    checkpoint, lock = checkpoints["PVM"], Lock()
    questions = [
        Question(0, TEXT, picture(0), gate_scale=2.0),
        Question(0, "Cell alpha?", picture(1), use_pvm=False),
        Question(0, TEXT, picture(2), image_kv_cache="evict", memory=picture(1)),
    ]
    alone = [list(write_answer(checkpoint, question, lock)) for question in questions]
    running = [write_answer(checkpoint, question, lock) for question in questions]
    together = [[] for _ in questions]
    while any(len(events) < len(all_) for events, all_ in zip(together, alone)):
        for events, generator in zip(together, running):
            events += [event for event in [next(generator, None)] if event]
    assert together == alone


def test_a_stock_model(checkpoints):
    prompt, tokens, _ = ask(checkpoints["stock"], image_kv_cache="evict", memory=picture(1), gate_scale=3)
    assert (
        prompt["branch_shares"] == [] and tokens[0]["candidates_otherwise"] is None and tokens[0]["bytes_saved"] == 0
    )
    assert "no PVM branches" in server.describe(checkpoints["stock"])["about"]
    assert server.describe(checkpoints["PVM"])["has_branches"]


def test_examples_are_for_models_that_know_their_words(checkpoints):
    made = examples([checkpoints["PVM"]])
    prompt, tokens, _ = ask(checkpoints["stock"], **{key: made[2][key] for key in ("text", "image")})
    assert prompt["grid"] == [4, 4] and text_of(tokens) == made[2]["expected"], "right after the image, it can read"
    other = dataclasses.replace(checkpoints["PVM"], processor=type("Processor", (), {"tokenizer": OtherTokenizer()}))
    assert examples([checkpoints["PVM"], other]) == []


class OtherTokenizer:
    def get_vocab(self):
        return {"a": 0}


# What is refused


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"text": " "}, "Write a question"),
        ({"image": ""}, "Choose an image"),
        ({"image": "file:///etc/passwd"}, "Choose an image"),
        ({"image": "/etc/passwd"}, "Choose an image"),
        ({"image": "data:image/png;base64,AAAA"}, "the image of the question cannot be read"),
        ({"memory": "data:,x"}, "the image of the question cannot be read"),
        ({"text": "<|image_pad|>"}, r"contains <\|image_pad\|>, which the chat format reserves"),
        ({"text": "apple " * 9000}, "have 90[0-9]{2} tokens, and this page answers up to 8192"),
        ({"gate_scale": 1e9}, "a number from 0 to 5"),
        ({"gate_scale": None}, "a number from 0 to 5"),
        ({"gate_scale": float("nan")}, "a number from 0 to 5"),
        ({"image_kv_cache": "lose"}, "neither keep nor evict nor skip"),
        ({"use_pvm": [9]}, "`use_pvm` is of the wrong type"),
        ({"text": "\ud800"}, "This is not a question: .*surrogates"),
        ({"colour": 1}, "This is not a question: .*colour"),
    ],
)
def test_a_question_that_cannot_be_answered(checkpoints, content, says):
    fields = {"model": 0, "text": TEXT, "image": picture(0), **content}
    with pytest.raises(UserError, match=says):
        next(write_answer(checkpoints["PVM"], Question.parse(json.dumps(fields).encode()), Lock()))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000])
def test_what_is_not_a_question(content):
    with pytest.raises(UserError, match="This is not a question"):
        Question.parse(content)


def test_uploads(recwarn):
    with pytest.raises(UserError, match=r"cat\.png cannot be read: its format is not known"):
        read_upload(b"no image", "cat.png")
    whole = BytesIO()
    Image.new("L", (3000, 1500), 255).save(whole, "PNG")
    with pytest.raises(UserError, match="cannot be read"):
        read_upload(whole.getvalue()[:100], "cut.png")
    assert read_upload(whole.getvalue(), "large.png").size == (1024, 512)


# The Space, and the page in a browser


def test_requirements_of_the_space():
    """They are all that the page imports, directly or through other modules."""
    distributions, seen, imported = packages_distributions(), set(), {"uvicorn"}  # by a function
    waiting = ["pvm.__main__", "pvm.app.command", "pvm.app.server"]
    while waiting:
        module = waiting.pop()
        path = ROOT / f"{module.replace('.', '/')}.py"
        path = path if path.is_file() else path.with_suffix("") / "__init__.py"
        if module in seen or not path.is_file():
            continue
        seen.add(module)
        statements = [
            statement
            for statement in ast.parse(path.read_text()).body
            if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
            and not (isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING")
        ]
        for node in [node for statement in statements for node in ast.walk(statement)]:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            waiting += names
            imported |= {name.partition(".")[0] for name in names}
    assert {"pvm.evaluation.diagnostics", "modeling_qwen3vl_pvm"} <= seen
    listed = {canonicalize_name(name) for name in PACKAGES}
    ours = {"pvm", *(file.stem for file in ROOT.glob("*_qwen3vl_pvm.py"))}
    for module in imported - sys.stdlib_module_names - ours:
        assert listed & {canonicalize_name(name) for name in distributions[module]}, module


@pytest.fixture(scope="module")
def space(folder, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("space") / "page"
    write_space([str(folder)], target)
    return target


@pytest.fixture(scope="module")
def page(space) -> str:
    """The address of the page that the Space shows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PORT": str(port), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    with subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/setup").close()
                    break
                except urllib.error.URLError:
                    assert process.poll() is None, process.stderr.read()
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def post(address: str, content: bytes) -> tuple[int, list[dict]]:
    """Status, and the lines of JSON."""
    try:
        response = urllib.request.urlopen(urllib.request.Request(address, content, method="POST"))
    except urllib.error.HTTPError as error:
        response = error
    with response:
        return response.status, [json.loads(line) for line in response]


def png(size: tuple[int, int]) -> bytes:
    content = BytesIO()
    Image.new("1", size).save(content, "PNG")
    return content.getvalue()


def test_a_space(space, folder):
    with pytest.raises(UserError, match="exists and is left as it is"):
        write_space([str(folder)], space)
    card = RepoCard.load(space / "README.md", repo_type="space")
    assert card.data.sdk == "docker" and card.data.app_port == 7860
    assert not (space / "pvm/recipes").exists() and len(list(space.glob("*_qwen3vl_pvm.py"))) >= 8
    written = [file for file in space.rglob("*") if file.is_file() and file.suffix != ".safetensors"]
    assert not any(str(ROOT).encode() in file.read_bytes() for file in written), "paths of this machine"


@pytest.mark.parametrize(
    ("path", "content", "says"),
    [
        ("image?name=a.png", b"no image", "the image a.png cannot be read: its format is not known."),
        ("image?name=a.png", bytes(21 * 2**20), server.TOO_LARGE),
        ("image?name=a.png", png((10_000, 10_000)), "exceeds limit"),
        ("answer", rb'{"\ud800": 1}', r"unexpected keyword argument '\ud800'"),
        ("answer", json.dumps({"model": 7, "text": "a", "image": ""}).encode(), "There is no model 7."),
    ],
)
def test_the_server_refuses(page, path, content, says):
    status, (line,) = post(f"{page}/{path}", content)
    assert status == 422 and says in line["error"]


def test_the_first_token_comes_before_the_others(page):
    content = json.dumps({"model": 0, "text": "Cell golf?", "image": picture(0)}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{page}/answer", content, method="POST")) as response:
        response.readline()
        assert json.loads(response.readline())["text"] and len(response.read()) > 0


@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs the Debian packages chromium and chromium-driver",
)
def test_in_a_browser(page, checkpoints, tmp_path):
    """It loads, answers, draws; both columns differ; a broken file gets a sentence; two visitors do not mix."""

    def both(cell: str, image: str) -> list[str]:
        text = f"Cell {cell}?"
        return [text_of(ask(checkpoints["PVM"], text=text, image=image, use_pvm=on)[1]) for on in (True, False)]

    setup = json.load(urllib.request.urlopen(f"{page}/setup"))
    image = setup["examples"][0]["image"]
    expected = {cell: both(cell, image) for cell in NAMES}
    first, *others = [cell for cell in NAMES if expected[cell][0] != expected[cell][1]]
    second = next(cell for cell in others if expected[cell] != expected[first])

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1400"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options) as browser:
        wait = WebDriverWait(browser, 60)

        def written(_=None) -> list[str]:
            """The answers, once they are complete."""
            columns = browser.find_elements(By.CSS_SELECTOR, ".column[data-state=done] .answer")
            return len(columns) == 2 and [column.text for column in columns]

        def write(cell: str) -> None:
            field = browser.find_element(By.ID, "text")
            field.clear()
            field.send_keys(f"Cell {cell}?")

        visitors = [browser.current_window_handle]
        browser.switch_to.new_window("tab")
        visitors.append(browser.current_window_handle)
        for visitor, cell in zip(visitors, (first, second)):
            browser.switch_to.window(visitor)
            browser.get(page)
            wait.until(written)  # the first example
            write(cell)
        for visitor in visitors:  # both at once
            browser.switch_to.window(visitor)
            browser.execute_script("document.querySelector('#send').click()")
        for visitor, cell in zip(visitors, (first, second)):
            browser.switch_to.window(visitor)
            assert wait.until(written) == expected[cell]

        for mode, paper in (("dark", "rgb(22, 24, 27)"), ("light", "rgb(255, 255, 255)")):
            features = [{"name": "prefers-color-scheme", "value": mode}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == paper

        drawn = browser.execute_script(
            "return [...document.querySelectorAll('.column')].map("
            "column => [...column.querySelectorAll('canvas')].map(canvas => canvas.toDataURL()))"
        )
        assert list(map(len, drawn)) == [4, 1] and len({*drawn[0], *drawn[1]}) == 5, "self-attention, three branches"
        assert len(browser.find_elements(By.CSS_SELECTOR, ".chart polyline")) == 3
        headings = browser.find_elements(By.CSS_SELECTOR, ".candidates th")
        assert [heading.text for heading in headings] == ["With branches", "Without branches"] * 2

        (tmp_path / "broken.png").write_bytes(b"no image")
        (tmp_path / "huge.png").write_bytes(bytes(21 * 2**20))
        (tmp_path / "fine.png").write_bytes(png((48, 24)))
        upload = browser.find_element(By.CSS_SELECTOR, "#image input")
        message = browser.find_element(By.ID, "message")
        for name, says in (("broken.png", "broken.png cannot be read"), ("huge.png", server.TOO_LARGE)):
            upload.send_keys(str(tmp_path / name))
            wait.until(lambda _, says=says: says in message.text)
            assert browser.find_element(By.CSS_SELECTOR, "#image img").get_attribute("src") == image, "kept"
        upload.send_keys(str(tmp_path / "fine.png"))
        wait.until(lambda _: browser.find_element(By.CSS_SELECTOR, "#image img").get_attribute("src") != image)
        assert message.text == ""

        select = browser.find_element(By.CSS_SELECTOR, ".column [name=image_kv_cache]")
        Select(select).select_by_value("evict")
        browser.find_element(By.ID, "send").click()
        wait.until(written)
        assert re.search(r"saved \(18 visual tokens\)", browser.find_element(By.CLASS_NAME, "facts").text)
        errors = [entry for entry in browser.get_log("browser") if "422" not in entry["message"]]
        assert errors == []
