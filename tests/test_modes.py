"""
Every mode of generate() against the plain path: batch 1, no cache, the whole sequence in one forward pass.

A mode is exact if it writes the plain path's tokens, and its logits differ from the plain path's by at most what the
stock model's do in the same mode, plus 1e-5.
"""

import copy
import inspect
import threading

import pytest
import torch
from transformers import CompileConfig, DynamicCache, Qwen3VLForConditionalGeneration, StaticCache

import tiny
from cache_qwen3vl_pvm import VisualMemoryLayerMixin, get_visual_memory
from tiny import BATCHES, image, text, video


NEW_TOKENS = 10
SILENT = [tiny.IMAGE_TOKEN, tiny.VIDEO_TOKEN]  # placeholders of images and videos are never written
# Before generate() passed encoder outputs on, the first chunk had to have all images.
OLD_CHUNKS = "mm_encoder_outputs" not in inspect.signature(Qwen3VLForConditionalGeneration.forward).parameters
ROWS = {
    **BATCHES,
    "images of all sizes": [
        [image(4, 4), text(3), image(8, 8, 1), text(2, 1)],
        [text(5, 2), image(4, 12, 2), text(4, 3)],
        [text(7, 4)],
        [video(3, 4, 8, 3), text(3, 5)],
    ],
}


def generate(model, batch, **kwargs):
    """Greedy by default, never stops early."""
    defaults = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": tiny.PAD_TOKEN}
    return model.generate(
        **batch, suppress_tokens=SILENT, return_dict_in_generate=True, output_logits=True, **{**defaults, **kwargs}
    )


def plain_logits(model, row: list, tokens: list[int]) -> torch.Tensor:
    """`[tokens, vocabulary]`: the plain path's logits for each of the tokens after a row."""
    return tiny.logits(model, tiny.inputs([*row, tokens]))[0, -len(tokens) - 1 : -1]


def assert_greedy(plain: torch.Tensor, tokens: list[int]):
    """The tokens are those that the plain path writes."""
    plain = plain.clone()
    plain[:, SILENT] = -torch.inf
    assert plain.argmax(-1).tolist() == tokens


def deviation(model, rows: list[list], exact: bool = True, **mode) -> float:
    """Largest difference of a logit in this mode from the plain path; if `exact`, the tokens must be equal."""
    batch = tiny.inputs(*rows)
    output = generate(model, batch, **mode)
    new_tokens = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
    logits = torch.stack(output.logits, dim=1)
    differences = []
    for row, tokens, actual in zip(rows, new_tokens, logits, strict=True):
        plain = plain_logits(model, row, tokens)
        if exact:
            assert_greedy(plain, tokens)
        differences.append((actual - plain).abs().max().item())
    return max(differences)


@pytest.fixture(scope="module")
def stock():
    return tiny.build_stock()


def assert_exact(model, stock, rows, **mode):
    assert deviation(model, rows, **mode) <= deviation(stock, rows, **mode) + 1e-5


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "mode",
    [{"use_cache": False}, {}, {"cache_implementation": "static"}],
    ids=["no cache", "dynamic", "static"],
)
def test_caches(model, stock, mode, rows):
    assert_exact(model, stock, ROWS[rows], **mode)


@pytest.mark.parametrize("rows", ["one image", "images of all sizes"])
def test_compiled(model, stock, rows):
    """With the settings of generate() on an accelerator, where it compiles by itself."""
    torch.compiler.reset()
    config = CompileConfig(fullgraph=True, backend="eager")
    config._compile_all_devices = True
    assert_exact(model, stock, ROWS[rows], cache_implementation="static", compile_config=config)


