"""train.py as a user sees it: what it trains, writes, resumes and refuses."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen3VLForConditionalGeneration

from configuration_qwen3vl_pvm import default_pvm_layers
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration, pvm_blocks
from pvm import train
from pvm.arguments import parse_arguments
from pvm.checkpoints.loading import load_checkpoint
from pvm.data.sources import DataArguments
from pvm.errors import UserError, ends_in_a_sentence
from pvm.training.methods import ModelArguments, load_model
from pvm.training.saving import MASTER_WEIGHTS
from pvm.training.trainer import PVMTrainer, PVMTrainingArguments
from training import PVM, ROOT, losses, run, weights


RUNS = {
    "pvm": (*PVM, "--gate_learning_rate", "0.05"),
    "pvm-bf16": (*PVM, "--dtype", "bfloat16", "--learning_rate", "1e-5"),
    "lora": ("--method", "lora", "--lora_rank", "4"),
    "pvm+lora": (*PVM, "--method", "pvm+lora", "--lora_rank", "4"),
    "full": ("--method", "full"),
}
SAVES = ("--save_steps", "2")
LAST = ("--resume_from_checkpoint", "last")


@pytest.fixture(scope="module")
def trained(base, conversations, tmp_path_factory):
    """Each of `RUNS`, made once: four steps, with a checkpoint every two."""
    folder = tmp_path_factory.mktemp("trained")

    def trained(name: str) -> Path:
        if not (folder / name).exists():
            run(base, conversations, folder / name, *RUNS[name], *SAVES)
        return folder / name

    return trained


@pytest.fixture(scope="module")
def pvm_run(trained) -> Path:
    return trained("pvm")


# What is trained


def test_pvm_trains_every_branch_parameter_and_nothing_else(base, pvm_run):
    before = Qwen3VLForConditionalGeneration.from_pretrained(base).state_dict()
    after = Qwen3VLPVMForConditionalGeneration.from_pretrained(pvm_run).state_dict()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), f"{name} was frozen and moved"
    blocks = {name for name in after if ".pvm_block." in name}
    assert len(blocks) == 3 * 15 and blocks == set(after) - set(before)
    gates = [weight for name, weight in after.items() if name.endswith("gate_alpha")]
    assert all(gate.item() != 0 for gate in gates)


@pytest.mark.parametrize("method", ["pvm", "pvm+lora"])
def test_everything_that_trains_moves(trained, method):
    """All branch and LoRA parameters; the first step only opens the gates and LoRA's B, so it takes a few."""
    first, last = weights(trained(method) / "checkpoint-2"), weights(trained(method))
    assert len(last) == 3 * 15 + (4 * 7 * 2 if method == "pvm+lora" else 0)
    assert not [name for name in last if torch.equal(first[name], last[name])]


def test_the_log_has_each_gate_with_the_loss(pvm_run):
    history = json.loads((pvm_run / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 4
    assert all({"gate/layer_1", "gate/layer_2", "gate/layer_3"} <= set(entry) for entry in steps)
    assert abs(steps[-1]["gate/layer_1"]) > 0.01  # four steps of AdamW at the gates' own rate, not the weights' 1e-3


def test_the_checkpoint_has_training_metadata(pvm_run):
    assert json.loads((pvm_run / "config.json").read_text())["text_config"]["pvm_training"] == {
        "method": "pvm",
        "step": 4,
        "base_model": None,  # a folder on this machine
        "base_revision": None,
        "image_dropout": 0.0,
    }
    config = json.loads((pvm_run / "checkpoint-2" / "config.json").read_text())
    assert config["text_config"]["pvm_training"]["step"] == 2


def test_lora_trains_adapters_of_the_language_model_only(base, trained):
    output_dir = trained("lora")
    adapter = load_file(output_dir / "adapter_model.safetensors")
    assert adapter and all(".language_model.layers." in name and ".lora_" in name for name in adapter)
    assert len(adapter) == 4 * 7 * 2  # layers x linear layers x (A, B)
    assert any(weight.abs().sum() > 0 for name, weight in adapter.items() if "lora_B" in name)
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), output_dir)
    assert model.peft_config["default"].r == 4


