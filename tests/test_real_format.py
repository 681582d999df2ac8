"""Qwen3-VL as Qwen publishes it: tokenizer, chat template, image sizes, generation settings, names and shapes."""

import hashlib
import json
import logging
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    GenerationConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import qwen3vl_real
import tiny
import training
from benchmarks.common import ROPE, SHAPES
from benchmarks.training_memory import TOWERS
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration, pvm_blocks
from pvm.checkpoints.loading import load_checkpoint
from pvm.data.encoding import ConversationEncoder
from pvm.data.forms import to_conversation
from pvm.errors import UserError
from pvm.worlds.backbone import CHAT_TEMPLATE


IMAGE_TOKEN, VIDEO_TOKEN = 151655, 151656
# Of released checkpoints: tensors, and bytes in bfloat16 (`metadata.total_size` of model.safetensors.index.json).
RELEASED = {
    "2B": (625, 4_255_064_064),
    "4B": (713, 8_875_631_616),
    "8B": (750, 17_534_247_392),
    "32B": (1058, 66_714_780_128),
}
BRANCH_PARAMETERS = {"2B": 18_878_211, "4B": 22_728_963, "8B": 27_922_179, "32B": 37_359_363}


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """What Qwen's repository holds, but a model of tiny width and depth, with random weights."""
    folder = tmp_path_factory.mktemp("qwen3vl")
    qwen3vl_real.save(folder, "tiny")
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_pretrained(folder)).bfloat16()
    model.save_pretrained(folder, max_shard_size="5MB")
    qwen3vl_real.save_configs(folder, "tiny")  # as published, not as this transformers writes them
    return folder


@pytest.fixture(scope="module")
def processor(repository):
    return AutoProcessor.from_pretrained(repository)


@pytest.fixture(scope="module")
def thinking(repository):
    """
    A processor whose template treats reasoning like that of Qwen3-VL-Thinking: prompts open it, and that of earlier
    turns is removed. It is Qwen3.5's.
    """
    processor = AutoProcessor.from_pretrained(repository)
    processor.chat_template = (qwen3vl_real.CHAT_TEMPLATES / "qwen3_5_think.jinja").read_text()
    return processor


