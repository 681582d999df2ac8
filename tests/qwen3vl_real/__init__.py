"""
What Qwen publishes with Qwen3-VL-Instruct, all but the weights, without a network.

The configs, the list of added tokens and the generation settings beside this file are Qwen's. The vocabulary is in the
package dashscope, the chat template in trl (both Apache-2.0). Of tokenizer_config.json, only what decides how a text
is encoded is written here.
"""

import base64
import json
import shutil
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


DATA = Path(__file__).parent
SIZES = ("2B", "4B", "8B", "32B")
# Widths and depths of "tiny"; everything else is as in 2B: vocabulary, heads, rotary sections, patches.
TINY = {
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0, 1],
    },
}
ADDED_TOKENS: list[dict[str, Any]] = json.loads((DATA / "added_tokens.json").read_text())
CHAT_TEMPLATES = Path(distribution("trl").locate_file("trl/chat_templates"))


def config(size: str) -> dict[str, Any]:
    """The config.json of a released size, or of one that is `TINY`."""
    if size == "tiny":
        return {key: {**value, **TINY[key]} if key in TINY else value for key, value in config("2B").items()}
    return json.loads((DATA / f"config_{size}.json").read_text())


def build_tokenizer() -> bytes:
    """Qwen's tokenizer.json, byte for byte. Takes seconds."""
    vocabulary = distribution("dashscope").locate_file("dashscope/resources/qwen.tiktoken")
    lines = Path(vocabulary).read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    characters = bytes_to_unicode()

    def printable(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = [tuple(map(printable, halves(token, ranks))) for token in ranks if len(token) > 1]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={printable(token): rank for token, rank in ranks.items()},
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="",
        )
    )
    rules = Qwen2Tokenizer().backend_tokenizer
    tokenizer.normalizer, tokenizer.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    content = json.loads(tokenizer.to_str())
    options = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    content["decoder"] = content["post_processor"] = {"type": "ByteLevel", **options}
    content["pre_tokenizer"]["pretokenizers"][1] |= options
    order = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")
    content["added_tokens"] = [{key: token[key] for key in order} for token in ADDED_TOKENS]
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


def halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that are merged into `token`: what is left of it when only pairs of lower rank are merged."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        pairs = (first + second for first, second in pairwise(parts))
        _, where = min((ranks.get(pair, len(ranks)), index) for index, pair in enumerate(pairs))
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
    return parts


def save_configs(folder: Path, size: str) -> None:
    """Write the config.json and generation_config.json of a released size, or of "tiny"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(size), indent=2))
    generation = "generation_config_2B_instruct.json" if size == "2B" else "generation_config.json"
    shutil.copyfile(DATA / generation, folder / "generation_config.json")


def save(folder: Path, size: str) -> None:
    """Write all that the repository of a released size (or "tiny") holds, but the weights."""
    save_configs(folder, size)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        shutil.copyfile(DATA / name, folder / name)
    (folder / "tokenizer.json").write_bytes(build_tokenizer())
    template = (CHAT_TEMPLATES / "qwen3_vl.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    without_id = {token["id"]: {key: token[key] for key in token if key != "id"} for token in ADDED_TOKENS}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": without_id,
        "additional_special_tokens": [token["content"] for token in ADDED_TOKENS[1:] if token["special"]],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": config(size)["text_config"]["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