def test_full_trains_the_vision_tower_too(base, trained):
    before, after = (load_file(folder / "model.safetensors") for folder in (base, trained("full")))
    # Blocks of the tower, its position embedding and DeepStack's merger: what name matching tends to miss.
    for part in ("visual.blocks.0.", "visual.pos_embed", "visual.deepstack_merger_list", "language_model.layers.0."):
        names = [name for name in before if part in name]
        assert names and any(not torch.equal(before[name], after[name]) for name in names), part


def test_frozen_means_frozen(base):
    model = load_model(ModelArguments(str(base), pvm_hidden_size=32, dtype="bfloat16"))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".pvm_block." in name and p.dtype == torch.float32 for name, p in trainable.items())
    assert {p.dtype for name, p in model.named_parameters() if name not in trainable} == {torch.bfloat16}


# What is written


def test_a_checkpoint_loads_by_name_far_from_this_repository(pvm_run, tmp_path):
    """All Auto classes and the pipeline, in a fresh process that cannot import anything of ours."""
    fallback = ROOT / "pvm" / "torchvision_fallback.py"
    script = f"""
import runpy, sys
runpy.run_path({str(fallback)!r})["import_torchvision"]()
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import pipeline
assert not any("pvm" in name for name in sys.modules)
folder = {str(pvm_run)!r}
print(type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__)
print(type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)).__name__)
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    print(type(model).__name__, model.get_parameter([n for n, _ in model.named_parameters() if "gate" in n][-1]).dtype)
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
image = {{"type": "image", "image": Image.new("RGB", (32, 32))}}
message = {{"role": "user", "content": [image, {{"type": "text", "text": "Cell first alpha?"}}]}}
answer = pipe(text=[message], max_new_tokens=3, return_full_text=False)[0]["generated_text"]
print(repr(answer), type(pipe.model).__name__)
model.save_pretrained({str(tmp_path / "again")!r})
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.split("\n")
    assert lines[:2] == ["Qwen3VLPVMConfig", "Qwen3VLProcessor"]
    assert [line.split()[0] for line in lines[2:5]] == [
        "Qwen3VLPVMModel",
        "Qwen3VLPVMForConditionalGeneration",
        "Qwen3VLPVMForConditionalGeneration",
    ]
    assert lines[5].endswith("Qwen3VLPVMForConditionalGeneration")
    # What was loaded as remote code saves its code again.
    code = {path.name for path in ROOT.glob("*_qwen3vl_pvm.py")}
    assert {*code, "model.safetensors"} <= {path.name for path in (tmp_path / "again").iterdir()}
    assert set(json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
    }


def test_branches_train_in_float32_and_are_saved_in_the_backbones_dtype(trained):
    output_dir = trained("pvm-bf16")
    assert {weight.dtype for weight in weights(output_dir).values()} == {torch.bfloat16}
    masters = load_file(output_dir / "checkpoint-4" / MASTER_WEIGHTS)
    assert len(masters) == 3 * 15 and {weight.dtype for weight in masters.values()} == {torch.float32}
    # Steps of 1e-5 are far below bfloat16's resolution at the norms' 1.0; in float32 none is lost.
    norm = masters["model.language_model.layers.1.pvm_block.post_attn_norm.weight"]
    assert 0 < (norm - 1).abs().max() < 1e-4


# Resuming


@pytest.mark.parametrize("name", ["pvm", "pvm-bf16", "lora", "pvm+lora"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(base, conversations, trained, tmp_path, name):
    whole = trained(name)
    resume = ("--resume_from_checkpoint", str(whole / "checkpoint-2"))
    resumed = run(base, conversations, tmp_path / "resumed", *RUNS[name], *SAVES, *resume)
    expected, actual = weights(whole), weights(resumed)
    assert expected and all(torch.equal(expected[name], actual[name]) for name in expected)
    assert losses(resumed) == losses(whole)


def test_a_new_run_overwrites_nothing(base, conversations, pvm_run):
    with pytest.raises(UserError, match="not empty.*--resume_from_checkpoint last"):
        run(base, conversations, pvm_run, *PVM)


def test_a_finished_run_is_only_saved(base, conversations, pvm_run, tmp_path):
    """As when the final save was killed: the last checkpoint is saved as the result, and no step is made."""
    output_dir = tmp_path / "run"
    shutil.copytree(pvm_run / "checkpoint-4", output_dir / "checkpoint-4")
    run(base, conversations, output_dir, *RUNS["pvm"], *SAVES, *LAST)
    before, after = weights(pvm_run), weights(output_dir)
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-4"]
    assert load_checkpoint(str(output_dir)).description.step == 4


def test_resuming_elsewhere_overwrites_nothing(base, conversations, pvm_run, tmp_path):
    (tmp_path / "another").touch()
    with pytest.raises(UserError, match="not empty"):
        resume = ("--resume_from_checkpoint", str(pvm_run / "checkpoint-2"))
        run(base, conversations, tmp_path, *RUNS["pvm"], *SAVES, *resume)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "pvm+lora"), "that run had --method pvm, and this one has pvm.lora"),
        (("--pvm_block", "parallel_mlp"), "that run had --pvm_block None, and this one has parallel_mlp"),
        (("--pvm_layers", "1"), "that run had --pvm_layers None"),
        (("--learning_rate", "0.5"), "that run had --learning_rate 0.001"),
        (("--seed", "7"), "that run had --seed 42"),
        (("--data_seed", "7"), "that run had --data_seed None"),
        (("--max_grad_norm", "9"), "that run had --max_grad_norm 1.0"),
        (("--adam_beta2", "0.5"), "that run had --adam_beta2 0.999"),
        (("--dataset_split", "train[:6]"), "that run had --dataset_split"),
        (("--gradient_accumulation_steps", "2"), "that run had --gradient_accumulation_steps 1"),
        (("--max_steps", "1"), "is at step 2, beyond --max_steps 1"),
    ],
)
def test_a_resumed_run_is_the_same_run(base, conversations, pvm_run, tmp_path, flags, message):
    resume = ("--gate_learning_rate", "0.05", "--resume_from_checkpoint", str(pvm_run / "checkpoint-2"))
    with pytest.raises(UserError, match=message):
        run(base, conversations, tmp_path / "run", *PVM, *resume, *flags)


@pytest.fixture
def moved(base, conversations, tmp_path) -> tuple[Path, Path]:
    """Copies of base and data in other folders."""
    shutil.copytree(base, tmp_path / "moved" / "base")
    shutil.copytree(conversations.parent, tmp_path / "moved" / "data")
    return tmp_path / "moved" / "base", tmp_path / "moved" / "data" / conversations.name


@pytest.fixture
def resume(pvm_run, tmp_path):
    """Resume `pvm_run` from its second step with another base or other data."""
    flags = (*RUNS["pvm"], *SAVES, "--resume_from_checkpoint", str(pvm_run / "checkpoint-2"))
    return lambda base, conversations: run(base, conversations, tmp_path / "resumed", *flags)


def test_base_and_data_may_have_moved(moved, resume, pvm_run):
    assert losses(resume(*moved)) == losses(pvm_run)


def change_a_word(base: Path, data: Path) -> None:
    data.write_text(data.read_text().replace("Cell first alpha?", "Cell first bravo?", 1))


def remove_a_row(base: Path, data: Path) -> None:
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))


def swap_two_rows(base: Path, data: Path) -> None:
    first, second, *others = data.read_text().splitlines(keepends=True)
    data.write_text("".join([second, first, *others]))


def change_an_image(base: Path, data: Path) -> None:
    shutil.copy(data.parent / "0.png", data.parent / "1.png")


def change_a_frozen_weight(base: Path, data: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.visual.pos_embed.weight"][0, 0] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def change_the_config(base: Path, data: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] *= 2
    (base / "config.json").write_text(json.dumps(config))


def change_the_chat_template(base: Path, data: Path) -> None:
    with open(base / "chat_template.jinja", "a") as file:
        file.write("{# another #}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_a_word, r"the rows of the data differ from those of that run \(then 12 rows of \w+, now 12 rows of"),
        (remove_a_row, r"the rows of the data differ .* \(then 12 rows of \w+, now 11 rows of"),
        (swap_two_rows, "the rows of the data differ"),
        (change_an_image, "the rows of the data differ"),
        (change_a_frozen_weight, "the weights of the base differ"),
        (change_the_config, "the settings in the config.json of the base differ"),
        (change_the_chat_template, "the settings of the processor of the base differ"),
    ],
)
def test_a_resumed_run_has_the_same_base_and_data(moved, resume, change, message):
    """By content, and not by name."""
    change(*moved)
    with pytest.raises(UserError, match=f"^--resume_from_checkpoint .*checkpoint-2: {message}"):
        resume(*moved)


def test_without_a_record_of_the_content_names_are_compared(moved, base, pvm_run, tmp_path):
    """As in checkpoints of earlier versions."""
    copy = shutil.copytree(pvm_run / "checkpoint-2", tmp_path / "checkpoint-2")
    settings = json.loads((copy / "run.json").read_text())
    assert settings.pop("content")
    (copy / "run.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="that run had --dataset_name"):
        run(base, moved[1], tmp_path / "run", *RUNS["pvm"], *SAVES, "--resume_from_checkpoint", str(copy))


def test_images_that_changed_after_the_check_are_noticed(moved, resume):
    """Their names are all that a data set knows of them."""
    base, data = moved
    resume(base, data)
    change_an_image(base, data)
    shutil.rmtree(data.parent.parent.parent / "resumed")
    with pytest.raises(UserError, match="the rows of the data differ"):
        resume(base, data)


@pytest.mark.parametrize("folder", ["", "checkpoint-2"])
def test_only_whole_checkpoints_are_resumed(base, conversations, pvm_run, tmp_path, folder):
    """Not the final model, and not what --save_only_model leaves."""
    copy = shutil.copytree(pvm_run / folder, tmp_path / "checkpoint-2", ignore=shutil.ignore_patterns("sched*"))
    flags = ("--gate_learning_rate", "0.05", "--resume_from_checkpoint", str(copy))
    with pytest.raises(UserError, match=r"it has no (scheduler\.pt|run\.json)"):
        run(base, conversations, tmp_path / "run", *PVM, *flags)


@pytest.mark.parametrize("name", ["run.json", "trainer_state.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "null", '{"nonsense": 1}'])
def test_broken_checkpoints_are_not_resumed(base, conversations, pvm_run, tmp_path, name, content):
    copy = shutil.copytree(pvm_run / "checkpoint-2", tmp_path / "checkpoint-2")
    (copy / name).write_text(content)
    flags = ("--gate_learning_rate", "0.05", "--resume_from_checkpoint", str(copy))
    with pytest.raises(UserError, match=r"checkpoint-2: (its run.json or|that run had)"):
        run(base, conversations, tmp_path / "run", *PVM, *flags)


def test_a_run_without_a_step_is_an_error(base, conversations, tmp_path):
    flags = ("--num_train_epochs", "0", "--max_steps", "-1")
    with pytest.raises(UserError, match="No step was made"):
        run(base, conversations, tmp_path / "run", *PVM, *flags)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--label_smoothing_factor", "0.1"),
        ("--eval_strategy", "steps"),
        ("--hub_strategy", "all_checkpoints", "--push_to_hub", "true"),
        ("--max_steps", "0"),
        ("--do_train", "false"),
        ("--do_eval", "true"),
        ("--do_predict", "true"),
        ("--per_device_eval_batch_size", "2"),
        ("--remove_unused_columns", "true"),
        ("--ddp_find_unused_parameters", "true"),
        ("--enable_jit_checkpoint", "true"),
        ("--save_strategy", "best"),
        ("--fp16", "true"),
        ("--gradient_checkpointing_kwargs", '{"use_reentrant": true}'),
        ("--lora_rank", "4"),
        ("--lora_alpha", "4"),
        ("--method", "lora"),  # with --pvm_hidden_size
    ],
)
def test_what_would_do_something_else_is_refused(base, conversations, tmp_path, capsys, flags):
    with pytest.raises(SystemExit):
        run(base, conversations, tmp_path / "run", *PVM, *flags)
    assert flags[0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--learning_rate", "nan"), "--learning_rate/--learning-rate: invalid float value: 'nan'"),
        (("--dataset_weights", "nan", "1"), "invalid float value: 'nan'"),
        (("--learning_rate", "inf"), "invalid float value: 'inf'"),
        (
            ("--attn_implementation", "flash_attention_3"),
            "the package for FlashAttention3 doesn't seem to be installed",
        ),
        (("--learning_rate", "-1"), "--learning_rate -1.0: it cannot be negative"),
        (("--gate_learning_rate", "-1"), "--gate_learning_rate -1.0: it cannot be negative"),
        (("--max_steps", "-7"), "--max_steps -7: it cannot be negative"),
        (("--seed", "-1"), "--seed -1: it cannot be negative"),
        (("--seed", "99999999999"), "--seed: Seed must be between 0 and"),
        (("--adam_beta1", "2"), "The optimizer cannot be created: Invalid beta parameter"),
        (("--optim", "nonsense"), "--optim: invalid choice: 'nonsense'"),
        (("--optim", "lomo"), "The optimizer cannot be created: You need to install `lomo_optim`"),
        (("--lr_scheduler_type", "nonsense"), "nonsense is not a valid SchedulerType"),
        (("--lr_scheduler_type", "cosine_with_min_lr"), "schedule cannot be created: One of min_lr or min_lr_rate"),
        (("--lr_scheduler_type", "warmup_stable_decay"), "schedule cannot be created: get_wsd_schedule() missing 1"),
        (("--lr_scheduler_kwargs", "{a"), "{a is not valid JSON"),
        (("--accelerator_config", '{"nonsense": 1}'), "unexpected keyword argument 'nonsense'"),
        (("--report_to", "nonsense"), "--report_to: nonsense is not supported, only"),
        (("--report_to", "azure_ml"), "--report_to: AzureMLCallback requires azureml to be installed"),
        (("--dataloader_persistent_workers", "true"), "batched: persistent_workers option needs num_workers > 0"),
        (("--dataloader_drop_last", "true", "--max_samples", "2"), "--dataloader_drop_last: there are fewer rows"),
        (("--method", "pvm+lora", "--lora_rank", "0"), "--lora_rank and --lora_alpha must be at least 1"),
        (("--streaming", "true", "--train_sampling_strategy", "sequential"), "--train_sampling_strategy needs all"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(base, conversations, tmp_path, capsys, flags, message):
    """Whichever library finds it out."""
    with pytest.raises((UserError, SystemExit)) as refusal:
        run(base, conversations, tmp_path / "run", *PVM, *flags)
    assert message in str(refusal.value) + capsys.readouterr().err


def test_an_error_that_no_flag_made_keeps_its_traceback(base, conversations, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(PVMTrainer, "compute_loss", broken)
    with pytest.raises(ValueError, match="a bug") as error:
        run(base, conversations, tmp_path / "run", *PVM)
    assert not isinstance(error.value, UserError)


def test_what_changes_nothing_may_be_said(tmp_path):
    """As recipes for other scripts do."""
    flags = ("--do_train", "true", "--do_eval", "false", "--eval_strategy", "no", "--push_to_hub", "false")
    _, _, training = parse("--model_name_or_path", "a", "--dataset_name", "b", "--use_cpu", "true", *flags)
    assert training.eval_strategy == "no"


def test_a_push_needs_a_base_that_others_have(base, conversations, tmp_path):
    with pytest.raises(UserError, match="a local folder that nobody else has.*--base_model_id"):
        run(base, conversations, tmp_path / "run", *PVM, "--push_to_hub", "true")


def test_flags_are_not_abbreviated(capsys):
    """`--conf recipe.yaml` would be taken for --config and its recipe not be read."""
    with pytest.raises(SystemExit):
        parse("--model_name_or_path", "a", "--dataset_name", "b", "--conf", "recipe.yaml")
    assert "unknown argument --conf" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--model_name_or_path", "a", "--dataset_name", "b", "--config", "a.yaml", "--config", "b.yaml")
    assert "--config is given twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--model_name_or_path", "a", "--dataset_name", "b", "--config=a.yaml", "--config", "b.yaml")
    assert "--config is given twice" in capsys.readouterr().err


def test_last_needs_a_checkpoint(base, conversations, tmp_path):
    with pytest.raises(UserError, match="has no checkpoint"):
        run(base, conversations, tmp_path / "new", *PVM, "--resume_from_checkpoint", "last")


def ctrl_c_while_workers_answer() -> None:
    try:
        raise KeyboardInterrupt
    finally:
        raise TimeoutError


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("main", "status", "sentence"),
    [
        (lambda: fail(UserError("No such flag.")), 2, "train.py: error: No such flag.\n"),
        (lambda: fail(OSError(28, "No space left")), 1, "train.py: error: [Errno 28] No space left\n"),
        (lambda: fail(KeyboardInterrupt()), 130, "train.py: interrupted.\n"),
        (ctrl_c_while_workers_answer, 130, "train.py: interrupted.\n"),
    ],
)
def test_commands_end_in_a_sentence(capsys, main, status, sentence):
    with pytest.raises(SystemExit) as ended, ends_in_a_sentence("train.py"):
        main()
    assert (ended.value.code, capsys.readouterr().err) == (status, sentence)


def test_a_locale_that_is_not_utf8_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(SystemExit, match="2"), ends_in_a_sentence("train.py"):
        raise AssertionError
    assert "Set the environment variable PYTHONUTF8=1" in capsys.readouterr().err


# Data: see also test_data.py


def test_batches_without_an_image_train(base, conversations, tmp_path):
    """Three rows without an image before one that has one: the branches' gradients are zero, not missing."""
    rows = [json.loads(line) for line in conversations.read_text().splitlines()][:4]
    rows = [{**row, "images": []} for row in rows[:3]] + [{**rows[3], "images": [str(conversations.parent / "3.png")]}]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--max_steps", "1", "--train_sampling_strategy", "sequential")
    after = weights(run(base, tmp_path / "mixed.jsonl", tmp_path / "run", *PVM, *flags))
    gates = [weight for name, weight in after.items() if name.endswith("gate_alpha")]
    assert len(gates) == 3 and all(gate.item() == 0 for gate in gates)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_stream_whose_file_is_gone_ends_in_a_sentence(base, conversations, tmp_path, monkeypatch, workers):
    data = shutil.copytree(conversations.parent, tmp_path / "data") / conversations.name
    monkeypatch.setattr(train, "load_model", lambda arguments: (data.unlink(), load_model(arguments))[1])
    flags = (*PVM, "--streaming", "true", "--dataloader_num_workers", workers)
    with pytest.raises(UserError, match=f"^A stream cannot be read any further: .* No such file .*{data}'$"):
        run(base, data, tmp_path / "run", *flags)


