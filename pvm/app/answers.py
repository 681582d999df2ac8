"""Answers token by token, each with what the model saw of the image and what it would have written otherwise."""

import base64
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from threading import Lock
from typing import Any

import torch
from PIL import Image
from tokenizers.decoders import DecodeStream
from transformers import DynamicCache, PreTrainedModel

from cache_qwen3vl_pvm import get_visual_memory, set_visual_memory
from eviction_qwen3vl_pvm import evict_images
from modeling_qwen3vl_pvm import pvm_blocks
from pvm.checkpoints.loading import Checkpoint
from pvm.data.encoding import ConversationCollator, ConversationEncoder
from pvm.data.forms import Conversation
from pvm.data.media import media_file, read_image
from pvm.errors import UserError, user_errors
from pvm.evaluation.ablations import process_images
from pvm.evaluation.answering import bytes_per_token, cache_bytes
from pvm.evaluation.diagnostics import CHUNK, forward_with_attention
from pvm.evaluation.questions import image_distance


MAX_PROMPT = 8192  # tokens
MAX_ANSWER = 512
LARGEST_SIDE = 1024  # of an image, in pixels
LARGEST_GATE_SCALE = 5
CANDIDATES = 5


@dataclass(frozen=True)
class Question:
    """
    A question to one model.

    model (`int`): its number.
    text (`str`): the question.
    image (`str`): as a `data:` URI.
    use_pvm (`bool`): whether the branches are on.
    image_kv_cache (`str`): "keep"; "evict" or "skip" take the image out of the KV cache, see docs/generation.md.
    memory (`str`, *optional*): another image, which the branches see in place of `image`.
    gate_scale (`float`): factor of all gates.

    Raises:
        UserError: if a value is not of its type, or out of range.
    """

    model: int
    text: str
    image: str
    use_pvm: bool = True
    image_kv_cache: str = "keep"
    memory: str | None = None
    gate_scale: float = 1.0

    def __post_init__(self):
        types = {"model": int, "text": str, "image": str, "use_pvm": bool, "memory": str | None}
        for name, expected in types.items():
            if not isinstance(getattr(self, name), expected):
                raise UserError(f"`{name}` is of the wrong type.")
        if not self.text.strip():
            raise UserError("Write a question.")
        if self.image_kv_cache not in ("keep", "evict", "skip"):
            raise UserError("`image_kv_cache` is neither keep nor evict nor skip.")
        if not (isinstance(self.gate_scale, int | float) and 0 <= self.gate_scale <= LARGEST_GATE_SCALE):
            raise UserError(f"The factor of the gates must be a number from 0 to {LARGEST_GATE_SCALE}.")

    @classmethod
    @user_errors("This is not a question")
    def parse(cls, content: bytes) -> "Question":
        """A question in JSON."""
        return cls(**json.loads(content))


def read_upload(content: bytes, name: str) -> Image.Image:
    """
    Args:
        name (`str`): of the file, for errors.

    Returns:
        `Image.Image`: RGB, upright, with sides of at most `LARGEST_SIDE` pixels.

    Raises:
        UserError: if it is not an image, or damaged, or larger than Pillow considers safe.
    """
    image = read_image({"path": name, "bytes": content})
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return image


def data_uri(image: Image.Image) -> str:
    """The image as PNG, in a `data:` URI."""
    content = BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