def turns(*texts: str, system: str | None = None) -> list[dict]:
    """Messages of user and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant") * len(texts)
    return first + [{"role": role, "content": text} for role, text in zip(roles, texts)]


def picture(width: int = 32, height: int = 32) -> dict:
    """An undecoded image."""
    file = BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def encode(processor, row: dict, **settings) -> tuple[str, str, dict[str, torch.Tensor]]:
    """A row as text (runs of visual tokens as one), the text of its labels, and the tensors."""
    example = ConversationEncoder(processor, **settings)(to_conversation(row))
    ids = example["input_ids"]
    repeated = torch.isin(ids[1:], torch.tensor([IMAGE_TOKEN, VIDEO_TOKEN])) & (ids[1:] == ids[:-1])
    text = processor.tokenizer.decode(ids[torch.cat([torch.tensor([True]), ~repeated])])
    labels = example.get("labels", ids[:0])
    return text, processor.tokenizer.decode(labels[labels != -100]), example


# The tokenizer


def test_tokenizer_and_template_are_those_that_qwen_publishes(repository):
    tokenizer = (repository / "tokenizer.json").read_bytes()
    assert hashlib.sha256(tokenizer).hexdigest() == "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
    template = json.loads((repository / "chat_template.json").read_text())["chat_template"].encode()
    assert hashlib.sha256(template).hexdigest() == "3636d0f0bd6bef02654cdffdc447b79cb2cef8ab02cc75267345946291a489e4"


TEXTS = [
    "It's 12345.67 metres, isn't it?",
    "世界 こんにちは हिन्दी اَلْعَرَبِيَّةُ",
    "caf\u00e9 cafe\u0301 \u212b",  # composed, decomposed, and a sign that NFC replaces
    "def f(x):\n    return x  \r\n\n\n\t\t\\boxed{7}",
    "🐈‍⬛ \x00 \u200b ",
    "<think>\na\n</think>\n\n<answer>b</answer> <|not_a_token|>",
]


@pytest.mark.parametrize("saved", [False, True], ids=["published", "saved with a checkpoint"])
def test_transformers_encodes_as_the_published_file_says(repository, processor, tmp_path, saved):
    expected = Tokenizer.from_file(str(repository / "tokenizer.json"))
    if saved:
        processor.save_pretrained(tmp_path)
        processor = AutoProcessor.from_pretrained(tmp_path)
    for text in TEXTS:
        assert processor.tokenizer(text)["input_ids"] == expected.encode(text).ids
    for token in qwen3vl_real.ADDED_TOKENS:
        assert processor.tokenizer(token["content"])["input_ids"] == [token["id"]]
    assert processor.image_processor.size["longest_edge"] == 16_777_216
    assert processor.video_processor.size["longest_edge"] == 25_165_824


# Messages and labels


CONVERSATION = turns("What is this?", "A cat.", "And now?\n", " A <b>dog</b>.\n", system="Be brief.")


@pytest.mark.parametrize(
    ("row", "train_on", "labels"),
    [
        ({"messages": CONVERSATION}, "all", "A cat.<|im_end|> A <b>dog</b>.\n<|im_end|>"),
        ({"messages": CONVERSATION}, "last", " A <b>dog</b>.\n<|im_end|>"),
        ({"prompt": CONVERSATION[:-1], "completion": CONVERSATION[-1:]}, "all", " A <b>dog</b>.\n<|im_end|>"),
    ],
)
def test_labels_are_the_answers_with_their_end(processor, row, train_on, labels):
    text, labelled, example = encode(processor, {"images": [picture()], **row}, train_on=train_on)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nAnd now?\n<|im_end|>\n"
        "<|im_start|>assistant\n A <b>dog</b>.\n<|im_end|>\n"
    )
    assert labelled == labels
    trained = example["labels"] != -100
    assert torch.equal(example["labels"][trained], example["input_ids"][trained])


def test_reasoning_in_the_instruct_format_is_part_of_the_answer(processor):
    first, second = "<think>\nFur.\n</think>\n\n<answer>A cat.</answer>", "<think>Barks.</think>A dog."
    text, labelled, _ = encode(processor, {"messages": turns("What?", first, "Now?", second)})
    assert labelled == f"{first}<|im_end|>{second}<|im_end|>" and first in text


def test_a_thinking_template_keeps_the_reasoning_of_the_last_answer_only(thinking):
    answers = "<think>\nFur.\n</think>\n\nA cat.", "<think>\nBarks.\n</think>\n\nA dog."
    row = {"messages": turns("What?", answers[0], "Now?", answers[1])}
    text, labelled, _ = encode(thinking, row, train_on="last")
    assert labelled == f"{answers[1]}<|im_end|>" and "assistant\nA cat.<|im_end|>" in text and "Fur" not in text
    with pytest.raises(UserError, match="chat template drops part of message 1, .*--train_on last"):
        encode(thinking, row, train_on="all")
    without = {"messages": turns("What?", "A cat.", "Now?", answers[1])}
    assert encode(thinking, without, train_on="all")[1] == f"A cat.<|im_end|>{answers[1]}<|im_end|>"


def test_a_prompt_ends_where_the_model_goes_on(processor, thinking):
    row = {"messages": turns("What?", "A cat.")}
    assert encode(processor, row, prompt_only=True)[0].endswith("What?<|im_end|>\n<|im_start|>assistant\n")
    assert encode(thinking, row, prompt_only=True)[0].endswith("<|im_start|>assistant\n<think>\n")


def test_the_demo_s_template_writes_the_same(processor):
    conversation = to_conversation(
        {"images": [picture()], "videos": [[picture(), picture()]], "messages": CONVERSATION}
    )
    for messages, prompt in ((conversation.messages, False), (conversation.messages[:-1], True)):
        demo, qwen = (
            processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=prompt)
            for template in (CHAT_TEMPLATE, None)
        )
        assert demo == qwen


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("token", [token["content"] for token in qwen3vl_real.ADDED_TOKENS if token["special"]])
def test_special_tokens_in_a_text_are_refused(processor, role, token):
    messages = turns("What?", "A cat.", system="Be brief.")
    index = [message["role"] for message in messages].index(role)
    messages[index]["content"] = f"a{token}b"
    with pytest.raises(UserError, match=re.escape(f"text of message {index} contains {token}")):
        encode(processor, {"messages": messages})


@pytest.mark.parametrize("token", [token for token in qwen3vl_real.ADDED_TOKENS if not token["special"]])
def test_tokens_of_reasoning_code_and_tools_are_text(processor, token):
    _, labelled, example = encode(processor, {"messages": turns(f"a {token['content']}", f"b {token['content']}")})
    assert labelled == f"b {token['content']}<|im_end|>" and (example["labels"] == token["id"]).sum() == 1


# Images and videos


def test_several_images_stand_where_the_text_names_them(processor):
    row = {
        "images": [picture(320, 256), picture(256, 256), picture(640, 256)],
        "messages": turns("Is <image> like <image>?", "No.", "<image>\nAnd this?", "Yes."),
    }
    text, _, example = encode(processor, row)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (
        f"<|im_start|>user\nIs {image} like {image}?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        f"<|im_start|>user\n{image}And this?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert example["image_grid_thw"].tolist() == [[1, 16, 20], [1, 16, 16], [1, 16, 40]]
    assert (example["mm_token_type_ids"] == 1).sum() == (16 * 20 + 16 * 16 + 16 * 40) // 4


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1, 1), (16, 16)),  # raised to 65,536 pixels
        ((256, 256), (16, 16)),
        ((257, 256), (16, 16)),  # rounded to 32 pixels
        ((20, 3990), (250, 2)),
        ((2048, 1024), (64, 128)),
    ],
)
def test_image_sizes(processor, size, grid):
    _, _, example = encode(processor, {"images": [picture(*size)], "messages": turns("?", "!")})
    assert example["image_grid_thw"].tolist() == [[1, *grid]]
    assert (example["input_ids"] == IMAGE_TOKEN).sum() == grid[0] * grid[1] // 4


@pytest.mark.parametrize(("size", "grid"), [((4096, 4096), (256, 256)), ((6000, 5000), (232, 280))])
def test_the_largest_images(processor, size, grid):
    """16,777,216 pixels are 16,384 tokens."""
    row = {"images": [picture(*size)], "messages": turns("?", "!")}
    tokens = grid[0] * grid[1] // 4
    assert tokens <= 16_384
    with pytest.raises(UserError, match=rf"has {tokens + 14} tokens \({tokens} of them visual\).*shrink the images"):
        encode(processor, row, max_length=16_000)
    _, _, example = encode(processor, row, max_length=16_500)
    assert example["image_grid_thw"].tolist() == [[1, *grid]] and len(example["pixel_values"]) == 4 * tokens
    assert example["pixel_values"].shape[1] == 3 * 2 * 16 * 16


def test_an_image_that_qwen_refuses_is_refused_in_a_sentence(processor):
    with pytest.raises(UserError, match="aspect ratio must be smaller than 200"):
        encode(processor, {"images": [picture(4020, 20)], "messages": turns("?", "!")})


def test_videos_have_timestamps(processor, tmp_path):
    av = pytest.importorskip("av")
    with av.open(tmp_path / "clip.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for brightness in range(0, 240, 10):
            frame = av.VideoFrame.from_ndarray(np.full((96, 128, 3), brightness, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    row = {"videos": [{"path": str(tmp_path / "clip.mp4"), "bytes": None}], "messages": turns("What?", "Light.")}
    text, labelled, example = encode(processor, row)
    # transformers 4.57, which Qwen released the models with, had no pair of tokens around all frames; 5 has.
    frame = "<|vision_start|><|video_pad|><|vision_end|>"
    frames = f"<|vision_start|><0.3 seconds>{frame}<1.4 seconds>{frame}<2.6 seconds>{frame}<|vision_end|>"
    assert text == f"<|im_start|>user\n{frames}What?<|im_end|>\n<|im_start|>assistant\nLight.<|im_end|>\n"
    assert labelled == "Light.<|im_end|>"
    assert example["video_grid_thw"].tolist() == [[3, 6, 8]]
    assert (example["mm_token_type_ids"] == 2).sum() == 3 * 6 * 8 // 4
    assert (example["input_ids"] == VIDEO_TOKEN).sum() == 3 * 6 * 8 // 4


# The model


def test_the_published_folder_is_a_base(repository, processor, tmp_path):
    """Shards, a tied head, and a config.json of transformers 4.57, to an adapter and back."""
    assert len(list(repository.glob("model-*-of-*.safetensors"))) > 1
    assert Qwen3VLPVMForConditionalGeneration.from_pretrained(repository).dtype == torch.bfloat16
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(repository, dtype=torch.float32)
    stock = AutoModelForImageTextToText.from_pretrained(repository, dtype=torch.float32)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.dtype == torch.float32 and model.config.text_config.rope_parameters["rope_theta"] == 5_000_000
    row = {"images": [picture()], "messages": turns("What?", "A cat.")}
    example = ConversationEncoder(processor, prompt_only=True)(to_conversation(row))
    inputs = {key: value[None] if value.dim() == 1 else value for key, value in example.items()}
    with torch.no_grad():
        expected = stock(**inputs).logits
        assert torch.equal(model(**inputs).logits, expected)
        for branch in pvm_blocks(model).values():
            branch.gate_alpha.fill_(0.5)
        with_branches = model(**inputs).logits
    assert not torch.allclose(with_branches, expected)
    model.config.base_model_name_or_path = str(repository)
    model.save_pretrained(tmp_path, adapter_only=True)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, with_branches)
        assert torch.equal(loaded(**inputs, use_pvm=False).logits, expected)


def test_what_was_trained_on_the_published_folder_loads(repository, conversations, tmp_path, caplog, monkeypatch):
    """Trainer gives the config a pad token, which Qwen's has not."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    run = training.run(repository, conversations, tmp_path / "run", "--max_steps", "2", "--dtype", "float32")
    assert json.loads((run / "config.json").read_text())["text_config"]["pad_token_id"] == 151643
    assert Qwen3VLConfig.from_pretrained(repository).text_config.pad_token_id is None
    gates = load_checkpoint(str(run)).description.gates
    assert len(gates) == 3 and all(gates.values())
    (new_branches,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "has no PVM branches: new ones" in new_branches


def test_generation_settings_are_kept_and_evaluation_is_greedy(repository, processor, tmp_path):
    published = json.loads((repository / "generation_config.json").read_text())
    del published["transformers_version"]
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(repository)
    model.config.base_model_name_or_path = str(repository)
    model.save_pretrained(tmp_path, adapter_only=True)
    processor.save_pretrained(tmp_path)
    for folder in (repository, tmp_path):
        kept = GenerationConfig.from_pretrained(folder).to_dict()
        assert {key: kept[key] for key in published} == published
    evaluated = load_checkpoint(str(tmp_path)).model.generation_config
    assert (evaluated.do_sample, evaluated.temperature, evaluated.top_k) == (False, None, None)
    assert (evaluated.eos_token_id, evaluated.pad_token_id) == ([151645, 151643], 151643)


@torch.no_grad()
def test_a_token_after_16384_visual_tokens():
    """The vision tower is left out: 65,536 patches attend to each other."""
    config = tiny.pvm_config({"num_hidden_layers": 2}, pvm_layers=[1])
    decoder = tiny.build(config).model.language_model
    visual, text = 16_384, 16
    embeddings = torch.randn(1, visual + text, 32)
    mask = (torch.arange(visual + text) < visual)[None]
    positions = torch.arange(visual + text).expand(3, 1, -1)
    whole = decoder(inputs_embeds=embeddings, position_ids=positions, visual_pos_masks=mask).last_hidden_state
    cache = DynamicCache(config=decoder.config)
    for part in (slice(0, visual), slice(visual, visual + text - 1), slice(visual + text - 1, None)):
        step = decoder(
            inputs_embeds=embeddings[:, part],
            position_ids=positions[:, :, part],
            visual_pos_masks=mask[:, part] if mask[:, part].any() else None,
            past_key_values=cache,
        ).last_hidden_state
    assert (step[:, -1] - whole[:, -1]).abs().max() < 1e-4
    assert cache.layers[0].visual_memory.positions.shape == (1, visual)


@pytest.mark.parametrize("size", qwen3vl_real.SIZES)
def test_names_and_shapes_are_those_of_the_released_checkpoints(size):
    published = qwen3vl_real.config(size)
    with torch.device("meta"):
        model = Qwen3VLPVMForConditionalGeneration(Qwen3VLPVMConfig.from_dict(published))
        stock = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(published))
    weights = {name: weight.shape for name, weight in model.named_parameters()}
    branches = {name: weights.pop(name) for name in list(weights) if ".pvm_block." in name}
    assert weights == {name: weight.shape for name, weight in stock.named_parameters()}
    assert (len(weights), 2 * sum(shape.numel() for shape in weights.values())) == RELEASED[size]
    assert sum(shape.numel() for shape in branches.values()) == BRANCH_PARAMETERS[size]
    assert set(weights) == released_names(published)


