"""Adapter checkpoints: their content, loading, and what is refused; `use_pvm`; the code files of checkpoints."""

import ast
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    Qwen3VLForConditionalGeneration,
)

import tiny
from adapter_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME, MAX_GATE
from cache_qwen3vl_pvm import get_visual_memory
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.checkpoints.inspect import inspect
from pvm.checkpoints.loading import load_checkpoint
from pvm.checkpoints.names import checkpoint_kind
from pvm.errors import UserError
from tiny import BATCHES, inputs, logits
from training import ROOT


BATCH = inputs(*BATCHES["mixed rows"])


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A stock checkpoint in several files, as large ones are."""
    folder = tmp_path_factory.mktemp("stock")
    tiny.build_stock().save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def trained(stock) -> Qwen3VLPVMForConditionalGeneration:
    """A model from that checkpoint whose branches matter."""
    config = Qwen3VLPVMConfig.from_stock(tiny.stock_config(), pvm_layers=[1, 2], pvm_hidden_size=32)
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(stock, config=config)
    tiny.set_gates(model, 0.5)
    model.config.base_model_name_or_path = str(stock)
    model.config.text_config.pvm_training = {"method": "pvm", "step": 7}
    return model


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    trained.save_pretrained(tmp_path / "adapter", adapter_only=True)
    return tmp_path / "adapter"


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / ADAPTER_WEIGHTS_NAME)
    edit(weights)
    save_file(weights, folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})


def test_an_adapter_holds_the_branches_alone(trained, adapter):
    files = {file.name for file in adapter.iterdir()}
    assert files == {
        ADAPTER_WEIGHTS_NAME,
        *("config.json", "generation_config.json", *(file.name for file in ROOT.glob("*_qwen3vl_pvm.py"))),
    }
    expected = {name: weight for name, weight in trained.state_dict().items() if ".pvm_block." in name}
    saved = load_file(adapter / ADAPTER_WEIGHTS_NAME)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert trained.config.base_model_name_or_path is not None, "saving must not change the model's own config"


@pytest.mark.parametrize("loader", ["class", "auto", "device map"])
def test_an_adapter_equals_the_whole_checkpoint(trained, adapter, tmp_path, loader):
    trained.save_pretrained(tmp_path / "whole")
    whole = Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path / "whole")
    if loader == "class":
        loaded, info = Qwen3VLPVMForConditionalGeneration.from_pretrained(adapter, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    elif loader == "auto":
        loaded = AutoModelForImageTextToText.from_pretrained(adapter, trust_remote_code=True)
    else:
        loaded = Qwen3VLPVMForConditionalGeneration.from_pretrained(adapter, device_map="cpu")
    assert loaded.name_or_path == str(adapter)
    expected = whole.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    assert torch.equal(logits(loaded, BATCH), logits(trained, BATCH))
    assert not torch.equal(logits(loaded, BATCH), logits(trained, BATCH, use_pvm=False))


def test_an_adapter_loads_offloaded_to_disk(trained, adapter, tmp_path):
    layers = {f"model.language_model.layers.{index}": "disk" if index == 2 else "cpu" for index in range(4)}
    others = ("model.visual", "model.language_model.embed_tokens", "model.language_model.norm", "lm_head")
    device_map = {**layers, **dict.fromkeys((*others, "model.language_model.rotary_emb"), "cpu")}
    loaded = Qwen3VLPVMForConditionalGeneration.from_pretrained(
        adapter, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.language_model.layers[2].pvm_block.gate_alpha.device.type == "meta"
    assert torch.equal(logits(loaded, BATCH), logits(trained, BATCH))


def test_an_adapter_loads_as_the_backbone(trained, adapter):
    backbone = AutoModel.from_pretrained(adapter, trust_remote_code=True)
    expected = trained.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in backbone.state_dict().items())


def test_whole_and_back(trained, adapter, stock, tmp_path):
    """A whole checkpoint names no base; an adapter saved from it is identical to the first."""
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(adapter)
    model.save_pretrained(tmp_path / "whole")
    written = json.loads((tmp_path / "whole/config.json").read_text())
    assert written["base_model_name_or_path"] is None and str(stock.parent) not in json.dumps(written)
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="needs the name of its base"):
        model.save_pretrained(tmp_path / "again", adapter_only=True)
    model.config.base_model_name_or_path = trained.config.base_model_name_or_path
    model.save_pretrained(tmp_path / "again", adapter_only=True)
    for name in (ADAPTER_WEIGHTS_NAME, "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()


def test_dtype_applies_to_base_and_branches(trained, adapter):
    half = Qwen3VLPVMForConditionalGeneration.from_pretrained(adapter, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("elsewhere", ["class", "auto"])
def test_a_base_at_another_place(trained, adapter, stock, tmp_path, elsewhere):
    edit_config(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    load = Qwen3VLPVMForConditionalGeneration.from_pretrained
    with pytest.raises(OSError, match=r"holds PVM branches only.*gone.*no such folder.*base_model_name_or_path"):
        load(adapter)
    if elsewhere == "auto":
        load = AutoModelForImageTextToText.from_pretrained
    loaded = load(adapter, base_model_name_or_path=str(stock), trust_remote_code=True)
    assert torch.equal(logits(loaded, BATCH), logits(trained, BATCH))


def test_a_base_of_another_shape_is_refused(adapter, tmp_path):
    tiny.build_stock({"num_hidden_layers": 5, "intermediate_size": 96}).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"another model: text_config.intermediate_size is 96 and not 80; .*num_hidden_layers is 5"
    ):
        Qwen3VLPVMForConditionalGeneration.from_pretrained(adapter, base_model_name_or_path=str(tmp_path / "other"))


@pytest.mark.parametrize(("key", "value"), [("tie_word_embeddings", True), ("image_token_id", tiny.VIDEO_TOKEN)])
def test_a_base_that_uses_its_weights_otherwise_is_refused(adapter, stock, tmp_path, key, value):
    """The adapter's config would be used instead."""
    shutil.copytree(stock, tmp_path / "other")
    edit_config(tmp_path / "other", **{key: value})
    with pytest.raises(ValueError, match=f"another model: {key} is {value} and not"):
        Qwen3VLPVMForConditionalGeneration.from_pretrained(adapter, base_model_name_or_path=str(tmp_path / "other"))


