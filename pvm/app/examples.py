"""Questions about boards of unseen digits, for models that know the words of that world."""

from typing import Any

import numpy as np

from pvm.app.answers import data_uri
from pvm.checkpoints.loading import Checkpoint, load_processor
from pvm.shipped import shipped
from pvm.worlds import conversations
from pvm.worlds.digits import Digits


def examples(checkpoints: list[Checkpoint]) -> list[dict[str, Any]]:
    """
    Returns:
        `list[dict]`: `title`, `image` (a `data:` URI), `text`, and `expected`, the right answer. Empty if a model has
        another vocabulary: it would not know what cells are.
    """
    words = load_processor(str(shipped("assets") / "digits-backbone")).tokenizer.get_vocab()
    if any(checkpoint.processor.tokenizer.get_vocab() != words for checkpoint in checkpoints):
        return []
    digits, rng = Digits.load("test"), np.random.default_rng(0)
    made = []
    for title, filler, cells in (
        ("One cell, 1,024 words later", 1024, [10]),
        ("One cell, 256 words later", 256, [6]),
        ("One cell, at once", 0, [13]),
        ("Read the board aloud", 0, range(16)),
    ):
        (board,), labels = digits.draw(rng)
        words = f"{conversations.filler(filler, rng)}\n" if filler else ""
        if len(cells) == 1:
            question, expected = conversations.cell_question(cells[0]), labels[cells[0]]
        else:
            question, expected = conversations.read_instruction(cells[0], cells[-1]), " ".join(labels)
        made.append({"title": title, "image": data_uri(board), "text": words + question, "expected": expected})
    return made
