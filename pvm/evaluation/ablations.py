"""
What is taken from a model while it answers, to see what its answers rest on.

All of it goes through the model's own seams: the switch of a call, the pixels, what stands in the cache, the mask.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO

import torch
from PIL import Image
from transformers import DynamicCache, PreTrainedModel

from modeling_qwen3vl_pvm import read_visual_memory, write_visual_memory
from pvm.data.encoding import read_image
from pvm.data.forms import Conversation
from pvm.data.sources import Conversations
from pvm.errors import UserError


# What a report says of each.
KNOCK_OUTS = {
    "branch_off": "the branches are off",
    "branch_alone": "one branch is on and the others are off; for each branch",
    "blank_image": "every image is uniformly gray",
    "another_image": "the images are those of another row",
    "another_memory": "self-attention sees the row's own images, and the branches those of another row",
    "hidden_image": "self-attention of the text after the last image sees none; the branches do",
    "blind": "neither self-attention of the text after the last image nor the branches see any",
}
# Those in which the prompt is read in two parts, the second after the last image.
SPLIT = ("another_memory", "hidden_image", "blind")
NEEDS_MEMORY = ("another_memory", "hidden_image")
NEEDS_BRANCHES = ("branch_off", "branch_alone", *NEEDS_MEMORY)


@dataclass
class KnockOut:
    """
    kind (`str`): a key of `KNOCK_OUTS`, or "nothing".
    layer (`int`, *optional*): of the branch that is left alone.
    """

    kind: str = "nothing"
    layer: int | None = None

    @property
    def name(self) -> str:
        """What is appended to a model's name."""
        layer = "" if self.layer is None else f" layer {self.layer}"
        return "" if self.kind == "nothing" else f" - {self.kind.replace('_', ' ')}{layer}"

    @property
    def use_pvm(self) -> bool | list[int]:
        """The switch of a call."""
        return [self.layer] if self.kind == "branch_alone" else self.kind not in ("branch_off", "blind")


def knock_outs(kinds: Sequence[str], layers: Sequence[int], reads_images: bool) -> list[KnockOut]:
    """
    The intact model first, then what can be taken from it; `branch_alone` once for each layer with a branch.

    Args:
        layers (`Sequence[int]`): decoder layers with a branch.
        reads_images (`bool`): whether the branches have a memory to take.
    """
    chosen = [KnockOut()]
    for kind in kinds:
        if kind == "branch_alone":
            chosen += [KnockOut(kind, layer) for layer in layers]
        elif (layers or kind not in NEEDS_BRANCHES) and (reads_images or kind not in NEEDS_MEMORY):
            chosen.append(KnockOut(kind))
    return chosen


def refuse_videos(conversations: Conversations) -> None:
    """
    Raises:
        UserError: naming the row, if one has a video: what knock-outs do to images, they do not do to videos.
    """
    for index in range(len(conversations)):
        if conversations[index].videos:
            raise UserError(f"{conversations.where(index)}: knock-outs of images take no videos.")


class ChangedImages:
    """
    Conversations whose images are gray, or those of another row: the next one that has as many, but others, scaled to
    the same sizes.

    Args:
        conversations (`Conversations`): the rows.
        blank (`bool`): gray images.

    Raises:
        UserError: if a row has a video, or no other row has as many images and others.
    """

    def __init__(self, conversations: Conversations, blank: bool):
        refuse_videos(conversations)
        self.conversations, self.blank = conversations, blank
        pictures = [
            [_fingerprint(image) for image in conversations[index].images] for index in range(len(conversations))
        ]
        rows: dict[int, list[int]] = {}
        for index, shown in enumerate(pictures):
            rows.setdefault(len(shown), []).append(index)
        self.others = list(range(len(conversations)))
        for count, same in rows.items():
            for k, index in enumerate(same if count and not blank else []):
                following = (same[(k + step) % len(same)] for step in range(1, len(same)))
                other = next((row for row in following if not set(pictures[row]) & set(pictures[index])), None)
                if other is None:
                    raise UserError(
                        f"{conversations.where(index)}: no other row has {count} images, all of them others, to show "
                        "instead."
                    )
                self.others[index] = other

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Conversation:
        conversation = self.conversations[index]
        sizes = [read_image(image).size for image in conversation.images]
        if self.blank:
            pictures = [Image.new("RGB", size, (128, 128, 128)) for size in sizes]
        else:
            others = self.conversations[self.others[index]].images
            pictures = [read_image(other).resize(size) for other, size in zip(others, sizes)]
        return replace(conversation, images=[_as_file(picture) for picture in pictures])

    def where(self, index: int) -> str:
        return self.conversations.where(index)