def test_an_incomplete_base_is_refused(adapter, stock, tmp_path):
    shutil.copytree(stock, tmp_path / "part")
    index = json.loads((tmp_path / "part/model.safetensors.index.json").read_text())
    lost = index["weight_map"].pop("model.visual.pos_embed.weight")
    weights = load_file(tmp_path / "part" / lost)
    del weights["model.visual.pos_embed.weight"]
    save_file(weights, tmp_path / "part" / lost, metadata={"format": "pt"})
    (tmp_path / "part/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks 1 weights, e.g. model.visual.pos_embed.weight"):
        Qwen3VLPVMForConditionalGeneration.from_pretrained(adapter, base_model_name_or_path=str(tmp_path / "part"))


@pytest.mark.parametrize("revision", ["a" * 40, "b" * 40, None])
def test_another_revision_of_the_base_is_warned_about(trained, stock, tmp_path, caplog, monkeypatch, revision):
    """The revision of a downloaded file is in its path in the cache."""
    base = stock if revision is None else tmp_path / "models--org--base" / "snapshots" / revision
    if revision is not None:
        shutil.copytree(stock, base)
    trained.save_pretrained(tmp_path / "adapter", adapter_only=True)
    text_config = json.loads((tmp_path / "adapter/config.json").read_text())["text_config"]
    metadata = {"method": "pvm", "step": 7, "base_model": "org/base", "base_revision": "a" * 40}
    edit_config(
        tmp_path / "adapter", base_model_name_or_path=str(base), text_config={**text_config, "pvm_training": metadata}
    )
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    warned = "trained on revision " + "a" * 40 in caplog.text
    assert warned == (revision != "a" * 40)


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_damaged_files_are_refused(adapter, tmp_path, trained, size):
    trained.save_pretrained(tmp_path / "whole")
    for folder, name in ((adapter, ADAPTER_WEIGHTS_NAME), (tmp_path / "whole", "model.safetensors")):
        (folder / name).write_bytes((folder / name).read_bytes()[:size])
        with pytest.raises(OSError, match="is damaged"):
            Qwen3VLPVMForConditionalGeneration.from_pretrained(folder)


def test_incomplete_branches_are_refused(adapter):
    edit_weights(adapter, lambda weights: weights.pop("model.language_model.layers.1.pvm_block.gate_alpha"))
    with pytest.raises(ValueError, match="lacks 1 weights, e.g. layers.1.pvm_block.gate_alpha. Get the complete"):
        Qwen3VLPVMForConditionalGeneration.from_pretrained(adapter)


