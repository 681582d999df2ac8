"""Diagnostics, compared with the same values computed in another way."""

import math

import pytest
import torch

from modeling_qwen3vl_pvm import pvm_blocks
from pvm.checkpoints.loading import load_checkpoint
from pvm.data.sources import load_conversations
from pvm.evaluation.diagnostics import CHUNK, choose_rows, choose_tokens, diagnose, fit_decay, summarise
from pvm.evaluation.questions import Prompts, Question
from pvm.evaluation.tables import attention_table
from training import PVM, run


TEXT = "The digit in cell alpha is 3. " * 9


@pytest.fixture(scope="module")
def checkpoints(base, conversations, tmp_path_factory):
    """The base, and a PVM model whose gates are far from zero."""
    folder = run(base, conversations, tmp_path_factory.mktemp("run") / "pvm", *PVM, "--gate_learning_rate", "1")
    return {name: load_checkpoint(str(path)) for name, path in (("base", base), ("PVM", folder))}


@pytest.fixture(scope="module")
def prompts(checkpoints, conversations):
    return Prompts(load_conversations(str(conversations), "train"), checkpoints["base"].processor)


@pytest.fixture(scope="module")
def index(prompts) -> int:
    """A prompt with one image."""
    return next(k for k, distance in enumerate(prompts.distances) if distance is not None)


@pytest.mark.parametrize("name", ["base", "PVM"])
def test_diagnostics_agree_with_one_forward_pass(checkpoints, prompts, index, name):
    """In chunks over a cache, or all at once without one: the same attention, logit lens and sizes."""
    checkpoint = checkpoints[name]
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    result = diagnose(checkpoint, prompts, index, TEXT, [7, 16, 25, 34, 43])
    assert model.config._attn_implementation == "sdpa", "restored"

    written = tokenizer(TEXT)["input_ids"]
    assert len(written) > CHUNK, "several chunks"
    example = prompts[index]
    start = len(example["input_ids"]) - 1
    more = torch.tensor(written[:-1])
    ids = torch.cat([example["input_ids"], more])[None]
    types = torch.cat([example["mm_token_type_ids"], torch.zeros_like(more).to(example["mm_token_type_ids"].dtype)])[
        None
    ]
    adds = {}
    hooks = [
        block.register_forward_hook(lambda module, given, out, layer=layer: adds.update({layer: (given, out)}))
        for layer, block in pvm_blocks(model).items()
    ]
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            whole = model(
                input_ids=ids, mm_token_type_ids=types, pixel_values=example["pixel_values"],
                image_grid_thw=example["image_grid_thw"], output_attentions=True, output_hidden_states=True,
            )  # fmt: skip
    finally:
        model.set_attn_implementation("sdpa")
        for hook in hooks:
            hook.remove()
    visual = types[0] > 0
    assert result["visual_tokens"] == int(visual.sum())
    assert result["text_tokens"][0] == start + 1 - int(visual.sum()) and len(result["text_tokens"]) == len(written)

    shares = torch.stack([layer[0, :, start:, visual].sum(-1).mean(0) for layer in whole.attentions], dim=1)
    torch.testing.assert_close(torch.tensor(result["attention"]), shares, atol=1e-4, rtol=1e-3)
    final = whole.logits[0, start:].log_softmax(-1)
    for k, states in enumerate(whole.hidden_states[1:-1]):
        lens = model.lm_head(model.model.language_model.norm(states[0, start:])).log_softmax(-1)
        kl = torch.nn.functional.kl_div(lens, final, log_target=True, reduction="none").sum(-1).mean()
        assert result["kl"][k] == pytest.approx(kl.item(), rel=1e-3)

    gates = {str(layer): abs(block.gate_alpha.item()) for layer, block in pvm_blocks(model).items()}
    assert result["injected"].keys() == gates.keys() and bool(gates) == (name == "PVM")
    for layer, size in result["injected"].items():
        assert size == pytest.approx(gates[layer], rel=0.05), "the size is the gate's"
    assert [heat["token"] for heat in result["heat_maps"]] == [7, 16, 25, 34]
    for heat in result["heat_maps"]:
        seen = torch.stack([layer[0, :, start + heat["token"], visual].mean(0) for layer in whole.attentions]).mean(0)
        torch.testing.assert_close(torch.tensor(heat["self_attention"]), seen / seen.sum(), atol=1e-4, rtol=1e-3)
        assert heat["branches"].keys() == gates.keys()
        for weights in heat["branches"].values():
            assert sum(weights) == pytest.approx(1, abs=1e-3) and len(weights) == math.prod(result["grid"])


