"""The config: defaults, conversion of stock configs, round trips, and what is refused."""

import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeTextConfig

import tiny
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig, Qwen3VLPVMTextConfig


# `__post_init__` raises ValueError; what `validate_*` raise, `strict` wraps in an error that is not one.
REFUSED = (ValueError, StrictDataclassError)


def decoder(hidden_size: int, num_hidden_layers: int, **fields) -> Qwen3VLPVMTextConfig:
    return Qwen3VLPVMTextConfig(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, **fields)


@pytest.mark.parametrize(
    ("hidden_size", "layers", "expected"),
    [
        (4096, 36, [8, 16, 24]),  # 8B, published
        (2560, 36, [5, 11, 17]),  # 4B, published
        (2048, 28, [6, 12, 19]),  # 2B: 2/9, 4/9 and 6/9 of the decoder
        (5120, 64, [14, 28, 43]),  # 32B
        (32, 1, [0]),
        (32, 2, [0, 1]),
        (32, 3, [1, 2]),
        (32, 4, [1, 2, 3]),
        (32, 5, [1, 2, 3]),
        (32, 6, [1, 3, 4]),
    ],
)
def test_default_layers(hidden_size, layers, expected):
    assert decoder(hidden_size, layers).pvm_layers == expected


def test_defaults_of_the_branch():
    config = decoder(4096, 36, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    assert config.pvm_hidden_size == 512
    assert config.pvm_causal is True
    assert config.pvm_training is None
    assert config.pvm_num_attention_heads == 4
    assert config.pvm_num_key_value_heads == 1
    assert config.pvm_intermediate_size == 1536


def test_default_layers_are_not_shared_between_configs():
    decoder(4096, 36).pvm_layers.append(30)
    assert decoder(4096, 36).pvm_layers == [8, 16, 24]


@pytest.mark.parametrize(("heads", "key_value_heads", "expected"), [(64, 8, 1), (32, 8, 1), (8, 8, 4), (8, 4, 2)])
def test_grouped_query_ratio(heads, key_value_heads, expected):
    config = decoder(4096, 36, num_attention_heads=heads, num_key_value_heads=key_value_heads, head_dim=128)
    assert config.pvm_num_key_value_heads == expected


def test_round_trip(tmp_path):
    config = tiny.pvm_config(pvm_layers=[0, 3], pvm_hidden_size=48 - 16, pvm_causal=False, pvm_training={"step": 7})
    config.save_pretrained(tmp_path)
    loaded = Qwen3VLPVMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.text_config.pvm_layers == [0, 3]
    assert loaded.text_config.pvm_causal is False
    assert loaded.text_config.pvm_training == {"step": 7}


def test_layers_left_out_are_saved(tmp_path):
    Qwen3VLPVMConfig.from_stock(tiny.stock_config(), pvm_hidden_size=32).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "qwen3_vl_pvm"
    assert saved["text_config"]["pvm_layers"] == [1, 2, 3]


def test_layers_given_as_a_tuple_round_trip(tmp_path):
    config = tiny.pvm_config(pvm_layers=(0, 3))
    config.save_pretrained(tmp_path)
    assert Qwen3VLPVMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_from_stock_keeps_every_field():
    stock = tiny.stock_config(
        text={
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1234.0,
                "mrope_section": [2, 3, 3],
                "mrope_interleaved": True,
            },
            "attention_bias": True,
            "attention_dropout": 0.25,
            "max_position_embeddings": 777,
            "rms_norm_eps": 1e-5,
            "of_the_future": {"a": 1},
        },
        tie_word_embeddings=True,
        of_the_future=[1, 2],
        dtype="bfloat16",
    )
    config = Qwen3VLPVMConfig.from_stock(stock, pvm_layers=[2], pvm_hidden_size=64, pvm_causal=False)
    before, after = stock.to_dict(), config.to_dict()

    pvm_fields = {
        "pvm_layers": [2],
        "pvm_hidden_size": 64,
        "pvm_causal": False,
        "pvm_block": "pvm",
        "pvm_training": None,
    }
    assert {name: after["text_config"].pop(name) for name in pvm_fields} == pvm_fields
    assert not any(after.pop(name) for name in ("base_model_name_or_path", "base_model_revision", "peft_adapter"))
    assert after.pop("model_type") == "qwen3_vl_pvm"
    assert after["text_config"].pop("model_type") == "qwen3_vl_pvm_text"
    assert before.pop("model_type") == "qwen3_vl"
    assert before["text_config"].pop("model_type") == "qwen3_vl_text"
    assert after == before


