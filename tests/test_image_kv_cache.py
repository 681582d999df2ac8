"""Visual tokens leave the KV cache ("evict") or never enter it ("skip"): as under a mask that hides their columns."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

import eviction_qwen3vl_pvm
import tiny
from block_qwen3vl_pvm import CrossAttentionMetadata
from cache_qwen3vl_pvm import NO_POSITION, get_visual_memory
from conversations import NEW_TOKENS, Conversation, assert_same_logits, generate
from eviction_qwen3vl_pvm import CachedTokens
from test_cache import ROWS, TURNS, ExactlyQuantizedLayer
from tiny import BATCHES, branches, image, text


def text_mask(conversation: Conversation) -> torch.Tensor:
    """What is compared: text, not padding."""
    return conversation.whole["attention_mask"] * (conversation.whole["mm_token_type_ids"] == 0)


def columns(cache) -> list[int]:
    """Number of columns of each layer."""
    return [layer.keys.shape[-2] for layer in cache.layers]


MODES = {
    "evict": ["evict"] * 3,
    "skip": ["skip"] * 3,
    "evict later": ["keep", "evict", "keep"],
    "keep later": ["evict", "keep", "evict"],
    "skip once": ["keep", "skip", "evict"],
    "evict, then skip": ["evict", "skip", "keep"],
}


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("turns", TURNS)
def test_turns(model, turns, modes):
    """Several turns and images, rows that differ, padding between turns."""
    modes = MODES[modes][: len(TURNS[turns])]
    conversation = Conversation(model, *TURNS[turns], image_kv_cache=modes)
    actual = torch.cat([conversation.next_turn() for _ in conversation.turns], dim=1)
    assert_same_logits(actual, conversation.at_once(), text_mask(conversation))
    kept = Conversation(model, *TURNS[turns])
    differs = (actual - kept.at_once())[text_mask(conversation).bool()].abs().max() > 1e-3
    assert differs == (kept.mask() != conversation.mask()).any(), "images are hidden"


@pytest.mark.parametrize("modes", [["evict"] * 3, ["skip"] * 3, ["evict", "skip", "keep"]], ids=str)
@pytest.mark.parametrize("operation", ["select", "repeat", "reorder"])
@pytest.mark.parametrize("before", [1, 2])
def test_rows_of_a_cache(model, modes, operation, before):
    conversation = Conversation(model, *ROWS, image_kv_cache=modes)
    for _ in range(before):
        conversation.next_turn()
    done, cache = conversation.length, conversation.cache
    rows = {"select": [2, 0], "repeat": [0, 0, 1, 1, 2, 2], "reorder": [1, 1, 0]}[operation]
    if operation == "repeat":
        cache.batch_repeat_interleave(2)
    else:
        (cache.batch_select_indices if operation == "select" else cache.reorder_cache)(torch.tensor(rows))
    rest = torch.cat([conversation.next_turn(rows) for _ in range(before, 3)], dim=1)
    assert_same_logits(rest, conversation.at_once()[rows, done:], text_mask(conversation)[rows, done:])


@pytest.mark.parametrize("mode", ["evict", "skip"])
def test_crop(model, mode):
    """Back to any length, inside images and in front of them, and on with another turn."""
    start = [[text(3), image(4, 8), text(4, 1)], [text(2, 5), image(seed=3), text(2), image(seed=5), text(1)]]
    rest = [[text(3, 7)], [text(3, 8)]]
    conversation = Conversation(model, start, image_kv_cache=mode)
    conversation.next_turn()
    whole = conversation.whole["input_ids"]
    for kept in range(whole.shape[1], 1, -1):
        cache = conversation.cache
        cache.crop(kept - cache.get_seq_length())
        assert len(set(columns(cache))) == 1 and {layer.get_seq_length() for layer in cache.layers} == {kept}
        # Text of the next turn on the cropped cache, and on a cache that never held more.
        tokens = torch.tensor([part[0] for part in rest])
        mask = torch.cat([conversation.whole["attention_mask"][:, :kept], torch.ones_like(tokens)], dim=1)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        actual = tiny.logits(model, inputs, past_key_values=copy.deepcopy(cache), use_cache=True)
        expected = cropped_reference(model, conversation, kept, inputs)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def test_rows_of_a_cache_without_its_images(model):
    """Evicted, cropped to before all images, then repeated."""
    start = [[text(3), image(4, 8), text(4, 1)], [text(3, 5), image(4, 8, seed=3), text(4, 6)]]
    conversation = Conversation(model, start, image_kv_cache="evict")
    conversation.next_turn()
    cache, kept = conversation.cache, 2
    cache.crop(kept - cache.get_seq_length())
    tokens = torch.tensor([[5, 6, 7], [7, 6, 5]])
    mask = torch.cat([conversation.whole["attention_mask"][:, :kept], torch.ones_like(tokens)], dim=1)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    expected = tiny.logits(model, inputs, past_key_values=copy.deepcopy(cache), use_cache=True)
    cache.batch_repeat_interleave(2)
    repeated = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
    actual = tiny.logits(model, repeated, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(actual, expected.repeat_interleave(2, dim=0), atol=2e-5, rtol=1e-5)


def cropped_reference(model, conversation, kept, inputs):
    """The same text after the first `kept` tokens, all computed at once by the decoder."""
    decoder, calls = model.model.language_model, []
    hook = decoder.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    tiny.logits(model, conversation.whole, position_ids=conversation.position_ids)
    hook.remove()
    whole = calls[0]
    visual = whole["visual_pos_masks"][:, :kept]
    new = inputs["input_ids"].shape[1]
    # Rotary positions of the text that follows: after the largest so far, of tokens that are not padding.
    real = conversation.whole["attention_mask"][:, :kept].bool()
    largest = conversation.position_ids[:, :, :kept].masked_fill(~real, -1).amax(dim=(0, 2))
    later = (largest[:, None] + 1 + torch.arange(new)).expand(3, -1, -1)
    visual = torch.nn.functional.pad(visual, (0, new))
    length = kept + new
    seen = visual[..., None] | ~visual[:, None]
    if conversation.image_kv_cache[0] == "evict":
        seen = seen | (torch.arange(length) < kept)[:, None]
    allowed = seen & torch.ones(length, length, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None]
    features = []
    for feature in whole["deepstack_visual_embeds"]:
        placed = torch.zeros_like(whole["inputs_embeds"])
        placed[whole["visual_pos_masks"]] = feature
        features.append(placed[:, :kept][visual[:, :kept]])
    with torch.no_grad(), tiny.decoder_mask(model, allowed):
        states = decoder(
            inputs_embeds=torch.cat([whole["inputs_embeds"][:, :kept], decoder.embed_tokens(inputs["input_ids"])], 1),
            attention_mask=inputs["attention_mask"],
            position_ids=torch.cat([conversation.position_ids[:, :, :kept], later], dim=2),
            visual_pos_masks=visual,
            deepstack_visual_embeds=features,
        ).last_hidden_state
        return model.lm_head(states[:, kept:])


@pytest.mark.parametrize("mode", ["evict", "skip"])
@pytest.mark.parametrize("rows", BATCHES)
def test_what_the_cache_holds(model, rows, mode):
    batch = tiny.inputs(*BATCHES[rows])
    cache = DynamicCache(config=model.config)
    tiny.logits(model, batch, past_key_values=cache, use_cache=True, image_kv_cache=mode)
    length = batch["input_ids"].shape[1]
    assert cache.get_seq_length() == length
    if rows == "text only":
        assert CachedTokens.of(cache) is None and get_visual_memory(cache) is None
        assert columns(cache) == [length] * 4
    else:
        is_text = batch["attention_mask"] * (batch["mm_token_type_ids"] == 0)
        assert columns(cache) == [is_text.sum(dim=1).max()] * 4
        memory = get_visual_memory(cache)
        assert memory.keys[1].shape[2] == memory.positions.shape[1] == (batch["mm_token_type_ids"] > 0).sum(1).max()


# ---------------------------------------------------------------------------------------------- generate()

WAYS = {
    "greedy": {"do_sample": False},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "chunks": {"do_sample": False, "prefill_chunk_size": 5},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["evict", "skip"])
@pytest.mark.parametrize("rows", ["one image", "mixed rows", "text only"])
def test_generate(model, rows, mode, way):
    """The logits of all steps, or the scores of beams, are those of all tokens at once under a mask."""
    batch = tiny.inputs(*BATCHES[rows])
    if way == "prompt lookup" and len(batch["input_ids"]) > 1:
        batch = tiny.inputs(BATCHES[rows][0])
    if way == "chunks" and not reads_in_chunks():
        pytest.skip("nor can the stock model of this version of transformers")
    torch.manual_seed(0)
    output = run_generate(model, batch, image_kv_cache=mode, **WAYS[way])
    length = batch["input_ids"].shape[1]
    tokens = output.sequences[:, length:]
    times = len(tokens) // len(batch["input_ids"])
    prompts = [row for row in BATCHES[rows][: len(batch["input_ids"])] for _ in range(times)]
    both = Conversation(model, prompts, [[row] for row in tokens.tolist()], image_kv_cache=[mode, "keep"])
    expected = both.at_once()[:, length - 1 : -1]
    if way == "beams":
        log_probs = expected.log_softmax(dim=-1).gather(2, tokens[..., None]).mean(dim=(1, 2))
        torch.testing.assert_close(output.sequences_scores, log_probs, atol=2e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, atol=2e-5, rtol=1e-5)
    assert output.past_key_values.get_seq_length() == length + NEW_TOKENS - 1
    if rows != "text only":
        assert columns(output.past_key_values)[0] < length + NEW_TOKENS - 1


def reads_in_chunks() -> bool:
    """Whether generate() can read a prompt in chunks."""
    return Version(transformers.__version__) >= Version("5.20")


def run_generate(model, batch, **kwargs):
    return model.generate(
        **batch,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=tiny.PAD_TOKEN,
        suppress_tokens=[tiny.IMAGE_TOKEN, tiny.VIDEO_TOKEN],
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **kwargs,
    )


@pytest.mark.parametrize("mode", ["evict", "skip"])
def test_quantised_cache(model, mode):
    turns = TURNS["rows that differ"]
    cache = Cache(layers=[ExactlyQuantizedLayer(residual_length=4) for _ in range(4)])
    conversation = Conversation(model, *turns, cache=cache, image_kv_cache=mode)
    actual = torch.cat([conversation.next_turn() for _ in turns], dim=1)
    assert_same_logits(actual, conversation.at_once(), text_mask(conversation))
    assert {layer.get_seq_length() for layer in cache.layers} == {conversation.length}


@pytest.mark.parametrize("mode", ["evict", "skip"])
def test_copies_and_reset(model, mode, tmp_path):
    turns = TURNS["rows that differ"]
    conversation = Conversation(model, *turns, image_kv_cache=mode)
    conversation.next_turn()
    torch.save(conversation.cache, tmp_path / "cache.pt")
    caches = [copy.deepcopy(conversation.cache), torch.load(tmp_path / "cache.pt", weights_only=False)]
    expected = conversation.next_turn()
    for cache in caches:
        again = Conversation(model, *turns, cache=cache, image_kv_cache=mode)
        again.done, again.length = 1, tiny.inputs(*turns[0])["input_ids"].shape[1]
        torch.testing.assert_close(again.next_turn(), expected)
    conversation.cache.reset()
    assert CachedTokens.of(conversation.cache) is None and get_visual_memory(conversation.cache) is None


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("mode", ["evict", "skip"])
def test_static_caches_are_refused(model, mode):
    batch = tiny.inputs(*BATCHES["one image"])
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match="not a static or sliding one"):
        tiny.logits(model, batch, past_key_values=cache, use_cache=True, image_kv_cache=mode)
    with pytest.raises(ValueError, match="static"):
        generate(model, batch, cache_implementation="static", image_kv_cache=mode)


@pytest.mark.parametrize("mode", ["evict", "skip"])
def test_sliding_caches_are_refused(model, mode):
    cache = Cache(layers=[DynamicSlidingWindowLayer(sliding_window=8) for _ in range(4)])
    with pytest.raises(ValueError, match="sliding"):
        tiny.logits(
            model, tiny.inputs(*BATCHES["one image"]), past_key_values=cache, use_cache=True, image_kv_cache=mode
        )


def test_evict_needs_a_cache(model):
    batch = tiny.inputs(*BATCHES["one image"])
    with pytest.raises(ValueError, match="needs a cache"):
        tiny.logits(model, batch, image_kv_cache="evict")
    with pytest.raises(ValueError, match="needs a cache"):
        generate(model, batch, use_cache=False, image_kv_cache="evict")
    text_only = tiny.inputs(*BATCHES["text only"])
    torch.testing.assert_close(tiny.logits(model, text_only, image_kv_cache="evict"), tiny.logits(model, text_only))


def test_unknown_values(model):
    with pytest.raises(ValueError, match="pass 'keep', 'evict' or 'skip'"):
        tiny.logits(model, tiny.inputs(*BATCHES["one image"]), image_kv_cache="drop")


@pytest.mark.parametrize("dropout", [None, 0.5])
def test_a_warning_without_image_dropout(dropout, monkeypatch):
    said = []
    monkeypatch.setattr(eviction_qwen3vl_pvm.logger, "warning_once", said.append)
    model = tiny.build(pvm_training={"method": "pvm", "step": 1, "image_dropout": dropout})
    generate(model, tiny.inputs(*BATCHES["text only"]), image_kv_cache="evict")
    generate(model, tiny.inputs(*BATCHES["one image"]))
    assert not said
    generate(model, tiny.inputs(*BATCHES["one image"]), image_kv_cache="evict")
    assert any("61.6 points" in sentence for sentence in said) == (dropout is None)


# ---------------------------------------------------------------------------------------------- the order of images


@pytest.mark.parametrize(("kind", "knows"), [("pvm", False), ("token_gate", False), ("image_order", True)])
def test_which_image_is_which(kind, knows):
    """To the published branch images are one bag: exchanged, they change nothing."""
    block = branches(tiny.build(pvm_block=kind))[0]
    queries, first, second = (torch.randn(1, length, 32) for length in (3, 4, 8))
    with torch.no_grad():
        outputs = [
            block(queries, torch.cat(images, dim=1), CrossAttentionMetadata(image_index=torch.tensor([numbers])))
            for images, numbers in (((first, second), [0] * 4 + [1] * 8), ((second, first), [0] * 8 + [1] * 4))
        ]
    assert ((outputs[0] - outputs[1]).abs().max() > 1e-3) == knows


def test_neighbouring_images_do_not_look_alike():
    block = branches(tiny.build(pvm_block="image_order"))[0]
    seen = []
    block.image_order.register_forward_hook(lambda module, args, output: seen.append(args[0][0]))
    numbers = CrossAttentionMetadata(image_index=torch.arange(32)[None])
    block(torch.randn(1, 1, 32), torch.randn(1, 32, 32), numbers)
    torch.testing.assert_close(seen[0] @ seen[0].T, 16 * torch.eye(32), atol=1e-4, rtol=0)


def test_numbers_of_images(model):
    """The same in one pass, turn by turn, and in rows that have other images."""
    turns = [
        [[text(3), image(), text(2, 1), image(4, 8, 1)], [text(4, 4)], [image(8, 8, 7), text(2, 5)]],
        [[image(seed=2), text(3, 3)], [image(seed=8), text(2, 1), image(seed=9)], [text(3, 9)]],
    ]
    conversation = Conversation(model, *turns)
    for _ in turns:
        conversation.next_turn()
    memory = get_visual_memory(conversation.cache)
    found = [
        index[places != NO_POSITION].tolist()
        for index, places in zip(memory.image_index, memory.positions, strict=True)
    ]
    assert found == [[0] * 4 + [1] * 8 + [2] * 4, [0] * 4 + [1] * 4, [0] * 16]


@pytest.mark.parametrize("turns", ["an image each", "rows that differ"])
def test_image_order_turn_by_turn(turns):
    model = tiny.build(pvm_block="image_order")
    conversation = Conversation(model, *TURNS[turns], image_kv_cache="evict")
    actual = torch.cat([conversation.next_turn() for _ in conversation.turns], dim=1)
    assert_same_logits(actual, conversation.at_once(), text_mask(conversation))
