"""
Ablations: what is removed from a model while it answers, to see what its answers depend on.

They change nothing of the model, only arguments of the forward pass, the images, the visual memory in the cache or
the attention mask.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache, PreTrainedModel

from cache_qwen3vl_pvm import get_visual_memory, set_visual_memory
from pvm.checkpoints.names import branch_block, branch_layers
from pvm.data.forms import Conversation
from pvm.data.media import read_image
from pvm.data.sources import Conversations
from pvm.errors import UserError
from variants_qwen3vl_pvm import BLOCKS


ABLATIONS = {
    "branch_off": "the branches are off",
    "branch_alone": "all branches but one are off; once for each branch",
    "blank_image": "every image is gray",
    "another_image": "the images are those of another row",
    "another_memory": "branches attend to the images of another row, self-attention to the row's own",
    "hidden_image": "text after the last image cannot attend to the images in self-attention; the branches can",
    "evict": "the images leave the KV cache after the prompt; the branches remember them",
    "skip": "the images never enter the decoder; only the branches see them",
    "blind": "text after the last image cannot attend to the images, neither in self-attention nor in the branches",
}
# What an ablation needs or changes. Videos are supported by those of branches only.
OF_BRANCHES = ("branch_off", "branch_alone", "evict", "skip")
OF_MEMORY = ("another_memory", "hidden_image", "evict", "skip")
CHANGED_IMAGES = ("blank_image", "another_image", "another_memory")
# The prompt is processed in two parts, the second of which is the text after the last image.
IN_TWO_PARTS = ("another_memory", "hidden_image", "blind")


@dataclass(frozen=True)
class Ablation:
    """
    kind (`str`): a key of `ABLATIONS`, or "none".
    layer (`int`, *optional*): with "branch_alone", the layer of the branch that stays on.
    """

    kind: str = "none"
    layer: int | None = None

    @property
    def suffix(self) -> str:
        """What is appended to the model's name."""
        layer = "" if self.layer is None else f" layer {self.layer}"
        return "" if self.kind == "none" else f" - {self.kind.replace('_', ' ')}{layer}"

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Arguments of the forward pass, if they are not the default. Only models with branches take them."""
        if self.kind in ("evict", "skip"):
            return {"image_kv_cache": self.kind}
        if self.kind == "branch_alone":
            return {"use_pvm": [self.layer]}
        return {"use_pvm": False} if self.kind in ("branch_off", "blind") else {}


INTACT = Ablation()


def ablations_of(path: str, kinds: Sequence[str]) -> list[Ablation]:
    """
    The ablations that apply to a checkpoint, after the intact model: those of branches need branches, those of memory
    branches that read the image.

    Args:
        path (`str`): folder or Hub name.
        kinds (`Sequence[str]`): the ablations to choose from.
    """
    block, layers = branch_block(path), branch_layers(path)
    ablations = [INTACT]
    for kind in kinds:
        if kind == "branch_alone":
            ablations += [Ablation(kind, layer) for layer in layers]
        elif not (
            (kind in OF_BRANCHES and block is None)
            or (kind in OF_MEMORY and (block is None or not BLOCKS[block].reads_image))
        ):
            ablations.append(Ablation(kind))
    return ablations


def check_ablations(kinds: Sequence[str], paths: Sequence[str]) -> None:
    """
    Raises:
        UserError: if an ablation applies to none of the checkpoints.
    """
    possible = {ablation.kind for path in paths for ablation in ablations_of(path, kinds)}
    for kind in kinds:
        if kind not in possible:
            branches = "PVM branches" if kind in OF_BRANCHES else "PVM branches that read the image"
            raise UserError(f"--ablations {kind}: none of the models has {branches}.")


def refuse_videos(conversations: Conversations) -> None:
    """
    Raises:
        UserError: naming the row, if one has a video.
    """
    for index in range(len(conversations)):
        if conversations[index].videos:
            raise UserError(f"{conversations.where(index)}: ablations of images do not support videos.")


class ChangedImages:
    """
    Conversations with gray images, or with those of another row: the next one with as many images, all of them
    different. They are scaled to the size of the row's own.

    Args:
        conversations (`Conversations`): the rows, without videos.
        blank (`bool`): gray images.

    Raises:
        UserError: if there is no such other row.
    """

    def __init__(self, conversations: Conversations, blank: bool):
        self.conversations, self.blank = conversations, blank
        self.others = list(range(len(conversations)))
        if blank:
            return
        # By content: rows may share an image, also under several file names.
        images = [{_fingerprint(image) for image in conversations[index].images} for index in self.others]
        rows: dict[int, list[int]] = {}
        for index in range(len(conversations)):
            if count := len(conversations[index].images):
                rows.setdefault(count, []).append(index)
        for count, same in rows.items():
            for k, index in enumerate(same):
                following = same[k + 1 :] + same[:k]
                other = next((row for row in following if images[row].isdisjoint(images[index])), None)
                if other is None:
                    raise UserError(
                        f"{conversations.where(index)}: no other row has {count} images that are all different."
                    )
                self.others[index] = other

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Conversation:
        conversation = self.conversations[index]
        sizes = [read_image(image).size for image in conversation.images]
        if self.blank:
            images = [Image.new("RGB", size, (128, 128, 128)) for size in sizes]
        else:
            others = self.conversations[self.others[index]].images
            images = [read_image(other).resize(size) for other, size in zip(others, sizes)]
        return replace(conversation, images=[_as_file(image) for image in images])

    def where(self, index: int) -> str:
        return self.conversations.where(index)


def _fingerprint(image: dict) -> str:
    picture = read_image(image)
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def _as_file(image: Image.Image) -> dict:
    content = BytesIO()
    image.save(content, "PNG")
    return {"path": None, "bytes": content.getvalue()}


def generate_in_two_parts(
    model: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    other: dict[str, torch.Tensor] | None,
    distance: int,
    ablation: Ablation,
    max_new_tokens: int,
    ends: torch.LongTensor,
) -> torch.LongTensor:
    """
    Greedy answers to prompts of which images are processed intact and the text after them with an ablation.

    Args:
        batch: left-padded inputs `[batch, sequence]` whose last visual token is `distance + 1` tokens before the end.
        other: the same prompts with the images of other rows, for `another_memory`.
        distance (`int`): tokens after the last visual token.
        ends (`torch.LongTensor` `[n]`): tokens that end an answer.

    Returns:
        `torch.LongTensor` `[batch, at most max_new_tokens]`; an answer that ends early is filled up with its end
        token.
    """
    cache, positions = process_images(model, batch, distance)
    if ablation.kind == "another_memory":
        other_cache, _ = process_images(model, other, distance)
        set_visual_memory(cache, get_visual_memory(other_cache))
    mask = batch["attention_mask"].clone()
    if ablation.kind in ("hidden_image", "blind"):
        mask[batch["mm_token_type_ids"] > 0] = 0

    tokens, position_ids = batch["input_ids"][:, -distance:], positions[..., -distance:]
    ends = ends.to(tokens.device)
    answers: list[torch.Tensor] = []
    while len(answers) < max_new_tokens:
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=position_ids, past_key_values=cache, logits_to_keep=1,
            **ablation.model_kwargs,
        ).logits  # fmt: skip
        tokens = logits[:, -1:].argmax(dim=-1)
        if answers:
            tokens = torch.where(torch.isin(answers[-1], ends), answers[-1], tokens)
        answers.append(tokens)
        if torch.isin(tokens, ends).all():
            break
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        position_ids = position_ids[..., -1:] + 1
    return torch.cat(answers, dim=1)


def process_images(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], distance: int, **model_kwargs: Any
) -> tuple[DynamicCache, torch.LongTensor]:
    """
    The first part of prompts, all but the last `distance` tokens, with all images and videos. `model_kwargs` are more
    arguments of the forward pass.

    Returns:
        The cache, and the rotary positions `[3, batch, sequence]` of the whole prompts.
    """
    pixels = {key: batch[key] for key in ("pixel_values", "pixel_values_videos") if key in batch}
    grids = {key: batch.get(key) for key in ("image_grid_thw", "video_grid_thw")}
    positions, _ = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], *grids.values(), batch["attention_mask"]
    )
    cache = DynamicCache(config=model.config)
    model(
        input_ids=batch["input_ids"][:, :-distance],
        attention_mask=batch["attention_mask"][:, :-distance],
        mm_token_type_ids=batch["mm_token_type_ids"][:, :-distance],
        **pixels,
        **{key: grid for key, grid in grids.items() if grid is not None},
        position_ids=positions[..., :-distance],
        past_key_values=cache,
        logits_to_keep=1,
        **model_kwargs,
    )
    return cache, positions