def test_stock_checkpoint_is_converted(tmp_path):
    stock = tiny.stock_config(tie_word_embeddings=True, architectures=["Qwen3VLForConditionalGeneration"])
    stock.text_config.head_dim = 128  # the default width of 512 fits
    stock.save_pretrained(tmp_path)
    config = Qwen3VLPVMConfig.from_pretrained(tmp_path)
    assert type(config) is Qwen3VLPVMConfig
    assert type(config.text_config) is Qwen3VLPVMTextConfig
    assert config.tie_word_embeddings is True
    assert config.text_config.hidden_size == 32
    assert config.text_config.pvm_causal is True
    assert config.text_config.pvm_training is None


def test_from_stock_does_not_touch_the_stock_config():
    stock = tiny.stock_config()
    before = stock.to_dict()
    Qwen3VLPVMConfig.from_stock(stock, pvm_layers=[0], pvm_hidden_size=32)
    assert stock.to_dict() == before
    assert type(stock) is Qwen3VLConfig


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        *(
            (
                {"pvm_layers": layers},
                rf"{re.escape(str(layers))}` must name .*layers 0 to 3, each.*=\[1, 2, 3\]`, or leave",
            )
            for layers in ([1, 99], [4], [-1], [2, 1, 2], [])
        ),
        ({"pvm_layers": 1}, r"pvm_layers"),
        ({"pvm_hidden_size": 40}, r"heads of `head_dim=16`.*multiple of 32.*pvm_hidden_size=32"),
        ({"pvm_hidden_size": 8}, r"heads of `head_dim=16`.*pvm_hidden_size=32"),
        ({"pvm_hidden_size": 0}, r"heads of `head_dim=16`.*pvm_hidden_size=32"),
        ({"pvm_hidden_size": -32}, r"heads of `head_dim=16`.*pvm_hidden_size=32"),
        ({"pvm_hidden_size": 80}, r"heads of `head_dim=16`.*grouped-query ratio.*multiple of 32.*pvm_hidden_size=64"),
        ({"pvm_causal": "no"}, r"pvm_causal"),
    ],
)
def test_refused_fields(fields, sentence):
    with pytest.raises(REFUSED, match=rf"(?s){sentence}"):
        Qwen3VLPVMConfig.from_stock(tiny.stock_config(), **{"pvm_hidden_size": 32, **fields})


@pytest.mark.parametrize("folder", ["../outside", "/outside", "..", "lora/../..", "", "C:\\x"])
def test_a_peft_adapter_is_in_a_subfolder(folder):
    with pytest.raises(REFUSED, match="must be the name of a subfolder, e.g. `lora`"):
        Qwen3VLPVMConfig(**{**tiny.pvm_config().to_dict(), "peft_adapter": folder})


@pytest.mark.parametrize("size", [16, 32, 64, 96])
def test_what_a_refusal_suggests_is_accepted(size):
    config = Qwen3VLPVMConfig.from_stock(tiny.stock_config(), pvm_hidden_size=size)
    assert config.text_config.pvm_num_attention_heads * 16 == size


def test_refuses_a_mixture_of_experts_model(tmp_path):
    with pytest.raises(ValueError, match="dense Qwen3-VL models.*qwen3_vl_moe.*Start from e.g. Qwen/Qwen3-VL-8B"):
        Qwen3VLPVMConfig.from_stock(Qwen3VLMoeConfig())
    Qwen3VLMoeConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dense Qwen3-VL models.*qwen3_vl_moe"):
        Qwen3VLPVMConfig.from_pretrained(tmp_path)


def test_refuses_the_text_config_of_a_mixture_of_experts_model():
    fields = Qwen3VLMoeTextConfig().to_dict()
    with pytest.raises(ValueError, match=r"num_experts.*mixture-of-experts.*Start from a dense checkpoint"):
        Qwen3VLPVMTextConfig(**fields)
    with pytest.raises(ValueError, match=r"num_experts.*mixture-of-experts"):
        Qwen3VLPVMConfig(text_config=fields)


def test_refuses_a_text_config_without_pvm_fields():
    with pytest.raises(ValueError, match=r"Qwen3VLTextConfig.*with `Qwen3VLPVMConfig.from_stock"):
        Qwen3VLPVMConfig(text_config=tiny.stock_config().text_config)


def test_refuses_other_model_types():
    fields = {**tiny.stock_config().to_dict(), "model_type": "llama"}
    with pytest.raises(ValueError, match="not `model_type: llama`"):
        Qwen3VLPVMConfig._from_stock_dict(fields)