@pytest.mark.parametrize("rows", ["one image", "images of all sizes"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_attention_implementations(stock, attn_implementation, rows):
    stock = copy.deepcopy(stock)
    stock.set_attn_implementation(attn_implementation)
    model = tiny.build(attn_implementation=attn_implementation)
    assert_exact(model, stock, ROWS[rows])


@pytest.mark.skipif(OLD_CHUNKS, reason="this version of transformers has no quantised cache without another package")
def test_quantized_cache_is_no_further_off_than_the_stock_model(model, stock):
    """Keys and values of self-attention lose precision; the visual memory is not quantised."""
    mode = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    rows = [[text(3, seed), image(seed=seed), text(4, seed + 1), video(seed=seed)] for seed in range(6)]
    ours, theirs = (sum(deviation(m, [row], exact=False, **mode) for row in rows) for m in (model, stock))
    assert 1e-3 < ours <= theirs


@pytest.mark.skipif(OLD_CHUNKS, reason="nor can the stock model of this version of transformers")
@pytest.mark.parametrize("size", [1, 3, 5, 8, 11])
@pytest.mark.parametrize("rows", ["several images", "video", "images of all sizes"])
def test_prefill_in_chunks(model, stock, rows, size):
    """Boundaries before, between and inside of images."""
    assert_exact(model, stock, ROWS[rows], prefill_chunk_size=size)


SPECULATIVE = {
    "an image": [text(8), image(), text(12), text(8)],
    "a video": [text(8), video(3), text(12), text(8)],
    "an image in the candidates": [text(8), image(), text(5, 1), image(8, 4, 1), text(8)],
}


@pytest.mark.parametrize("row", SPECULATIVE)
@pytest.mark.parametrize("way", ["prompt lookup", "by a copy", "by another model"])
def test_speculative_decoding(model, stock, monkeypatch, way, row):
    """Rejected candidates are cropped from the cache, and so from the memory."""
    cropped = []
    crop = VisualMemoryLayerMixin.crop
    monkeypatch.setattr(VisualMemoryLayerMixin, "crop", lambda self, *args: (cropped.append(args), crop(self, *args)))

    def mode(model):
        if way == "prompt lookup":
            return {"prompt_lookup_num_tokens": 4}
        return {"assistant_model": copy.deepcopy(model) if way == "by a copy" else tiny.build_stock(seed=1)}

    difference = deviation(model, [SPECULATIVE[row]], max_new_tokens=20, **mode(model))
    assert difference <= deviation(stock, [SPECULATIVE[row]], max_new_tokens=20, **mode(stock)) + 1e-5
    if way != "by a copy":
        assert any(args[0] < 0 for args in cropped), "no candidate was rejected, so nothing was tested"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "mode",
    [{"num_beams": 3, "output_scores": True}, {"num_beams": 2, "num_return_sequences": 2, "output_scores": True}],
    ids=["3 beams", "2 sequences of 2 beams"],
)
def test_beams(model, stock, mode, cache, rows):
    """Tokens and scores of each row are those of the row alone without a cache."""

    def scores(model):
        batch = tiny.inputs(*ROWS[rows])
        output = generate(model, batch, **mode, **cache)
        new_tokens = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
        alone = [generate(model, tiny.inputs(row), **mode, use_cache=False) for row in ROWS[rows]]
        assert new_tokens == [tokens[-NEW_TOKENS:] for one in alone for tokens in one.sequences.tolist()]
        return (output.sequences_scores - torch.cat([one.sequences_scores for one in alone])).abs().max()

    assert scores(model) <= scores(stock) + 1e-5


@pytest.mark.parametrize("rows", ["one image", "video"])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_sampling_of_several_sequences(model, cache, rows):
    mode = {"do_sample": True, "num_return_sequences": 3}
    batch = tiny.inputs(*ROWS[rows])
    torch.manual_seed(0)
    sampled = generate(model, batch, **mode, **cache).sequences.tolist()
    torch.manual_seed(0)
    assert sampled == generate(model, batch, **mode, use_cache=False).sequences.tolist()
    assert len({tuple(tokens) for tokens in sampled}) == 3


@pytest.mark.parametrize("rows", ROWS)
def test_input_embeddings(model, rows):
    """Instead of ids, with everything else that a processor returns; the stock model drops M-RoPE here."""
    batch = tiny.inputs(*ROWS[rows])
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    for row, tokens in zip(ROWS[rows], generate(model, batch).sequences.tolist(), strict=True):
        assert_greedy(plain_logits(model, row, tokens), tokens)


# ---------------------------------------------------------------------------------------------- a cache continued

TURNS = {
    "an image each": [[text(3), image(), text(4, 1)], [text(2, 2), image(4, 8, 1), text(3, 3)]],
    "first text, then an image": [[text(5)], [text(2, 2), image(4, 8, 1), text(3, 3)]],
    "an image, then text": [[text(3), image(8, 8), text(4, 1)], [text(5, 2)], [text(1, 3)]],
    "image and video": [[image(), text(4, 1)], [video(3), text(1, 2)], [text(2, 3), image(8, 4, 5), text(2, 4)]],
}


def pad(values: torch.Tensor, left: int, fill: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (left, 0), value=fill)


class Chat:
    """A conversation with generate() on one cache; each turn has its own images and is answered."""

    def __init__(self, model, rows: list[list], cache=None):
        self.model = model
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        self.rows = [[] for _ in rows]
        self.ids = self.mask = torch.zeros(len(rows), 0, dtype=torch.long)

    def turn(self, rows: list[list], whole: bool = True, **mode) -> list[list[int]]:
        """
        The answers to the next parts of each row. `input_ids` are those of all turns (`whole`) or of this turn alone,
        the mask is that of all, pixels and grids are those of this turn.
        """
        batch = tiny.inputs(*rows)
        self.mask = torch.cat([self.mask, batch["attention_mask"]], dim=1)
        past = self.ids.shape[1] if whole else self.ids.shape[1] - self.cache.get_seq_length()
        batch["input_ids"] = torch.cat([self.ids[:, self.ids.shape[1] - past :], batch["input_ids"]], dim=1)
        batch["mm_token_type_ids"] = pad(batch["mm_token_type_ids"], past, 0)
        batch["attention_mask"] = self.mask
        output = generate(self.model, batch, past_key_values=self.cache, **mode)
        answers = output.sequences[:, batch["input_ids"].shape[1] :]
        self.ids = torch.cat([self.ids, output.sequences[:, past:]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(answers)], dim=1)
        self.rows = [[*row, *new, answer] for row, new, answer in zip(self.rows, rows, answers.tolist(), strict=True)]
        return answers.tolist()

    def assert_greedy(self):
        """The last answers are those that the plain path writes."""
        for *row, answer in self.rows:
            assert_greedy(plain_logits(self.model, row, answer), answer)


@pytest.mark.parametrize("whole", [True, False], ids=["all tokens", "new tokens"])
@pytest.mark.parametrize("turns", TURNS)
def test_turns_of_a_chat(model, turns, whole):
    chat = Chat(model, [[]])
    for parts in TURNS[turns]:
        chat.turn([parts], whole)
        chat.assert_greedy()
    assert get_visual_memory(chat.cache).keys[1].shape[2] == sum(
        part["grid"][0] * part["grid"][1] * part["grid"][2] // tiny.MERGE_SIZE**2
        for parts in TURNS[turns]
        for part in parts
        if isinstance(part, dict)
    )


def test_turns_of_a_batch_of_chats(model):
    """Rows have different lengths in every turn, so there is padding in their middle."""
    chat = Chat(model, [[], [], []])
    for rows in (
        [[text(3), image(), text(4, 1)], [text(6, 4)], [text(3, 6), image(4, 8, 7), text(2, 5)]],
        [[text(2, 2), image(4, 8, 1), text(3, 3)], [text(2, 7), image(seed=8), text(1, 1)], [text(9, 9)]],
        [[text(1, 2)], [text(3, 7), image(seed=9), image(seed=10), text(1, 1)], [video(2, 4, 4, 9), text(2, 9)]],
    ):
        chat.turn(rows)
        chat.assert_greedy()


def test_a_prefix_computed_once_and_continued_twice(model):
    prefix = [text(3), image(), text(4, 1)]
    cache = DynamicCache(config=model.config)
    batch = tiny.inputs(prefix)
    tiny.logits(model, batch, past_key_values=cache, use_cache=True)
    for way in ([text(4, 2), image(4, 8, 1), text(2, 3)], [text(5, 4)], [video(), text(2, 5)]):
        chat = Chat(model, [[]], cache=copy.deepcopy(cache))
        chat.ids, chat.mask, chat.rows = batch["input_ids"], batch["attention_mask"], [prefix]
        chat.turn([way])
        chat.assert_greedy()


def test_all_images_of_a_continued_chat_are_refused(model):
    """The stock model fails with mismatched features; here the message says what to pass."""
    chat = Chat(model, [[]])
    chat.turn([TURNS["an image each"][0]])
    row = [*chat.rows[0], *TURNS["an image each"][1]]
    with pytest.raises(ValueError, match="describes 12 image tokens, but this pass has 8.*new images"):
        generate(model, tiny.inputs(row), past_key_values=chat.cache)


@pytest.mark.parametrize("old", [False, True], ids=["new pixels", "old pixels, too"])
def test_pixels_of_another_pass_are_refused_by_forward(model, old):
    """In a turn of text, and in one with a new image."""
    first, second = TURNS["an image each"]
    cache = DynamicCache(config=model.config)
    tiny.logits(model, tiny.inputs(first), past_key_values=cache, use_cache=True)
    batch = tiny.inputs(second if old else [text(3)])
    del batch["attention_mask"]
    pixels = tiny.inputs([*first, *second] if old else first)
    batch |= {name: pixels[name] for name in ("pixel_values", "image_grid_thw")}
    with pytest.raises(ValueError, match="but this pass has .*new images"):
        tiny.logits(model, batch, past_key_values=cache, use_cache=True)


def test_new_tokens_with_a_mask_of_their_own_are_refused(model):
    chat = Chat(model, [[]])
    chat.turn([TURNS["an image each"][0]])
    with pytest.raises(ValueError, match="attention_mask` of all"):
        generate(model, tiny.inputs([text(5)]), past_key_values=chat.cache)
    for turn in ([text(5)], TURNS["an image each"][1]):
        with pytest.raises(ValueError, match="Pass the mask of all of them"):
            tiny.logits(model, tiny.inputs(turn), past_key_values=copy.deepcopy(chat.cache), use_cache=True)


def test_grids_without_pixels_are_refused(model):
    batch = tiny.inputs(*BATCHES["one image"])
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="came without `pixel_values`"):
        tiny.logits(model, batch)