def test_incomplete_branches_are_refused_without_metadata(trained, tmp_path):
    model = tiny.build()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.language_model.layers.1.pvm_block.gate_alpha"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights, e.g. layers.1.pvm_block.gate_alpha. Get the complete"):
        Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -2 * MAX_GATE, 1e30])
@pytest.mark.parametrize("whole", [True, False])
def test_corrupted_gates_are_refused(trained, tmp_path, value, whole):
    trained.save_pretrained(tmp_path, adapter_only=not whole)
    file = tmp_path / ("model.safetensors" if whole else ADAPTER_WEIGHTS_NAME)
    weights = load_file(file)
    weights["model.language_model.layers.2.pvm_block.gate_alpha"].fill_(value)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.2.pvm_block.gate_alpha reaches [\w.+]+. The file is damaged"):
        Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_corrupted_weights_are_refused(adapter, value):
    norm = "model.language_model.layers.1.pvm_block.mlp.up_proj.weight"
    edit_weights(adapter, lambda weights: weights[norm][3, 4].fill_(value))
    with pytest.raises(ValueError, match=f"layers.1.pvm_block.mlp.up_proj.weight reaches {abs(value)}. The file is"):
        Qwen3VLPVMForConditionalGeneration.from_pretrained(adapter)


def test_the_largest_gate_is_accepted(trained, adapter):
    gate = "model.language_model.layers.2.pvm_block.gate_alpha"
    edit_weights(adapter, lambda weights: weights[gate].fill_(-MAX_GATE))
    loaded = Qwen3VLPVMForConditionalGeneration.from_pretrained(adapter)
    assert loaded.model.language_model.layers[2].pvm_block.gate_alpha.item() == -MAX_GATE


def test_the_stock_class_fails_on_an_adapter(adapter):
    with pytest.raises(OSError, match="no file named model.safetensors"):
        Qwen3VLForConditionalGeneration.from_pretrained(adapter)


def test_pickles_are_not_read(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path)


def test_a_pickled_base_is_not_read(trained, adapter, stock, tmp_path):
    weights = {}
    for file in stock.glob("*.safetensors"):
        weights |= load_file(file)
    (tmp_path / "base").mkdir()
    shutil.copy(stock / "config.json", tmp_path / "base")
    torch.save(weights, tmp_path / "base/pytorch_model.bin")
    with pytest.raises(OSError, match="could not be loaded"):
        Qwen3VLPVMForConditionalGeneration.from_pretrained(adapter, base_model_name_or_path=str(tmp_path / "base"))


def test_peft_files_beside_branches_are_refused(trained, tmp_path):
    """Transformers would add them to the model."""
    trained.save_pretrained(tmp_path)
    lora = get_peft_model(tiny.build_stock(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a PEFT adapter beside its config.json"):
        Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path)


def test_a_folder_s_name_is_not_pushed(trained, tmp_path):
    with pytest.raises(ValueError, match="if pushed one on the Hub"):
        trained.save_pretrained(tmp_path, adapter_only=True, push_to_hub=True, repo_id="org/name")
    assert not list(tmp_path.iterdir())


# For the demo's backbone, whose layers are wide enough for bitsandbytes' CPU kernels.
FOUR_BIT = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=[r".*\.visual", "lm_head"]
)


