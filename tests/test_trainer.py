"""What a training step computes, keeps, logs and leaves alone."""

import json
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

import tiny
from adapter_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME
from benchmarks.training import saved_bytes
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration, pvm_blocks
from pvm.checkpoints.loading import load_checkpoint
from pvm.checkpoints.record import count_parameters
from pvm.data.encoding import ConversationCollator, ConversationDataset
from pvm.data.sources import load_conversations
from pvm.errors import UserError
from pvm.training import trainer
from pvm.training.methods import METHODS, ModelArguments, load_model
from pvm.training.trainer import PVMTrainer, PVMTrainingArguments, loss_of_predictions, predictions
from training import PVM, losses, run
from variants_qwen3vl_pvm import BLOCKS


def model_arguments(base, method: str, **fields) -> ModelArguments:
    return ModelArguments(str(base), method=method, pvm_hidden_size=32 if "pvm" in method else None, **fields)


@pytest.fixture(scope="module")
def batch(base, conversations) -> dict[str, torch.Tensor]:
    """Three conversations of different length; the second has no image."""
    processor = AutoProcessor.from_pretrained(base)
    dataset = ConversationDataset(load_conversations(str(conversations), "train"), processor)
    return ConversationCollator(processor.tokenizer.pad_token_id)([dataset[4], dataset[5], dataset[6]])


def open_gates(model, gate: float = 0.5):
    for block in pvm_blocks(model).values():
        torch.nn.init.constant_(block.gate_alpha, gate)
    return model


# The loss


@pytest.mark.parametrize(
    ("method", "block"), [*((method, None) for method in METHODS), *(("pvm", block) for block in BLOCKS)]
)
def test_the_loss_is_the_models_own(base, batch, method, block):
    """Logits at the labels alone give the loss and the gradients of all logits, and everything has a gradient."""
    model = open_gates(load_model(model_arguments(base, method, pvm_block=block)))
    own = model(**batch).loss
    own.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in expected.values())
    model.zero_grad()

    positions, targets = predictions(batch["labels"])
    outputs = model(**{**batch, "labels": None}, logits_to_keep=positions)
    assert outputs.logits.shape[1] < batch["labels"].shape[1] / 2
    loss = loss_of_predictions(outputs, targets)
    torch.testing.assert_close(loss, own)
    loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-4)


def test_a_step_is_the_mean_over_its_labels_however_it_is_cut(base, conversations, tmp_path):
    """transformers' own loss for Qwen3-VL averages the means of micro-batches, whatever their number of labels."""
    rows = [json.loads(line) for line in conversations.read_text().splitlines()]
    for index, row in enumerate(rows):  # answers of 1 to 12 tokens
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": "7 " * index + "7"}]
        row["images"] = [str(conversations.parent / image) for image in row["images"]]
    path = tmp_path / "uneven.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (*PVM, "--max_steps", "2", "--learning_rate", "0.01", "--optim", "sgd", "--max_grad_norm", "0")
    flags = (*flags, "--save_strategy", "no")
    cuts = {"12": "1", "4": "3", "1": "12"}
    histories = [
        losses(
            run(
                *(base, path, tmp_path / size, *flags, "--per_device_train_batch_size", size),
                *("--gradient_accumulation_steps", steps),
            )
        )
        for size, steps in cuts.items()
    ]
    for history in histories[1:]:
        assert history == pytest.approx(histories[0], abs=1e-5)


# What it costs


def test_nothing_is_kept_below_the_first_branch(base, batch):
    """Neither in the vision tower nor in the decoder layers before it."""
    model = load_model(model_arguments(base, "pvm", pvm_layers=[2, 3])).train()
    whole = saved_bytes(model, batch)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    hooks = [torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)]
    below = [model.model.visual, *model.model.language_model.layers[:2]]
    for module in below:
        module.register_forward_pre_hook(lambda *_: hooks[0].__enter__())
        module.register_forward_hook(lambda *_: hooks[0].__exit__())
    assert saved_bytes(model, batch) == whole > 0
    assert not kept


def test_kept_for_backward_is_at_most_four_fifths_of_what_lora_keeps(base, batch):
    """At the default places of the branches; the benchmark has real shapes and times."""
    pvm, lora = (saved_bytes(load_model(model_arguments(base, method)).train(), batch) for method in ("pvm", "lora"))
    assert 0 < pvm <= 0.8 * lora