@pytest.mark.parametrize("as_embeddings", [False, True])
def test_grids_of_remembered_images_with_new_text(model, as_embeddings):
    first, second = TURNS["an image, then text"][:2]
    whole, turn = tiny.inputs([*first, *second]), tiny.inputs(second)
    cache = DynamicCache(config=model.config)
    tiny.logits(model, tiny.inputs(first), past_key_values=cache, use_cache=True)
    batch = {"input_ids": turn["input_ids"], **{name: whole[name] for name in ("attention_mask", "image_grid_thw")}}
    if as_embeddings:
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    logits = tiny.logits(model, batch, past_key_values=cache, use_cache=True)
    expected = tiny.logits(model, whole)[:, -logits.shape[1] :]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("types", ["none", "zero", "too short", "of all"])
def test_images_are_found_by_their_tokens(model, types):
    """Whatever `mm_token_type_ids` are, from which the stock model takes rotary positions."""
    first, second = TURNS["an image each"]
    whole, turn = tiny.inputs([*first, *second]), tiny.inputs(second)
    cache = DynamicCache(config=model.config)
    tiny.logits(model, tiny.inputs(first), past_key_values=cache, use_cache=True)
    batch = {**turn, "attention_mask": whole["attention_mask"], "mm_token_type_ids": whole["mm_token_type_ids"]}
    if types == "none":
        del batch["mm_token_type_ids"]
    elif types == "zero":
        batch["mm_token_type_ids"] = torch.zeros_like(turn["input_ids"])
    elif types == "too short":
        batch["mm_token_type_ids"] = turn["mm_token_type_ids"][:, 3:]
    logits = tiny.logits(model, batch, past_key_values=copy.deepcopy(cache), use_cache=True)
    expected = tiny.logits(model, whole)[:, -logits.shape[1] :]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    for ids in (turn["input_ids"], whole["input_ids"]):
        tokens = generate(model, {**batch, "input_ids": ids}, past_key_values=copy.deepcopy(cache)).sequences
        answer = tokens[0, ids.shape[1] :].tolist()
        assert_greedy(plain_logits(model, [*first, *second], answer), answer)