@torch.no_grad()
def describe_gray(model, base) -> torch.Tensor:
    """Logits of a question about a gray picture."""
    processor = AutoProcessor.from_pretrained(base)
    content = [{"type": "image"}, {"type": "text", "text": "Cell first alpha?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    batch = processor(text=[prompt], images=[Image.new("RGB", (32, 32), (99, 99, 99))], return_tensors="pt")
    return model(**batch).logits


def with_branches(base, adapter: Path, **kwargs) -> Qwen3VLPVMForConditionalGeneration:
    """A base with branches that matter, saved as an adapter."""
    config = Qwen3VLPVMConfig.from_pretrained(base)
    fields = {**config.text_config.to_dict(), "pvm_hidden_size": 32}
    config = Qwen3VLPVMConfig.from_dict({**config.to_dict(), "text_config": fields})
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(base, config=config, **kwargs)
    tiny.set_gates(model, 0.5)
    model.config.base_model_name_or_path = str(base)
    model.save_pretrained(adapter, adapter_only=True)
    return model


def test_a_quantised_base_keeps_the_branches_as_they_are(base, tmp_path):
    model = with_branches(base, tmp_path / "adapter")
    loaded = Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path / "adapter", quantization_config=FOUR_BIT)
    assert loaded.model.language_model.layers[1].mlp.up_proj.weight.dtype == torch.uint8
    expected = model.state_dict()
    branches = [name for name in expected if ".pvm_block." in name]
    assert len(branches) == 45
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in branches)
    difference = (describe_gray(loaded, base) - describe_gray(model, base)).abs().max()
    assert 0 < difference < 1
    # Saved again, the adapter is the same: quantisation is chosen at each loading.
    loaded.save_pretrained(tmp_path / "again", adapter_only=True)
    for name in (ADAPTER_WEIGHTS_NAME, "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_a_base_stored_in_4_bit(base, tmp_path):
    stored = Qwen3VLForConditionalGeneration.from_pretrained(base, quantization_config=FOUR_BIT)
    stored.save_pretrained(tmp_path / "base")
    model = with_branches(tmp_path / "base", tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS_NAME)) == 45
    loaded = Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    assert loaded.model.language_model.layers[1].mlp.up_proj.weight.dtype == torch.uint8
    assert torch.equal(describe_gray(loaded, base), describe_gray(model, base))


def test_a_quantised_base_in_place_of_a_plain_one_is_refused(base, tmp_path):
    """Its weights would be loaded as if they were not quantised."""
    with_branches(base, tmp_path / "adapter")
    for bits in ("4bit", "8bit"):
        quantised = BitsAndBytesConfig(**{f"load_in_{bits}": True}, llm_int8_skip_modules=[r".*\.visual", "lm_head"])
        Qwen3VLForConditionalGeneration.from_pretrained(base, quantization_config=quantised).save_pretrained(
            tmp_path / bits
        )
        with pytest.raises(ValueError, match="only one of the two is stored quantised"):
            Qwen3VLPVMForConditionalGeneration.from_pretrained(
                tmp_path / "adapter", base_model_name_or_path=str(tmp_path / bits)
            )


# Calls without branches


@pytest.mark.parametrize("kind", BATCHES)
def test_off_is_the_stock_model(trained, stock, kind):
    batch = inputs(*BATCHES[kind])
    expected = logits(Qwen3VLForConditionalGeneration.from_pretrained(stock), batch)
    assert torch.equal(logits(trained, batch, use_pvm=False), expected)


def test_off_in_generate(trained, stock):
    base = Qwen3VLForConditionalGeneration.from_pretrained(stock)
    options = {"max_new_tokens": 12, "do_sample": False}
    on = trained.generate(**BATCH, **options)
    assert torch.equal(trained.generate(**BATCH, **options, use_pvm=False), base.generate(**BATCH, **options))
    assert not torch.equal(on, base.generate(**BATCH, **options)), "the branches must matter here"
    assert torch.equal(trained.generate(**BATCH, **options), on), "`use_pvm` must hold for one call only"


def test_some_layers_alone(trained, stock):
    """`use_pvm=[1]` gives the same logits as gates of 0 in all other layers."""
    alone = Qwen3VLPVMForConditionalGeneration.from_pretrained(stock, config=trained.config.__class__.from_stock(
        tiny.stock_config(), pvm_layers=[1, 2], pvm_hidden_size=32))  # fmt: skip
    alone.load_state_dict(trained.state_dict())
    alone.model.language_model.layers[2].pvm_block.gate_alpha.data.zero_()
    expected = logits(alone, BATCH)
    assert torch.equal(logits(trained, BATCH, use_pvm=[1]), expected)
    assert not torch.equal(logits(trained, BATCH), expected)
    assert torch.equal(logits(trained, BATCH, use_pvm=(1, 2)), logits(trained, BATCH))
    assert torch.equal(logits(trained, BATCH, use_pvm=[]), logits(trained, BATCH, use_pvm=False))
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(trained.generate(**BATCH, **options, use_pvm=[1]), alone.generate(**BATCH, **options))


@torch.no_grad()
def test_off_and_on_again_on_one_cache(trained):
    """Images are remembered while the branches are off."""
    batch = inputs([tiny.text(4), tiny.image(), tiny.text(7, 1)])
    prompt = trained(**batch, use_pvm=False)
    token = torch.tensor([[5]])
    after = trained(input_ids=token, past_key_values=prompt.past_key_values).logits
    assert [keys.shape[2] for keys in get_visual_memory(prompt.past_key_values).keys.values()] == [4, 4]

    off = trained(**batch, use_pvm=False)
    without = trained(input_ids=token, past_key_values=off.past_key_values, use_pvm=False).logits
    assert not torch.equal(after, without)


