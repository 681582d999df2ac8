"""trl's trainers take a PVM checkpoint as it is."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import tiny
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration, pvm_blocks
from pvm.training.methods import ModelArguments, load_model


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory) -> Path:
    """A PVM checkpoint with open gates, and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = load_model(ModelArguments(str(base), pvm_hidden_size=32))
    tiny.set_gates(model, 0.3)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


def load(checkpoint: Path) -> Qwen3VLPVMForConditionalGeneration:
    """What AutoModelForImageTextToText gives, with nothing but the branches to train."""
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(checkpoint)
    model.requires_grad_(False)
    for block in pvm_blocks(model).values():
        block.requires_grad_(True)
    return model


def rows(**columns) -> Dataset:
    images = [[Image.effect_noise((32, 32), 90).convert("RGB")] for _ in range(4)]
    prompt = [[{"role": "user", "content": "Cell first alpha?"}]] * 4
    return Dataset.from_dict({"images": images, "prompt": prompt, **columns})


def arguments(config_class, folder: Path, **fields):
    return config_class(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-2,
        warmup_steps=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=True,
        report_to="none",
        disable_tqdm=True,
        **fields,
    )


def assert_branches_alone_moved(model, checkpoint: Path):
    before = Qwen3VLPVMForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    after = model.state_dict()
    assert before.keys() == after.keys()
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved == {name for name in before if ".pvm_block." in name}


def test_sft(checkpoint, tmp_path):
    completion = [[{"role": "assistant", "content": str(digit)}] for digit in (1, 2, 3, 4)]
    trainer = SFTTrainer(
        model=load(checkpoint),
        args=arguments(SFTConfig, tmp_path / "run", max_length=None),
        train_dataset=rows(completion=completion),
        processing_class=AutoProcessor.from_pretrained(checkpoint),
    )
    trainer.train()
    assert_branches_alone_moved(trainer.model, checkpoint)
    trainer.save_model()
    again = Qwen3VLPVMForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in trainer.model.state_dict().items())
    assert (tmp_path / "run" / "modeling_qwen3vl_pvm.py").is_file()


def test_sft_loads_it_by_name(checkpoint, tmp_path):
    """With trust_remote_code, everything trains, as trl does it for any model."""
    completion = [[{"role": "assistant", "content": str(digit)}] for digit in (1, 2, 3, 4)]
    trainer = SFTTrainer(
        model=str(checkpoint),
        args=arguments(
            SFTConfig,
            tmp_path / "run",
            max_length=None,
            model_init_kwargs={"trust_remote_code": True, "dtype": "float32"},
        ),
        train_dataset=rows(completion=completion),
    )
    assert type(trainer.model).__name__ == "Qwen3VLPVMForConditionalGeneration"
    gates = [p.clone() for name, p in trainer.model.named_parameters() if name.endswith("gate_alpha")]
    trainer.train()
    after = [p for name, p in trainer.model.named_parameters() if name.endswith("gate_alpha")]
    assert len(gates) == 3 and all(not torch.equal(before, now) for before, now in zip(gates, after))


def test_grpo(checkpoint, tmp_path):
    seen = []

    def length(completions, **kwargs):
        seen.extend(completions)
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = GRPOTrainer(
        model=load(checkpoint),
        args=arguments(GRPOConfig, tmp_path / "run", num_generations=2, max_completion_length=6, temperature=1.0),
        train_dataset=rows(),
        reward_funcs=length,
        processing_class=AutoProcessor.from_pretrained(checkpoint),
    )
    trainer.train()
    assert len(seen) == 4
    moved = trainer.model.state_dict()
    before = load(checkpoint).state_dict()
    assert all(torch.equal(before[name], moved[name]) for name in before if ".pvm_block." not in name)
    rewards = [entry["reward_std"] for entry in trainer.state.log_history if "reward_std" in entry]
    # Where all answers were as good as each other there is nothing to learn.
    gates = [name for name in before if name.endswith("gate_alpha")]
    assert any(rewards) == any(not torch.equal(before[name], moved[name]) for name in gates)
    assert any(rewards)