def _fingerprint(image: dict) -> str:
    """Of what is seen: a picture may lie under several names, or in several rows."""
    picture = read_image(image)
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def _as_file(picture: Image.Image) -> dict:
    content = BytesIO()
    picture.save(content, "PNG")
    return {"path": None, "bytes": content.getvalue()}


def generate_split(
    model: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    other: dict[str, torch.Tensor] | None,
    distance: int,
    knock_out: KnockOut,
    max_new_tokens: int,
    ends: torch.LongTensor,
) -> torch.LongTensor:
    """
    Greedy answers to prompts that are read in two parts, with something taken away between them.

    Args:
        batch: left-padded inputs `[batch, sequence]` whose last visual token is `distance + 1` tokens before the end.
        other: the same prompts with the images of other rows, for `another_memory`.
        distance (`int`): tokens after the last visual token.
        ends (`torch.LongTensor` `[n]`): tokens that end an answer.

    Returns:
        `torch.LongTensor` `[batch, at most max_new_tokens]`; after its end a row goes on with that token.
    """
    cache, positions = read_images(model, batch, distance)
    if knock_out.kind == "another_memory":
        other_cache, _ = read_images(model, other, distance)
        for layer_idx in model.config.text_config.pvm_layers:
            write_visual_memory(cache, layer_idx, read_visual_memory(other_cache, layer_idx))
    mask = batch["attention_mask"].clone()
    if knock_out.kind in ("hidden_image", "blind"):
        mask[batch["mm_token_type_ids"] > 0] = 0

    # The stock model knows no switch.
    switch = {} if knock_out.use_pvm is True else {"use_pvm": knock_out.use_pvm}
    tokens, position_ids = batch["input_ids"][:, -distance:], positions[..., -distance:]
    answers: list[torch.Tensor] = []
    while len(answers) < max_new_tokens:
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=position_ids, past_key_values=cache, **switch,
            logits_to_keep=1,
        ).logits  # fmt: skip
        tokens = logits[:, -1:].argmax(dim=-1)
        if answers:
            ended = torch.isin(answers[-1], ends.to(tokens.device))
            tokens = torch.where(ended, answers[-1], tokens)
        answers.append(tokens)
        if torch.isin(tokens, ends.to(tokens.device)).all():
            break
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        position_ids = position_ids[..., -1:] + 1
    return torch.cat(answers, dim=1)


def read_images(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], distance: int
) -> tuple[DynamicCache, torch.LongTensor]:
    """
    The cache after all but the last `distance` tokens of the prompts, their images and videos among them, and the
    rotary positions `[3, batch, sequence]` of all.
    """
    images = {key: batch[key] for key in ("pixel_values", "pixel_values_videos") if key in batch}
    grids = {key: batch.get(key) for key in ("image_grid_thw", "video_grid_thw")}
    positions, _ = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], *grids.values(), batch["attention_mask"]
    )
    cache = DynamicCache(config=model.config)
    model(
        input_ids=batch["input_ids"][:, :-distance],
        attention_mask=batch["attention_mask"][:, :-distance],
        mm_token_type_ids=batch["mm_token_type_ids"][:, :-distance],
        **images,
        **{key: grid for key, grid in grids.items() if grid is not None},
        position_ids=positions[..., :-distance],
        past_key_values=cache,
        logits_to_keep=1,
    )
    return cache, positions
