"""Answers token by token, each with what the model saw of the image and what it would have written otherwise."""

import base64
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from threading import Lock
from typing import Any, NamedTuple

import torch
from PIL import Image
from tokenizers.decoders import DecodeStream
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

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
        UnicodeEncodeError: if the text is not valid Unicode.
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
        self.text.encode()  # not of halves of surrogate pairs, which JSON may hold
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


class Prediction(NamedTuple):
    """
    What a model makes of the tokens that it reads.

    probabilities (`torch.Tensor` `[vocabulary]`): of the next token.
    self_attention (`torch.Tensor` `[position, layer, visual]`), branches (`dict[int, torch.Tensor]`, by layer
        `[position, visual]`): attention to the image, see [`forward_with_attention`]; of branches that are on.
    """

    probabilities: torch.Tensor
    self_attention: torch.Tensor
    branches: dict[int, torch.Tensor]

    @property
    def shares(self) -> list[float]:
        """By position, that of self-attention on the image, a mean over layers."""
        return _rounded(self.self_attention.sum(dim=-1).mean(dim=-1))

    @property
    def branch_shares(self) -> list[float]:
        """Likewise of the branches; empty without them."""
        return _rounded(torch.stack(list(self.branches.values())).sum(dim=-1).mean(dim=0)) if self.branches else []


@dataclass
class Reader:
    """
    A conversation as a model reads it in one way: with branches or without. It has all of the conversation's state.

    cache (`DynamicCache`): holds the image.
    positions (`torch.LongTensor` `[3, 1, sequence]`): rotary positions of the prompt, and of what was read after it.
    visual (`torch.BoolTensor` `[prompt]`): where visual tokens are.
    use_pvm (`bool`, *optional*): of a model with branches, whether they are on.
    gate_scale (`float`): factor of all gates.
    """

    model: PreTrainedModel
    cache: DynamicCache
    positions: torch.LongTensor
    visual: torch.BoolTensor
    use_pvm: bool | None = None
    gate_scale: float = 1.0

    def read(self, tokens: torch.LongTensor) -> Prediction:
        """Read the next tokens `[1, new]`."""
        past = self.cache.get_seq_length()
        length = past + tokens.shape[1]
        if length > self.positions.shape[-1]:  # one more than the prompt and the answer so far
            self.positions = torch.cat([self.positions, self.positions[..., -1:] + 1], dim=-1)
        model_kwargs = {} if self.use_pvm is None else {"use_pvm": self.use_pvm}
        self_attention, branches = [], []
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
                    **model_kwargs,
                )
                self_attention.append(to_image)
                branches.append(of_branches if self.use_pvm else {})
        logits = self.model.lm_head(output.last_hidden_state[0, -1])
        return Prediction(
            logits.float().softmax(dim=-1).cpu(),
            torch.cat(self_attention),
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
        lock (`Lock`): of the model. Answers at the same time take turns, a token each.

    Yields:
        `dict`: first about the prompt: `image` and `memory`, as `data:` URIs, what self-attention and the branches
        saw; `grid`, `[rows, columns]` of visual tokens; `visual_tokens`; `shares` and `branch_shares` of the text
        after the image, see [`Prediction`].

        Then of each token: `text`; `share`, that of self-attention on the image; `self_attention` `[visual]`, its
        distribution over the image (empty if the cache does not hold it), and `branches` `{layer: [visual]}`; the most
        probable tokens `[text, probability]`, `candidates` and, if there are branches, `candidates_otherwise`, for the
        same text with branches off if they are on, and on if they are off; `cache_bytes` and `bytes_saved`.

        At last `end`: "end" or "length".

    Raises:
        UserError: if the model cannot answer the question.
    """
    model, tokenizer = checkpoint.plain_model, checkpoint.processor.tokenizer
    image = _image(question.image)
    memory = None if question.memory is None else _image(question.memory).resize(image.size)
    batch = _encode(checkpoint, question.text, image)
    other = None if memory is None else _encode(checkpoint, question.text, memory)
    visual, grid = batch["mm_token_type_ids"][0] > 0, batch["image_grid_thw"][0, 1:]
    with lock:
        readers, predictions = _read_prompt(model, batch, other, question)
    yield {
        "image": data_uri(image),
        "memory": data_uri(memory or image),
        "grid": (grid // model.config.vision_config.spatial_merge_size).tolist(),
        "visual_tokens": int(visual.sum()),
        "shares": predictions[0].shares,
        "branch_shares": predictions[0].branch_shares,
    }

    cache = readers[0].cache
    per_token, _ = bytes_per_token(cache)
    ends, stream = model.generation_config.eos_token_id, DecodeStream(skip_special_tokens=True)
    for _ in range(MAX_ANSWER):
        prediction, *otherwise = predictions
        token = int(prediction.probabilities.argmax())
        if token in ends:
            yield {"end": "end"}
            return
        number, visual_tokens = torch.tensor([cache.get_seq_length()]), visual.sum()[None].cpu()
        memory_of_branches = get_visual_memory(cache)
        in_cache = memory_of_branches is None or memory_of_branches.in_kv_cache
        attended = prediction.self_attention[-1].mean(dim=0)
        yield {
            "text": stream.step(tokenizer.backend_tokenizer, token) or "",
            "share": prediction.shares[-1],
            "self_attention": _rounded(attended / attended.sum()),
            "branches": {layer: _rounded(weights[-1]) for layer, weights in prediction.branches.items()},
            "candidates": _candidates(prediction, tokenizer),
            "candidates_otherwise": _candidates(otherwise[0], tokenizer) if otherwise else None,
            "cache_bytes": cache_bytes(cache, number, visual_tokens)[0],
            "bytes_saved": 0 if in_cache else int(visual_tokens) * per_token,
        }
        with lock:
            predictions = [reader.read(torch.tensor([[token]], device=model.device)) for reader in readers]
    yield {"end": "length"}


def _read_prompt(
    model: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    other: dict[str, torch.Tensor] | None,
    question: Question,
) -> tuple[list[Reader], list[Prediction]]:
    """
    Args:
        batch: the prompt.
        other: the same prompt with the image that branches are to see.

    Returns:
        A reader as the question asks for, and for a model with branches one in which they are off or on otherwise;
        what each predicts after the prompt.
    """
    types = batch["mm_token_type_ids"][0]
    distance, has_branches = image_distance(types), bool(pvm_blocks(model))
    skip = {"image_kv_cache": "skip"} if question.image_kv_cache == "skip" and has_branches else {}
    cache, positions = process_images(model, batch, distance, **skip)
    if other is not None and has_branches:
        set_visual_memory(cache, get_visual_memory(process_images(model, other, distance, **skip)[0]))
    readers = [
        Reader(model, copy.deepcopy(cache), positions, types > 0, use_pvm, question.gate_scale)
        for use_pvm in ([question.use_pvm, not question.use_pvm] if has_branches else [None])
    ]
    predictions = [reader.read(batch["input_ids"][:, -distance:]) for reader in readers]
    if question.image_kv_cache == "evict":
        for reader in readers:
            evict_images(reader.cache)
    return readers, predictions


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


def _candidates(prediction: Prediction, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, float]]:
    best = prediction.probabilities.topk(CANDIDATES)
    return [(tokenizer.decode([token]), p) for token, p in zip(best.indices.tolist(), _rounded(best.values))]


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
