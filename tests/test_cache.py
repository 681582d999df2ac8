"""What is done to a KV cache is done to its visual memory."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

import tiny
from cache_qwen3vl_pvm import VisualMemoryLayerMixin, get_visual_memory
from conversations import NEW_TOKENS, Conversation, assert_same_logits, generate, positions
from tiny import BATCHES, branches, image, text, video


# ---------------------------------------------------------------------------------------------- generate()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", BATCHES)
def test_with_and_without_cache(rows, causal):
    model = tiny.build(pvm_causal=causal)
    batch = tiny.inputs(*BATCHES[rows])
    tokens = generate(model, batch)
    assert tokens.tolist() == generate(model, batch, use_cache=False).tolist()
    tiny.set_gates(model, 0.0)
    assert (tokens.tolist() == generate(model, batch).tolist()) == (rows == "text only"), "the branches must matter"


def test_embeddings_with_the_image_merged_in_are_refused(model):
    batch = tiny.inputs(*BATCHES["one image"])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    hints = {name: batch[name] for name in ("attention_mask", "mm_token_type_ids", "image_grid_thw")}
    with pytest.raises(ValueError, match="Pass `pixel_values`"):
        model.generate(inputs_embeds=embeds, **hints, max_new_tokens=2)


def test_keys_and_values_are_computed_once(model):
    calls = {"k_proj": 0, "v_proj": 0, "vision_reducer": 0, "q_proj": 0}
    for block in branches(model):
        modules = {**dict(block.cross_attn.named_children()), "vision_reducer": block.vision_reducer}
        for name in calls:
            modules[name].register_forward_hook(
                lambda module, args, output, name=name: calls.update({name: calls[name] + 1})
            )
    generate(model, tiny.inputs(*BATCHES["mixed rows"]))
    assert calls == {"k_proj": 2, "v_proj": 2, "vision_reducer": 2, "q_proj": 2 * NEW_TOKENS}


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_one_cache_layer_per_decoder_layer(model, cache_class):
    sizes = {"max_cache_len": 64} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **sizes)
    before = [type(layer) for layer in cache.layers]
    generate(model, tiny.inputs(*BATCHES["one image"]), past_key_values=cache)
    assert len(cache.layers) == len(cache) == 4
    for index, (layer, stock) in enumerate(zip(cache.layers, before, strict=True)):
        assert isinstance(layer, stock)
        assert isinstance(layer, VisualMemoryLayerMixin) == (index == 0)
    memory = get_visual_memory(cache)
    for states in (memory.keys, memory.values):
        assert {layer: tuple(tensor.shape) for layer, tensor in states.items()} == dict.fromkeys((1, 2), (1, 1, 4, 16))
    assert [type(layer) for layer in cache_class(config=model.config, **sizes).layers] == before


# ---------------------------------------------------------------------------------------------- several turns

TURNS = {
    "an image each": [[[text(3), image(), text(4, 1)]], [[text(2, 2), image(4, 8, 1), text(3, 3)]]],
    "first text, then an image": [[[text(5)]], [[text(2, 2), image(4, 8, 1), text(3, 3)]]],
    "an image, then text": [[[text(3), image(), text(4, 1)]], [[text(5, 2)]], [[text(1, 3)]]],
    "image and video": [[[image(), text(4, 1)]], [[video(3), text(1, 2)]], [[text(2, 3), image(8, 4, 5), text(2, 4)]]],
    "rows that differ": [
        [[text(3), image(), text(4, 1)], [text(6, 4)], [text(3, 6), image(4, 8, 7), text(2, 5)]],
        [[text(2, 2), image(4, 8, 1), text(3, 3)], [text(2, 7), image(seed=8), text(1, 1)], [text(9, 9)]],
        [[text(1, 2)], [text(3, 7), image(seed=9), image(seed=10), text(1, 1)], [video(2, 4, 4, 9), text(2, 9)]],
    ],
}


def new_cache(model, kind: str):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=80)


@pytest.mark.parametrize("explicit", [True, False], ids=["positions", "no positions"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("turns", TURNS)
def test_turns_on_one_cache(model, turns, kind, explicit):
    conversation = Conversation(model, *TURNS[turns], cache=new_cache(model, kind), explicit=explicit)
    step_by_step = torch.cat([conversation.next_turn() for _ in conversation.turns], dim=1)
    assert_same_logits(step_by_step, conversation.at_once(), conversation.whole["attention_mask"])


def test_grids_of_all_turns_describe_what_is_remembered(model):
    """As the stock model takes them: all tokens and all grids, and no pixels of images that are in the cache."""
    conversation = Conversation(model, [[text(3), image(), text(1)]], [[video(3), text(4, 1)]], [[text(3, 2)]])
    for _ in range(2):
        conversation.next_turn()
    batch = {name: value for name, value in conversation.whole.items() if not name.startswith("pixel")}
    new = {**batch, "input_ids": batch["input_ids"][:, conversation.length :], "mm_token_type_ids": None}
    actual = tiny.logits(model, new, past_key_values=copy.deepcopy(conversation.cache), use_cache=True)
    assert_same_logits(actual, conversation.at_once()[:, conversation.length :])
    tokens = generate(model, batch, past_key_values=conversation.cache)
    assert tokens.tolist() == generate(model, conversation.whole).tolist()


def test_chunks_that_cut_an_image(model):
    """The decoder takes chunks of any length, down to a single token."""
    calls = []
    language_model = model.model.language_model
    hook = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    tiny.logits(model, tiny.inputs(*BATCHES["several images"], padding_side="left"))
    hook.remove()
    whole = {name: calls[0][name] for name in ("inputs_embeds", "position_ids", "visual_pos_masks", "attention_mask")}
    features = [torch.zeros(*whole["inputs_embeds"].shape) for _ in calls[0]["deepstack_visual_embeds"]]
    for feature, visual in zip(features, calls[0]["deepstack_visual_embeds"]):
        feature[whole["visual_pos_masks"]] = visual

    with torch.no_grad():
        expected = language_model(**calls[0]).last_hidden_state
        for size in (1, 2, 3, 7):
            cache, outputs = DynamicCache(config=model.config), []
            for start in range(0, expected.shape[1], size):
                chunk = slice(start, start + size)
                visual = whole["visual_pos_masks"][:, chunk]
                outputs.append(
                    language_model(
                        inputs_embeds=whole["inputs_embeds"][:, chunk],
                        position_ids=whole["position_ids"][:, :, chunk],
                        attention_mask=whole["attention_mask"][:, : start + size],
                        visual_pos_masks=visual,
                        deepstack_visual_embeds=[feature[:, chunk][visual] for feature in features],
                        past_key_values=cache,
                    ).last_hidden_state
                )
            assert_same_logits(torch.cat(outputs, dim=1), expected, whole["attention_mask"])


def test_conversations_do_not_touch_each_other(model):
    """Two conversations on separate caches, in turn, with a text-only call and a batch in between."""
    a = Conversation(model, *TURNS["an image each"])
    b = Conversation(model, [[image(8, 4, 7), text(3, 5)]], [[text(3, 6), video(2, 4, 4, 8), text(2, 7)]])
    outputs = {a: [], b: []}
    for conversation in (a, b, b, a):
        outputs[conversation].append(conversation.next_turn())
        tiny.logits(model, tiny.inputs(*BATCHES["text only"]))
        tiny.logits(model, tiny.inputs(*BATCHES["mixed rows"]))
    for conversation in (a, b):
        assert_same_logits(torch.cat(outputs[conversation], dim=1), conversation.at_once())


def test_nothing_is_kept_on_modules(model):
    def attributes():
        return {
            (name, key)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.Tensor)
        }

    before, state = attributes(), copy.deepcopy(model.state_dict())
    generate(model, tiny.inputs(*BATCHES["mixed rows"]))
    assert attributes() == before
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


# ---------------------------------------------------------------------------------------------- operations on a cache

# Three rows, the second without an image in the first turn. Later turns have no padding.
ROWS = [
    [[text(3), image(), text(4, 1)], [text(6, 4)], [text(3, 6), image(4, 8, 7), text(2, 5)]],
    [[text(10, 2)], [text(2, 7), image(seed=8), text(2, 1)], [image(seed=5), text(4, 9)]],
    [[text(4, 12)], [text(4, 13)], [text(4, 14)]],
]


def select(cache):
    cache.batch_select_indices(torch.tensor([2, 0]))
    return [2, 0]


def repeat(cache):
    cache.batch_repeat_interleave(2)
    return [0, 0, 1, 1, 2, 2]


def reorder(cache):
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    return [1, 1, 0]


@pytest.mark.parametrize(
    ("kind", "operation"),
    [("dynamic", select), ("dynamic", repeat), ("dynamic", reorder), ("static", reorder)],
)
@pytest.mark.parametrize("before", [1, 2])
def test_rows_of_a_cache(model, kind, operation, before):
    conversation = Conversation(model, *ROWS, cache=new_cache(model, kind))
    for _ in range(before):
        conversation.next_turn()
    done = conversation.length
    rows = operation(conversation.cache)
    rest = torch.cat([conversation.next_turn(rows) for _ in range(before, 3)], dim=1)
    expected = conversation.at_once()[rows, done:]
    assert_same_logits(rest, expected, conversation.whole["attention_mask"][rows, done:])


def test_crop_an_image_and_continue_with_another(model):
    start, wrong, right = (
        [[text(3), image(), text(4, 1)]],
        [[image(4, 8, 1), text(3, 2)]],
        [[image(8, 4, 9), text(5, 3)]],
    )
    conversation = Conversation(model, start, wrong)
    conversation.next_turn()
    kept = conversation.length
    conversation.next_turn()
    conversation.cache.crop(kept - conversation.length)
    assert [keys.shape[2] for keys in get_visual_memory(conversation.cache).keys.values()] == [4, 4]

    other = Conversation(model, start, right, cache=conversation.cache)
    other.done, other.length = 1, kept
    assert_same_logits(other.next_turn(), other.at_once()[:, kept:])


@pytest.mark.parametrize("kept", [4, 6])  # 6: cropped right before the first visual token
def test_crop_everything_visual(model, kept):
    conversation = Conversation(model, [[text(5), image(), text(4, 1)]])
    conversation.next_turn()
    conversation.cache.crop(kept - conversation.length)
    assert conversation.cache.get_seq_length() == kept
    prefix = [*text(5), tiny.VISION_START][:kept]
    again = Conversation(model, [[prefix]], [[text(6, 2)]], cache=conversation.cache)
    again.done, again.length = 1, kept
    assert_same_logits(again.next_turn(), again.at_once()[:, kept:])


def test_crop_inside_an_image(model):
    """The rotary position of the next text follows the largest position that is left."""
    conversation = Conversation(model, [[text(3), image(8, 8), text(4, 1)]])
    conversation.next_turn()
    for kept in range(conversation.length - 1, 4, -1):
        conversation.cache.crop(kept - conversation.cache.get_seq_length())
        next_position = model.model.compute_3d_position_ids(
            torch.tensor([[9]]), None, attention_mask=torch.ones(1, kept + 1), past_key_values=conversation.cache
        )
        assert next_position.flatten().tolist() == [conversation.position_ids[:, 0, :kept].amax() + 1] * 3


def test_text_in_training_leaves_the_memory_as_it_is(model):
    """Text-only training runs an extra query only if there is no memory, and never adds to one."""
    cache = DynamicCache(config=model.config)
    model.train()
    model(**tiny.inputs([text(3), image(), text(4, 1)]), past_key_values=cache, use_cache=True)
    memory = get_visual_memory(cache)
    for seed in range(3):
        model(input_ids=torch.tensor([text(2, seed)]), past_key_values=cache, use_cache=True)
    assert get_visual_memory(cache) is memory and memory.complete and memory.keys[1].shape[2] == 4


def test_crop_in_rows_with_different_images(model):
    conversation = Conversation(model, *ROWS)
    first = conversation.next_turn().shape[1]
    conversation.next_turn()
    conversation.cache.crop(first - conversation.length)
    conversation.done, conversation.length = 1, first
    again = torch.cat([conversation.next_turn(), conversation.next_turn()], dim=1)
    assert_same_logits(again, conversation.at_once()[:, first:], conversation.whole["attention_mask"][:, first:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reset(model, kind):
    cache = new_cache(model, kind)
    for turns in (TURNS["rows that differ"], TURNS["first text, then an image"], TURNS["an image each"]):
        if kind == "static":  # its tensors have the batch size of the first turn
            turns = [turn[:1] for turn in turns]
        conversation = Conversation(model, *turns, cache=cache)
        outputs = torch.cat([conversation.next_turn() for _ in turns], dim=1)
        assert_same_logits(outputs, conversation.at_once(), conversation.whole["attention_mask"])
        cache.reset()
        assert get_visual_memory(cache) is None
        if cache.get_seq_length() > 0:  # older transformers only zero a dynamic cache, so it cannot be reused
            assert kind == "dynamic"
            break


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_copies_are_independent(model, kind):
    """A prefix computed once and continued in two ways."""
    start = [[text(3), image(), text(4, 1)]]
    ways = [[[text(2, 2), image(4, 8, 1), text(3, 3)]], [[video(2, 4, 4, 4), text(6, 4)]]]
    prefix = Conversation(model, start, cache=new_cache(model, kind))
    prefix.next_turn()
    for way in (*ways, ways[0]):
        conversation = Conversation(model, start, way, cache=copy.deepcopy(prefix.cache))
        conversation.done, conversation.length = 1, prefix.length
        assert_same_logits(conversation.next_turn(), conversation.at_once()[:, prefix.length :])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache_on_disk(model, kind, tmp_path):
    start, rest = TURNS["an image each"]
    prefix = Conversation(model, start, rest, cache=new_cache(model, kind))
    prefix.next_turn()
    torch.save(prefix.cache, tmp_path / "prompt.pt")
    prefix.cache = torch.load(tmp_path / "prompt.pt", weights_only=False)
    assert [type(layer).__name__ for layer in prefix.cache.layers].count(f"VisualMemory{kind.capitalize()}Layer") == 1
    length = prefix.length
    assert_same_logits(prefix.next_turn(), prefix.at_once()[:, length:])


def test_an_offloaded_cache_leaves_the_memory_where_it_is(model):
    conversation = Conversation(model, *ROWS)
    for _ in ROWS:
        actual = conversation.next_turn()
        before = get_visual_memory(conversation.cache).keys[1]
        for layer in conversation.cache.layers:
            layer.offload()
            assert get_visual_memory(conversation.cache).keys[1] is before
            layer.prefetch()
    assert_same_logits(actual, conversation.at_once()[:, -4:])


class ExactlyQuantizedLayer(QuantizedLayer):
    """Quantisation without a backend and without loss, to test that such a layer carries the memory."""

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, tensor):
        return tensor


@pytest.mark.parametrize("turns", ["an image each", "rows that differ"])
def test_quantized_cache(model, turns):
    cache = Cache(layers=[ExactlyQuantizedLayer(residual_length=4) for _ in range(4)])
    conversation = Conversation(model, *TURNS[turns], cache=cache)
    step_by_step = torch.cat([conversation.next_turn() for _ in conversation.turns], dim=1)
    assert_same_logits(step_by_step, conversation.at_once(), conversation.whole["attention_mask"])
    assert all(isinstance(layer, ExactlyQuantizedLayer) for layer in cache.layers)


# ---------------------------------------------------------------------------------------------- compiled decoding


# "mixed rows": a memory with empty slots, which needs a mask.
@pytest.mark.parametrize(("rows", "backend"), [("one image", "aot_eager"), ("mixed rows", "eager")])
def test_compiled_decode_step(model, rows, backend):
    """One graph without a break, compiled once for all tokens."""
    torch.compiler.reset()
    batch = tiny.inputs(*BATCHES[rows])
    size, length = batch["input_ids"].shape
    new_tokens = torch.tensor([text(6, seed) for seed in range(size)])
    real = torch.cat([batch["attention_mask"], torch.ones_like(new_tokens)], dim=1)
    prompt_positions = positions(model, batch)
    first_new = prompt_positions.amax(dim=(0, 2))[:, None] + 1
    new_positions = (first_new + torch.arange(6)).expand(3, -1, -1)

    def decode(step, forward, cache):
        return forward(
            input_ids=new_tokens[:, step : step + 1],
            attention_mask=torch.nn.functional.pad(real[:, : length + step + 1], (0, 5 - step)),
            position_ids=new_positions[:, :, step : step + 1],
            past_key_values=cache,
            use_cache=True,
        ).logits

    results = []
    with torch.no_grad():
        for forward in (model, torch.compile(model, fullgraph=True, dynamic=False, backend=backend)):
            cache = StaticCache(config=model.config, max_cache_len=length + 6)
            model(**batch, position_ids=prompt_positions, past_key_values=cache, use_cache=True)
            outputs = [decode(0, forward, cache)]
            with torch.compiler.set_stance("fail_on_recompile" if forward is not model else "default"):
                outputs += [decode(step, forward, cache) for step in range(1, 6)]
            results.append(torch.cat(outputs, dim=1))
    assert_same_logits(results[1], results[0])


@pytest.mark.parametrize("explicit", [True, False], ids=["positions", "no positions"])
def test_images_of_any_size_need_two_compilations(model, explicit):
    """The first size is compiled for itself, the second for all sizes."""
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for number, (height, width) in enumerate([(4, 4), (4, 8), (8, 8), (4, 12), (4, 4), (12, 12)]):
            row = [text(3), image(height, width), text(4, 1)]
            cache = StaticCache(config=model.config, max_cache_len=60)
            batch = tiny.inputs(row)
            tiny.logits(model, batch, past_key_values=cache, use_cache=True)
            next_position = positions(model, batch).amax() + 1
            outputs = []
            with torch.compiler.set_stance("fail_on_recompile" if number >= 2 else "default"):
                for step, token in enumerate(text(3, 5)):
                    place = {"position_ids": (next_position + step).expand(3, 1, 1)} if explicit else {}
                    token = torch.tensor([[token]])
                    outputs.append(compiled(input_ids=token, past_key_values=cache, use_cache=True, **place).logits)
            expected = tiny.logits(model, tiny.inputs([*row, text(3, 5)]))[:, -3:]
            assert_same_logits(torch.cat(outputs, dim=1), expected)