def test_a_misspelt_switch_is_refused(trained):
    with pytest.raises(ValueError, match="use_pmv"):
        trained.generate(**BATCH, max_new_tokens=2, use_pmv=False)


# The code files of checkpoints


HUB_FILES = sorted(file.name for file in ROOT.glob("*_qwen3vl_pvm.py"))


@pytest.mark.parametrize("file", HUB_FILES)
def test_the_hub_files_import_nothing_else_and_do_nothing(file):
    """At the top level there are only imports, definitions and constants, and two calls."""
    tree = ast.parse((ROOT / file).read_text())
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        for name in names:
            assert name.split(".")[0] in allowed or f"{name}.py" in HUB_FILES, name
    done = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Import))]
    calls = {ast.unparse(call.func) for node in done for call in ast.walk(node) if isinstance(call, ast.Call)}
    assert calls <= {"logging.get_logger", "torch.iinfo"}
    kinds = {type(node).__name__ for node in done}
    assert kinds <= {"ImportFrom", "Assign", "AnnAssign", "Expr", "Try"}


def test_a_checkpoint_has_the_code_that_wrote_it(adapter):
    for file in HUB_FILES:
        assert (adapter / file).read_text() == (ROOT / file).read_text()


# What the commands refuse before they load anything


def test_a_folder_of_two_checkpoints_is_refused(trained, adapter, tmp_path):
    """Which one would be loaded depends on the class."""
    lora = get_peft_model(tiny.build_stock(), LoraConfig(target_modules=["q_proj"]))
    shutil.copytree(adapter, tmp_path / "peft")
    lora.save_pretrained(tmp_path / "peft")
    with pytest.raises(UserError, match="holds a PVM checkpoint and a PEFT adapter"):
        load_checkpoint(str(tmp_path / "peft"))
    trained.save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", adapter)
    with pytest.raises(UserError, match="holds the weights of two checkpoints"):
        load_checkpoint(str(adapter))


class Marker:
    """Leaves a file where a pickle of it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("kind", ["stock", "pvm", "peft"])
def test_no_command_reads_a_pickle(trained, base, tmp_path, kind):
    if kind == "peft":
        model = get_peft_model(
            Qwen3VLForConditionalGeneration.from_pretrained(base), LoraConfig(target_modules=["q_proj"])
        )
        model.peft_config["default"].base_model_name_or_path = str(base)
    else:
        model = trained if kind == "pvm" else tiny.build_stock()
    model.save_pretrained(tmp_path / "folder")
    (weights,) = (tmp_path / "folder").glob("*model.safetensors")
    weights.unlink()
    pickle = weights.with_name("adapter_model.bin" if kind == "peft" else "pytorch_model.bin")
    torch.save({"x": Marker(tmp_path / "read")}, pickle)
    with pytest.raises(UserError, match=f"could not be loaded.*{pickle.name} is a pickle, which is never read"):
        load_checkpoint(str(tmp_path / "folder"))
    assert not (tmp_path / "read").exists()


@pytest.mark.parametrize("name", ["/gone/folder", "./gone", "tests/gone", "runs/gone/checkpoint-20", "../gone/x"])
def test_a_folder_that_is_not_there_is_not_called_a_hub_name(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for fail in (checkpoint_kind, inspect):
        with pytest.raises(UserError, match=f"^There is no folder {name}, and it is not a name on the Hub.$"):
            fail(name)
    with pytest.raises(UserError, match="^org/gone is not a folder, and could not be loaded from the Hub"):
        checkpoint_kind("org/gone")


@pytest.mark.parametrize("whole", [True, False])
def test_damaged_weights_and_configs_end_in_a_sentence(trained, tmp_path, whole):
    trained.save_pretrained(tmp_path, adapter_only=not whole)
    file = tmp_path / ("model.safetensors" if whole else ADAPTER_WEIGHTS_NAME)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="could not be loaded.* is damaged"):
        load_checkpoint(str(tmp_path))
    edit_config(tmp_path, peft_adapter="../outside")
    with pytest.raises(
        UserError, match="config.json does not describe a PVM model: `peft_adapter=../outside` must be"
    ):
        load_checkpoint(str(tmp_path))