def test_logits_are_kept_at_the_labels_alone(base, batch):
    model = load_model(model_arguments(base, "pvm")).train()
    some = {**batch, "labels": batch["labels"].clone()}
    some["labels"][:, :-2] = -100
    difference = saved_bytes(model, batch) - saved_bytes(model, some)
    predicted = predictions(batch["labels"])[0].numel() - predictions(some["labels"])[0].numel()
    # The logits in float32, and their softmax.
    assert difference >= 4 * predicted * len(batch["labels"]) * model.config.text_config.vocab_size > 0


@pytest.mark.parametrize("method", ["pvm", "pvm+lora", "full"])
def test_gradient_checkpointing(base, conversations, tmp_path, method):
    flags = ("--method", method, *(PVM if "pvm" in method else ()), "--max_steps", "2", "--save_strategy", "no")
    plain = run(base, conversations, tmp_path / "plain", *flags)
    thrifty = run(base, conversations, tmp_path / "thrifty", *flags, "--gradient_checkpointing", "true")
    assert losses(thrifty) == pytest.approx(losses(plain), abs=1e-5)


# The log, and what stays as it was


def test_the_log_holds_the_gradient_of_each_branch(base, conversations, tmp_path):
    output_dir = run(base, conversations, tmp_path / "run", *PVM)
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    for entry in (entry for entry in history if "loss" in entry):
        norms = [entry[f"grad_norm/layer_{layer}"] for layer in (1, 2, 3)]
        assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(min(entry["grad_norm"], 1.0), rel=1e-3)


@pytest.mark.parametrize("method", ["pvm", "lora", "pvm+lora"])
def test_the_hash_of_what_is_frozen(base, method, tmp_path):
    model = load_model(model_arguments(base, method))
    own = PVMTrainer(model, PVMTrainingArguments(str(tmp_path), use_cpu=True), settings={"method": method})
    before = own.frozen_hash()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
        assert own.frozen_hash() == before
        next(p for name, p in model.named_parameters() if "visual.pos_embed" in name)[0, 0] += 1e-3
    assert own.frozen_hash() != before


@pytest.mark.parametrize("changed", [False, True])
def test_frozen_weights_that_changed_end_the_run_loudly_and_lose_nothing(
    base, conversations, tmp_path, monkeypatch, changed
):
    """What was trained is saved in any case, and pushed if all is well."""
    hashes, pushed = iter(["one", "another" if changed else "one"]), []
    monkeypatch.setattr(PVMTrainer, "frozen_hash", lambda self: next(hashes))
    monkeypatch.setattr(PVMTrainer, "init_hf_repo", lambda self: None)
    monkeypatch.setattr(trainer, "push", lambda folder, *args: pushed.append(folder))
    flags = ("--base_model_id", "org/base", "--push_to_hub", "true", "--hub_strategy", "end")
    message = "error: FROZEN WEIGHTS CHANGED.* is saved in"
    with pytest.raises(SystemExit, match=message) if changed else nullcontext():
        run(base, conversations, tmp_path / "run", *PVM, *flags)
    assert len(load_file(tmp_path / "run" / ADAPTER_WEIGHTS_NAME)) == 3 * 15
    assert pushed == ([] if changed else [tmp_path / "run"])


def test_liger_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="no kernels for a model with branches"):
        PVMTrainingArguments(str(tmp_path), use_cpu=True, use_liger_kernel=True)


# Blocks other than the paper's


def test_parallel_mlp_has_as_many_parameters(base):
    models = [load_model(model_arguments(base, "pvm", pvm_block=block)) for block in ("pvm", "parallel_mlp")]
    counts = [{count.part: count.trainable for count in count_parameters(model)}["branches"] for model in models]
    neuron = 3 * 32
    assert 0 <= counts[0] - counts[1] < 3 * neuron


@pytest.mark.parametrize(
    ("hidden_size", "layers", "intermediate_size", "heads"),
    [(2048, 28, 6144, 16), (2560, 36, 9728, 32), (4096, 36, 12288, 32), (5120, 64, 25600, 64)],
    ids=["2B", "4B", "8B", "32B"],
)
def test_parallel_mlp_at_real_shapes(hidden_size, layers, intermediate_size, heads):
    shape = {"hidden_size": hidden_size, "num_hidden_layers": layers, "intermediate_size": intermediate_size}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
    counts = []
    for block in ("pvm", "parallel_mlp"):
        config = Qwen3VLPVMConfig.from_stock(tiny.stock_config(shape), pvm_hidden_size=512, pvm_block=block)
        with torch.device("meta"):
            model = Qwen3VLPVMForConditionalGeneration(config)
        counts.append(sum(p.numel() for block in pvm_blocks(model).values() for p in block.parameters()))
    assert 0 <= counts[0] - counts[1] < counts[0] / 1000