@pytest.mark.parametrize("size", qwen3vl_real.SIZES)
def test_the_benchmarks_shapes_are_the_released_ones(size):
    published = qwen3vl_real.config(size)
    for ours, theirs in ((SHAPES[size]["text_config"], "text_config"), (TOWERS[size], "vision_config")):
        assert ours.items() <= published[theirs].items()
    assert SHAPES[size]["tie_word_embeddings"] == published["tie_word_embeddings"]
    text = published["text_config"]
    assert ROPE == {**text["rope_scaling"], "rope_theta": text["rope_theta"]}


def released_names(config: dict) -> set[str]:
    """The names of the tensors in a released checkpoint."""
    linear = {"weight", "bias"}
    block = {f"{part}.{kind}" for part in ("norm1", "norm2", "attn.qkv", "attn.proj") for kind in linear}
    block |= {f"mlp.linear_fc{number}.{kind}" for number in (1, 2) for kind in linear}
    merger = {f"{part}.{kind}" for part in ("norm", "linear_fc1", "linear_fc2") for kind in linear}
    layer = {f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    layer |= {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    layer |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    vision, text = config["vision_config"], config["text_config"]
    names = {"model.visual.pos_embed.weight", *(f"model.visual.patch_embed.proj.{kind}" for kind in linear)}
    names |= {f"model.visual.blocks.{index}.{name}" for index in range(vision["depth"]) for name in block}
    mergers = ["merger", *(f"deepstack_merger_list.{i}" for i in range(len(vision["deepstack_visual_indexes"])))]
    names |= {f"model.visual.{part}.{name}" for part in mergers for name in merger}
    names |= {f"model.language_model.layers.{i}.{name}" for i in range(text["num_hidden_layers"]) for name in layer}
    names |= {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}
    return names if config["tie_word_embeddings"] else names | {"lm_head.weight"}


def test_the_mixture_of_experts_is_refused():
    with pytest.raises(ValueError, match="dense Qwen3-VL models only.*`num_experts`"):
        Qwen3VLPVMConfig.from_dict(qwen3vl_real.config("30B-A3B"))