def test_a_resumed_stream_has_the_same_rows(base, conversations, tmp_path):
    data = shutil.copytree(conversations.parent, tmp_path / "data") / conversations.name
    flags = (*PVM, "--streaming", "true", "--save_steps", "2")
    run(base, data, tmp_path / "run", *flags)
    resume = ("--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2"))
    resumed = run(base, conversations, tmp_path / "resumed", *flags, *resume)
    assert losses(resumed) == losses(tmp_path / "run")
    change_an_image(base, data)
    with pytest.raises(UserError, match="the rows of the data differ from those of that run"):
        run(base, data, tmp_path / "again", *flags, *resume)


# Arguments


def parse(*arguments: str) -> tuple:
    return parse_arguments((ModelArguments, DataArguments, PVMTrainingArguments), "help", list(arguments))


def parse_recipe(folder: Path, recipe: str) -> tuple:
    (folder / "recipe.yaml").write_text(recipe)
    names = ("--model_name_or_path", "base", "--dataset_name", "data", "--use_cpu", "true")
    return parse("--config", str(folder / "recipe.yaml"), *names)


def test_recipes_are_read_as_they_are_meant(tmp_path):
    """YAML 1.1 takes `no` and `off` for false, and 1e-4 for a text."""
    model, data, training = parse_recipe(
        tmp_path,
        "save_strategy: no\neval_strategy: no\nreport_to: off\nrun_name: -x\nbf16: on\nstreaming: no\n"
        "learning_rate: 1e-4\nresume_from_checkpoint: false\npvm_layers: null\ndataset_config: [no]\n"
        "lr_scheduler_kwargs: {num_cycles: 2, nested: {a: [1e-5, b]}}\nmax_steps: -1\n",
    )
    assert training.save_strategy == "no" and training.report_to == [] and training.run_name == "-x"
    assert training.bf16 is True and data.streaming is False and training.resume_from_checkpoint is None
    assert training.learning_rate == 1e-4 and training.max_steps == -1 and training.save_steps == 500
    assert training.lr_scheduler_kwargs == {"num_cycles": 2, "nested": {"a": [1e-5, "b"]}}
    assert model.pvm_layers is None and data.dataset_config == ["no"]