def test_an_empty_text(checkpoints, prompts, index):
    result = diagnose(checkpoints["PVM"], prompts, index, "", [0])
    assert len(result["attention"]) == 1 and result["heat_maps"][0]["text"] == ""


def question(group: str, distance: int | None) -> Question:
    return Question(0, group, "", "", 1, [0], distance)


def test_rows_are_spread_over_each_group_and_have_images():
    questions = [question("a" if k % 3 else "b", None if k < 4 else k) for k in range(20)]
    chosen = choose_rows(questions, 3)
    assert len(chosen) == 6 and all(questions[k].distance is not None for k in chosen)
    assert [questions[k].group for k in chosen].count("a") == 3
    assert choose_rows(questions, 0) == [] and len(choose_rows(questions, 100)) == 16


def test_tokens_with_heat_maps():
    assert choose_tokens([0, 5, 9, 12, 40], 10) == [0, 5, 9]
    assert choose_tokens(range(100), 100) == [0, 25, 50, 75]
    assert choose_tokens([], 3) == [0]


@pytest.mark.parametrize(("exponent", "half"), [(1.0, 1.0), (0.6, 0.3)])
def test_the_decay_that_is_there_is_found(exponent, half):
    noise = torch.Generator().manual_seed(0)

    def share(x: float) -> float:
        return 1 / (1 + (x / half) ** exponent * math.exp(0.1 * torch.randn(1, generator=noise).item()))

    rows = [[(x, share(x)) for x in (0.5, 1, 2, 4, 8, 16)] for _ in range(40)]
    fit = fit_decay(rows)
    assert fit["exponent"] == pytest.approx(exponent, abs=0.03) and fit["half"] == pytest.approx(half, rel=0.1)
    low, high = fit["exponent_interval"]
    assert low < exponent < high and high - low < 0.1
    rows = [[(x, 1 / (1 + (x / (1 + 0.1 * k)) ** 0.8)) for x in (0.5, 1, 2, 4)] for k in range(6)]
    assert fit_decay(rows)["half_interval"] == pytest.approx([1.0969613104865237, 1.3790939861559448]), "seeded"
    assert fit_decay([[(2.0, 0.3)], [(2.0, 0.4)]]) is None, "x does not vary"
    assert fit_decay([]) is None


def test_a_summary(checkpoints, prompts, index):
    results = {
        name: [{"group": "read", **diagnose(checkpoint, prompts, index, TEXT, [0])}]
        for name, checkpoint in checkpoints.items()
    }
    summary = summarise(results)
    layers = checkpoints["base"].model.config.text_config.num_hidden_layers
    for name, seen in summary.items():
        attention = seen["attention"]["read"]
        assert attention["rows"] == 1 and len(attention["by_layer"]) == layers and len(seen["kl"]) == layers - 1
        shares = results[name][0]["attention"]
        assert attention["by_layer"][0]["mean"] == pytest.approx(sum(row[0] for row in shares) / len(shares))
        # The first bin is the first token, the second the two after it.
        second = [sum(row) / layers for row in shares[1:3]]
        assert attention["by_position"][1]["mean"] == pytest.approx(sum(second) / 2)
        assert attention["by_position"][1]["x"] == pytest.approx(2.5)
    assert summary["base"]["injected"] == {} and len(summary["PVM"]["injected"]) == 3


def test_groups_decay_apart():
    """Two groups with different curves: one fit through both would describe neither."""

    def row(group: str, half: float, ratios: list[float]) -> dict:
        return {
            "group": group, "visual_tokens": 10, "text_tokens": [10 * ratio for ratio in ratios],
            "attention": [[1 / (1 + ratio / half)] for ratio in ratios], "kl": [0.0], "residual": [1.0], "ffn": [1.0],
            "injected": {},
        }  # fmt: skip

    rows = [row("near", 1.0, [0.5, 1, 2, 4]), row("far", 0.1, [8, 16, 32, 64])]
    seen = summarise({"base": rows})["base"]["attention"]
    for group, half in (("near", 1.0), ("far", 0.1)):
        decay = seen[group]["decay"]
        assert decay["exponent"] == pytest.approx(1) and decay["half"] == pytest.approx(half)
    assert seen["far"]["decay"]["observed"] == [8, 64]
    halves = [line[3] for line in attention_table({"diagnostics": {"base": {"attention": seen}}}).rows]
    assert halves[0].startswith("1.00 [") and halves[1] == "below 8"