class Reader:
    """
    A conversation that is read by a model in one way: with branches or without. All state of it is in here.

    Args:
        cache (`DynamicCache`): holds the image.
        positions (`torch.LongTensor` `[3, 1, prompt]`): rotary positions of the prompt.
        visual (`torch.BoolTensor` `[prompt]`): where visual tokens are.
        gate_scale (`float`): factor of all gates.
        model_kwargs: more arguments of the forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: DynamicCache,
        positions: torch.LongTensor,
        visual: torch.BoolTensor,
        gate_scale: float,
        **model_kwargs: Any,
    ):
        self.model, self.cache, self.positions, self.visual = model, cache, positions, visual
        self.gate_scale, self.model_kwargs = gate_scale, model_kwargs

    def read(self, tokens: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
        """
        Read the next tokens `[1, new]`.

        Returns:
            Probabilities of what follows, `[vocabulary]`; attention to the image as [`forward_with_attention`] returns
            it.
        """
        past = self.cache.get_seq_length()
        length = past + tokens.shape[1]
        while self.positions.shape[-1] < length:
            self.positions = torch.cat([self.positions, self.positions[..., -1:] + 1], dim=-1)
        seen, branches = [], []
        with scaled_gates(self.model, self.gate_scale):
            for first in range(past, length, CHUNK):
                end = min(first + CHUNK, length)
                output, to_image, of_branches = forward_with_attention(
                    self.model,
                    self.visual,
                    self.cache,
                    input_ids=tokens[:, first - past : end - past],
                    attention_mask=torch.ones_like(self.positions[0, :, :end]),
                    position_ids=self.positions[..., first:end],
                    **self.model_kwargs,
                )
                seen.append(to_image)
                branches.append(of_branches)
        logits = self.model.lm_head(output.last_hidden_state[0, -1])
        return (
            logits.float().softmax(dim=-1).cpu(),
            torch.cat(seen),
            {layer: torch.cat([chunk[layer] for chunk in branches]) for layer in branches[0]},
        )


@contextmanager
def scaled_gates(model: PreTrainedModel, factor: float) -> Iterator[None]:
    """Multiply the gates of all branches; for one pass, because conversations share the model."""
    gates = [block.gate_alpha for block in pvm_blocks(model).values()]
    values = [gate.clone() for gate in gates]
    for gate in gates:
        gate.mul_(factor)
    try:
        yield
    finally:
        for gate, value in zip(gates, values):
            gate.copy_(value)


@torch.inference_mode()
def write_answer(checkpoint: Checkpoint, question: Question, lock: Lock) -> Iterator[dict[str, Any]]:
    """
    Greedy answer of a model with eager attention, of at most `MAX_ANSWER` tokens.

    Args:
        lock (`Lock`): of the model. Conversations at the same time take turns, a token each.

    Yields:
        `dict`: first about the prompt: `image` and `memory`, as `data:` URIs, what self-attention and the branches
        saw; `grid`, `[rows, columns]` of visual tokens; `visual_tokens`; `shares` and `branch_shares` of the text
        after the image; `branches`, their layers.

        Then of each token: `text`; `share`, that of self-attention on the image, a mean over heads and layers;
        `self_attention` `[visual]`, its distribution over the image (empty if the cache does not hold it), and
        `branches` `{layer: [visual]}`; the most probable tokens `[text, probability]`, `candidates` and, if there are
        branches, `candidates_otherwise`, for the same text with branches off if they are on, and on if they are off;
        `cache_bytes` and `bytes_saved`.

        At last `end`: "end" or "length".

    Raises:
        UserError: if the model cannot answer the question.
    """
    model, tokenizer = checkpoint.plain_model, checkpoint.processor.tokenizer
    layers = pvm_blocks(model)
    image = _image(question.image)
    memory = None if question.memory is None else _image(question.memory).resize(image.size)
    batch = _encode(checkpoint, question.text, image)
    distance = image_distance(batch["mm_token_type_ids"][0])
    visual = batch["mm_token_type_ids"][0] > 0
    skip = {"image_kv_cache": "skip"} if question.image_kv_cache == "skip" and layers else {}
    with lock:
        cache, positions = process_images(model, batch, distance, **skip)
        if memory is not None and layers:
            other, _ = process_images(model, _encode(checkpoint, question.text, memory), distance, **skip)
            set_visual_memory(cache, get_visual_memory(other))
        uses = [question.use_pvm, not question.use_pvm] if layers else []
        readers = [
            Reader(model, copy.deepcopy(cache), positions, visual, question.gate_scale, use_pvm=use_pvm)
            for use_pvm in uses
        ] or [Reader(model, cache, positions, visual, 1.0)]
        read = [reader.read(batch["input_ids"][:, -distance:]) for reader in readers]
        if question.image_kv_cache == "evict" and layers:
            for reader in readers:
                evict_images(reader.cache)

    (probabilities, to_image, branches), *_ = read
    if not question.use_pvm:
        branches = {}
    merge = model.config.vision_config.spatial_merge_size
    yield {
        "image": data_uri(image),
        "memory": data_uri(memory or image),
        "grid": (batch["image_grid_thw"][0, 1:] // merge).tolist(),
        "visual_tokens": int(visual.sum()),
        "shares": _rounded(_share(to_image)),
        "branch_shares": _rounded(torch.stack([w.sum(dim=-1) for w in branches.values()]).mean(0)) if branches else [],
        "branches": list(branches),
    }

    ends, stream = model.generation_config.eos_token_id, DecodeStream(skip_special_tokens=True)
    for _ in range(MAX_ANSWER):
        token = int(probabilities.argmax())
        if token in ends:
            yield {"end": "end"}
            return
        (probabilities, to_image, branches), *otherwise = read
        cache = readers[0].cache
        per_token, _ = bytes_per_token(cache)
        number, visual_tokens = torch.tensor([cache.get_seq_length()]), visual.sum()[None].cpu()
        in_cache = not layers or get_visual_memory(cache).in_kv_cache
        attended = to_image[-1].mean(dim=0)
        yield {
            "text": stream.step(tokenizer.backend_tokenizer, token) or "",
            "share": _rounded(_share(to_image))[-1],
            "self_attention": _rounded(attended / attended.sum()),
            "branches": {k: _rounded(weights[-1]) for k, weights in branches.items() if question.use_pvm},
            "candidates": _candidates(probabilities, tokenizer),
            "candidates_otherwise": _candidates(otherwise[0][0], tokenizer) if otherwise else None,
            "cache_bytes": cache_bytes(cache, number, visual_tokens)[0],
            "bytes_saved": 0 if in_cache else int(visual_tokens) * per_token,
        }
        with lock:
            read = [reader.read(torch.tensor([[token]], device=model.device)) for reader in readers]
        probabilities = read[0][0]
    yield {"end": "length"}


def _image(uri: str) -> Image.Image:
    if not uri.startswith("data:"):  # not a file of this machine
        raise UserError("Choose an image.")
    return read_upload(media_file(uri, "image")["bytes"], "of the question")


def _encode(checkpoint: Checkpoint, text: str, image: Image.Image) -> dict[str, torch.Tensor]:
    """A prompt as a batch of one row on the model's device."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    file = media_file(data_uri(image), "image")
    answer = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
    conversation = Conversation([{"role": "user", "content": content}, answer], [file])
    encoder = ConversationEncoder(checkpoint.processor, prompt_only=True)
    example = encoder(conversation)
    if (length := len(example["input_ids"])) > MAX_PROMPT:
        raise UserError(f"Question and image have {length} tokens, and this page answers up to {MAX_PROMPT}.")
    batch = ConversationCollator(checkpoint.processor.tokenizer.pad_token_id)([example])
    return {key: value.to(checkpoint.plain_model.device) for key, value in batch.items()}


def _share(to_image: torch.Tensor) -> torch.Tensor:
    """`[position]`, from the weights `[position, layer, visual]`."""
    return to_image.sum(dim=-1).mean(dim=-1)


def _candidates(probabilities: torch.Tensor, tokenizer) -> list[tuple[str, float]]:
    best = probabilities.topk(CANDIDATES)
    return [(tokenizer.decode([token]), p) for token, p in zip(best.indices.tolist(), _rounded(best.values))]


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