def test_flags_win_over_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: base\ndataset_name: data\npvm_layers: [0, 2]\nlearning_rate: 0.5\nbf16: false\n"
    )
    model, data, training = parse("--config", str(recipe), "--learning_rate", "0.25", "--output_dir", str(tmp_path))
    assert model.pvm_layers == [0, 2] and data.dataset_name == ["data"] and training.learning_rate == 0.25


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("learnin_rate: 1", r"unknown key `learnin_rate` \(did you mean --learning_rate\?\)"),
        ("- a", "must contain `field: value` lines"),
        ("a: [", "not valid YAML"),
        ("learning_rate: fast", "learning-rate: invalid float value: 'fast'"),
        ("method: prompt", "invalid choice: 'prompt'"),
        ("pvm_block: prompt", "invalid choice: 'prompt'"),
        ("train_on: off", "invalid choice: 'off'"),
        ("seed: 1\nseed: 2", "`seed` is given twice"),
        ("max_steps: 1\nmax-steps: 2", "`max-steps` is given twice"),
        ("seed:\n\t1", r"not valid YAML: .*'\\t' that cannot start any token .*line 2"),
        ("seed: {a: 1}", r"invalid int value: '{\"a\": 1}'"),
        ("config: other.yaml", "`config` belongs on the command line"),
        ("\x00", "not valid YAML"),
        ("", "must contain `field: value` lines"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, capsys, recipe, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(SystemExit):
        parse("--config", str(path), "--model_name_or_path", "a", "--dataset_name", "b")
    assert re.search(message, capsys.readouterr().err)


def test_unknown_flags_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--model_name_or_path", "a", "--dataset_name", "b", "--learnin_rate", "1")
    assert "unknown argument --learnin_rate (did you mean --learning_rate?)" in capsys.readouterr().err


# Contradictions


def test_contradictions_are_refused(base, pvm_run):
    with pytest.raises(UserError, match="--pvm_hidden_size belongs to --method pvm"):
        load_model(ModelArguments(str(base), method="lora", pvm_hidden_size=32))
    with pytest.raises(UserError, match="--pvm_block belongs to --method pvm"):
        load_model(ModelArguments(str(base), method="full", pvm_block="parallel_mlp"))
    with pytest.raises(UserError, match=r"pvm_layers = \[1, 2, 3\], which --pvm_layers \[1\] contradicts"):
        load_model(ModelArguments(str(pvm_run), pvm_layers=[1]))
    with pytest.raises(UserError, match="pvm_block = pvm, which --pvm_block token_gate contradicts"):
        load_model(ModelArguments(str(pvm_run), pvm_block="token_gate"))
    with pytest.raises(UserError, match="--dtype bfloat16 is for frozen weights"):
        load_model(ModelArguments(str(base), method="full", dtype="bfloat16"))
    with pytest.raises(UserError, match="--model_revision v2 is for Hub checkpoints"):
        load_model(ModelArguments(str(base), model_revision="v2"))
    with pytest.raises(UserError, match="starts from a stock"):
        load_model(ModelArguments(str(pvm_run), method="lora"))


def test_an_incomplete_backbone_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "part")
    weights = load_file(base / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".layers.2.mlp." not in name}
    save_file(kept, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    for method in ("pvm", "lora", "full"):
        with pytest.raises(UserError, match="lacks 3 (of its model.s )?weights"):
            load_model(ModelArguments(str(tmp_path / "part"), method=method))


def test_a_learning_rate_for_gates_needs_gates(base, conversations, tmp_path):
    with pytest.raises(UserError, match="--gate_learning_rate belongs to --method pvm"):
        run(base, conversations, tmp_path / "run", "--method", "lora", "--gate_learning_rate", "0.1")


def test_training_goes_on_from_a_pvm_checkpoint(pvm_run):
    model = load_model(ModelArguments(str(pvm_run)))
    stored = weights(pvm_run)
    for layer_idx, block in pvm_blocks(model).items():
        gate = stored[f"model.language_model.layers.{layer_idx}.pvm_block.gate_alpha"]
        assert torch.equal(block.gate_alpha.detach(), gate) and gate.item() != 0


# Recipes that ship


# Of train.py; recipes of evaluations, studies and GRPO are tested with them.
RECIPES = [
    path
    for path in sorted((ROOT / "recipes").glob("*.yaml"))
    if {"eval", "study", "variants", "grpo"}.isdisjoint(path.stem.split("_"))
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_understood(recipe):
    flags = ["--config", str(recipe), "--use_cpu", "true"]
    flags += [] if "\ndataset_name:" in recipe.read_text() else ["--dataset_name", "mine"]
    model, _, training = parse(*flags)
    if "sft" in recipe.stem:  # the paper's 64 conversations a step on 8 GPUs, and places that fit the shape
        assert 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 64
        assert (training.learning_rate, training.lr_scheduler_type, training.warmup_steps) == (1e-4, "cosine", 0.1)
        shape = {"2b": (2048, 28), "4b": (2560, 36), "8b": (4096, 36), "32b": (5120, 64)}[recipe.stem.split("_")[2]]
        assert model.pvm_layers == default_pvm_layers(*shape)


@pytest.mark.parametrize(
    "config", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_understands_its_configs(config):
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    kinds = {"ddp": arguments.multi_gpu, "fsdp2": arguments.use_fsdp, "zero2": arguments.use_deepspeed}
    assert kinds.get(config.stem, arguments.use_deepspeed) and arguments.num_processes == 8
    assert config.stem[:4] != "zero" or arguments.zero_stage == int(config.stem[4])


# The structure


def imports(module: str) -> set[str]:
    """The modules that the source of one of ours imports anywhere; none for a module of others."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names = {module.rpartition(".")[0]} - {""}
    for node in ast.walk(ast.parse(path.read_text())) if path.is_file() else ():
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_nothing_that_trains_imports_evaluation_or_matplotlib():
    found, new = set(), {"train"}
    while new:
        found |= new
        new = {name for module in new for name in imports(module)} - found
    assert {"pvm.training.trainer", "pvm.checkpoints.card", "pvm.data.encoding", "torch"} <= found
    assert not {name for name in found if name.startswith(("pvm.evaluation", "matplotlib"))}