@pytest.mark.parametrize(
    "mode",
    [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["beams", "all beams", "sampling"],
)
def test_a_prefix_repeated_for_several_sequences(model, mode):
    prefix, rest = [text(3), image(), text(4, 1)], [text(4, 2)]
    cache = DynamicCache(config=model.config)
    tiny.logits(model, tiny.inputs(prefix), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(3)
    batch = tiny.inputs([*prefix, *rest])
    text_only = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.manual_seed(0)
    tokens = generate(model, text_only, past_key_values=cache, **mode).sequences
    torch.manual_seed(0)
    assert tokens.tolist() == generate(model, batch, **mode, use_cache=False).sequences.tolist()


def test_a_mask_as_long_as_a_static_cache(model):
    prefix, rest = [text(3), image(), text(4, 1)], [text(4, 2)]
    cache = StaticCache(config=model.config, max_cache_len=40)
    tiny.logits(model, tiny.inputs(prefix), past_key_values=cache, use_cache=True)
    whole = tiny.inputs([*prefix, *rest])
    mask = torch.nn.functional.pad(whole["attention_mask"], (0, 40 - whole["attention_mask"].shape[1]))
    positions = model.model.compute_3d_position_ids(
        tiny.inputs(rest)["input_ids"], None, attention_mask=mask, past_key_values=cache
    )
    named = {name: value for name, value in whole.items() if not name.startswith("pixel")}
    assert torch.equal(positions, model.model.get_rope_index(**named)[0][:, :, -4:])


# ---------------------------------------------------------------------------------------------- no state

CONVERSATIONS = [
    [[TURNS["an image each"][0]], [TURNS["an image each"][1]], [[text(3, 5)]]],
    [[[image(8, 8, 7), text(3, 5)]], [[text(4, 6)]], [[video(2, 4, 4, 8), text(2, 7)]]],
    [[[text(5, 3), image(12, 4, 9)], [text(6)]], [[text(4, 6)], [image(seed=4), text(2)]], [[text(2, 7)], [text(1)]]],
]


def test_conversations_in_turn(model):
    """With different batch sizes, and calls without images or cache in between."""
    chats = [Chat(model, turns[0]) for turns in CONVERSATIONS]
    for turn in range(3):
        for chat, turns in zip(chats, CONVERSATIONS, strict=True):
            chat.turn(turns[turn])
            generate(model, tiny.inputs(*BATCHES["text only"]))
            generate(model, tiny.inputs(*BATCHES["mixed rows"]), use_cache=False)
    for chat in chats:
        chat.assert_greedy()


def test_conversations_in_threads(model):
    chats = [Chat(model, turns[0]) for turns in CONVERSATIONS]
    together = threading.Barrier(len(chats))
    failures = []

    def talk(chat, turns):
        try:
            for rows in turns:
                together.wait(timeout=60)
                chat.turn(rows)
        except Exception as error:
            together.abort()
            failures.append(error)

    threads = [threading.Thread(target=talk, args=pair) for pair in zip(chats, CONVERSATIONS, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for chat in chats:
        chat.assert_greedy()


def test_prompt_lookup_never_proposes_placeholders(model):
    """The prompt ends with what precedes the image, so that the candidates begin with its placeholders."""
    batch = tiny.inputs([text(2), image(), text(3, 1), text(2), [tiny.VISION_START]])
    proposed = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: proposed.append(kwargs["input_ids"]), with_kwargs=True
    )
    mode = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": tiny.PAD_TOKEN}
    tokens = model.generate(**batch, **mode, prompt_lookup_num_tokens=4)
    hook.remove()
    assert tokens.tolist() == model.generate(**batch, **mode).tolist()
    later = torch.cat([ids.flatten() for ids in proposed[1:]])
    assert len(proposed) > 1 and not (later == tiny.IMAGE_TOKEN).any()


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="no way to pass images"):
        model.generate_batch([text(3)])
    with pytest.raises(ValueError, match="no way to pass images"):
        model.init_continuous_batching()


def test_export_of_a_decode_step(model):
    class Step(torch.nn.Module):
        def __init__(self, cache):
            super().__init__()
            self.model, self.cache = model, cache

        def forward(self, input_ids, position_ids):
            inputs = {"input_ids": input_ids, "position_ids": position_ids, "past_key_values": self.cache}
            return self.model(**inputs, use_cache=True).logits

    cache = DynamicCache(config=model.config)
    tiny.logits(model, tiny.inputs([text(3), image(), text(4, 1)]), past_key_values=cache, use_cache=True)
    inputs = (torch.tensor([text(1)]), torch.full((3, 1, 1), 12))
    with torch.no_grad():
        exported = torch.export.export(Step(copy.deepcopy(cache)), inputs, strict=True).module()
        torch.testing.assert_close(exported(*inputs), Step(cache)(*inputs))