def branch_calls(model, batch) -> list[tuple]:
    """Each branch with its inputs and its output in one forward pass."""
    calls = []
    for block in pvm_blocks(model).values():
        block.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs, output)))
    with torch.no_grad():
        model(**{**batch, "labels": None}, use_cache=False)
    return calls


def test_a_token_gate_starts_as_the_stock_model_and_acts_on_each_token(base, batch):
    model = load_model(model_arguments(base, "pvm", pvm_block="token_gate")).eval()
    stock = Qwen3VLForConditionalGeneration.from_pretrained(base).eval()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
        for block, (states, visual, metadata, _), branch in branch_calls(open_gates(model), batch):
            gates = 2 * block.token_gate(block.input_norm(block.text_reducer(states))).sigmoid()
            block.gate = lambda query_states, block=block: block.gate_alpha
            torch.testing.assert_close(branch, block.forward(states, visual, metadata) * gates)
            assert gates.std() > 0


@pytest.mark.parametrize(("block", "reads"), [("pvm", True), ("parallel_mlp", False)])
def test_parallel_mlp_does_not_see_the_image_where_pvm_does(base, batch, block, reads):
    model = open_gates(load_model(model_arguments(base, "pvm", pvm_block=block))).eval()
    calls = branch_calls(model, batch)
    assert len(calls) == 3
    for module, (states, visual, metadata, _), branch in calls:
        with torch.no_grad():
            blind = module.forward(states, torch.randn_like(visual), metadata)
        assert branch.abs().max() > 0
        assert torch.equal(branch, blind) != reads
        # As in PVM, a row without an image gets nothing.
        assert batch["mm_token_type_ids"][1].sum() == 0 and (branch[1] == 0).all()


def test_parallel_mlp_decodes_on_a_cache_as_without(base, batch):
    model = open_gates(load_model(model_arguments(base, "pvm", pvm_block="parallel_mlp"))).eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    modes = [{"use_cache": True}, {"use_cache": False}]
    ours = [model.generate(**inputs, do_sample=False, max_new_tokens=6, **mode).tolist() for mode in modes]
    assert ours[0] == ours[1]
    open_gates(model, 0.0)
    assert ours[0] != model.generate(**inputs, do_sample=False, max_new_tokens=6).tolist()


# From training to evaluation


@pytest.mark.parametrize(
    ("method", "block", "dtype"),
    [("pvm", "parallel_mlp", "float32"), ("pvm+lora", "pvm", "float32"), ("pvm+lora", "pvm", "bfloat16")],
)
def test_what_was_trained_is_what_is_evaluated(
    base, conversations, batch, tmp_path, monkeypatch, method, block, dtype
):
    trained = []
    train = PVMTrainer.train
    monkeypatch.setattr(
        PVMTrainer, "train", lambda self, **kwargs: (train(self, **kwargs), trained.append(self.model))
    )
    flags = ("--method", method, "--pvm_block", block, "--dtype", dtype)
    output_dir = run(base, conversations, tmp_path / "run", *PVM, *flags)
    checkpoint = load_checkpoint(str(output_dir))
    description = checkpoint.description
    assert description.method == method and description.step == 4 and description.gates_on
    assert (description.kind, description.block) == ("pvm", block)
    assert isinstance(trained[0], PeftModel) == (method == "pvm+lora")
    with torch.no_grad():
        expected = trained[0].eval()(**{**batch, "labels": None}).logits
        actual = checkpoint.model(**{**batch, "labels": None}).logits
    # An adapter does not say in which dtype its base was trained; the base on disk is float32.
    torch.testing.assert_close(actual.float(), expected.float(), atol=1e-4 if dtype == "float32" else 0.1, rtol=0)


@pytest.mark.parametrize("method", ["pvm", "lora", "pvm+lora"])
def test_a_base_in_4_bit(base, conversations, tmp_path, method):
    flags = ("--method", method, *(PVM if "pvm" in method else ()), "--load_in_4bit", "true", "--save_steps", "2")
    whole = run(base, conversations, tmp_path / "whole", *flags)
    assert all(0 < loss < 10 for loss in losses(whole)) and len(losses(whole)) == 4
    assert load_checkpoint(str(whole)).description.gates_on == (None if method == "lora" else True)
    resume = ("--resume_from_checkpoint", str(whole / "checkpoint-2"))
    assert losses(run(base, conversations, tmp_path / "resumed", *flags, *resume)) == losses(whole)


def test_4_bit_contradicts_full():
    with pytest.raises(UserError, match="--load_in_4bit is for frozen weights"):
        load_model(ModelArguments("base", method="full", load_in_4bit=True))
