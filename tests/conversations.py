"""Conversations on a cache, and the same at once, for tests."""

import torch
from transformers import DynamicCache

import tiny


NEW_TOKENS = 10


def generate(model, batch, **kwargs):
    """The new tokens: greedy by default, always as many as asked for, without placeholders of images."""
    defaults = {
        "do_sample": False,
        "max_new_tokens": NEW_TOKENS,
        "pad_token_id": tiny.PAD_TOKEN,
        "suppress_tokens": [tiny.IMAGE_TOKEN, tiny.VIDEO_TOKEN],
    }
    kwargs = {**defaults, **kwargs}
    return model.generate(**batch, **kwargs)[:, batch["input_ids"].shape[1] :]


def positions(model, batch) -> torch.LongTensor:
    """M-RoPE positions `[3, batch, sequence]` of whole rows, from the stock method."""
    named = {name: value for name, value in batch.items() if not name.startswith("pixel")}
    return model.model.get_rope_index(**named)[0]


class Conversation:
    """
    A batch forwarded turn by turn on one cache. Each of `turns` holds the parts of every row; a turn is padded on the
    left, so a row may have padding in its middle, as in batched chat. Positions are passed if `explicit`; else the
    model computes them from the cache.
    """

    def __init__(
        self, model, *turns: list[list], cache=None, explicit: bool = False, image_kv_cache: list[str] | str = "keep"
    ):
        self.model, self.turns = model, turns
        self.image_kv_cache = [image_kv_cache] * len(turns) if isinstance(image_kv_cache, str) else image_kv_cache
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        self.whole = {}
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            self.whole[name] = torch.cat([tiny.inputs(*rows)[name] for rows in turns], dim=1)
        # The model consumes images in the order of the batch: row by row.
        by_row = [part for row in zip(*turns) for parts in row for part in parts]
        for name, value in tiny.inputs(by_row).items():
            self.whole.setdefault(name, value)
        self.position_ids = positions(model, self.whole)
        self.explicit = explicit
        self.done = self.length = 0

    def next_turn(self, rows: list[int] | None = None) -> torch.Tensor:
        """Logits of the next turn on the cache, which now has the given `rows` of the first turn."""
        rows = list(range(len(self.turns[0]))) if rows is None else rows
        turn = tiny.inputs(*(self.turns[self.done][row] for row in rows))
        start, end = self.length, self.length + turn["input_ids"].shape[1]
        self.done, self.length = self.done + 1, end
        return tiny.logits(
            self.model,
            {**turn, "attention_mask": self.whole["attention_mask"][rows, :end]},
            position_ids=self.position_ids[:, rows, start:end] if self.explicit else None,
            past_key_values=self.cache,
            use_cache=True,
            image_kv_cache=self.image_kv_cache[self.done - 1],
        )

    def at_once(self) -> torch.Tensor:
        """Logits of all turns, without a cache; what the cache would not hold is masked."""
        with tiny.decoder_mask(self.model, self.mask()):
            return tiny.logits(self.model, self.whole, position_ids=self.position_ids)

    def mask(self) -> torch.BoolTensor:
        """`[batch, query, key]`: the columns that a query sees when all turns are computed at once."""
        turn = torch.cat(
            [torch.full((tiny.inputs(*rows)["input_ids"].shape[1],), n) for n, rows in enumerate(self.turns)]
        )
        stays = torch.tensor([mode != "skip" for mode in self.image_kv_cache])[turn]  # to the end of its turn
        evictions = torch.tensor([0] + [mode == "evict" for mode in self.image_kv_cache]).cumsum(0)
        stays = stays[None] & (evictions[turn][:, None] <= evictions[turn][None])
        visual = self.whole["mm_token_type_ids"] > 0
        causal = torch.ones(len(turn), len(turn), dtype=torch.bool).tril()
        seen = ~visual[:, None] | stays | (visual[..., None] & (turn[:, None] == turn))
        return causal & seen & self.whole["attention_mask"].bool()[:, None]


def assert_same_logits(actual: torch.Tensor, expected: torch.Tensor, attention_mask: torch.Tensor | None = None):
    real = torch.ones(expected.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    torch.testing.assert_close(actual[real], expected[real], atol=2e-5, rtol=1e-5)
