"""grpo.py as a user sees it: what it trains, samples, writes, resumes and refuses."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LogitsProcessor

import eval as eval_script
import grpo
import tiny
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.arguments import parse_arguments
from pvm.checkpoints import inspect
from pvm.checkpoints.loading import load_checkpoint
from pvm.checkpoints.record import read_record
from pvm.data.sources import DataArguments
from pvm.errors import UserError
from pvm.evaluation import card as card_module
from pvm.rl import trainer as trainer_module
from pvm.rl.policy import PolicyArguments, load_policy
from pvm.rl.rewards import format_reward, load_rewards
from pvm.rl.rollouts import SampledLogProbs
from pvm.rl.trainer import GRPOArguments
from pvm.training.saving import MASTER_WEIGHTS
from pvm.vllm.placeholders import collapsed
from training import ROOT, run, weights


FLAGS = (
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--num_generations", "4"),
    *("--max_completion_length", "5", "--mask_truncated_completions", "false", "--learning_rate", "1e-3"),
    *("--max_steps", "2", "--logging_steps", "1", "--save_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true"),
)
DIFFERENCE = "sampling/sampling_logp_difference/mean"


@pytest.fixture(scope="module")
def rewards(tmp_path_factory) -> str:
    """A user's reward, which an untrained model can earn."""
    file = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    file.write_text(
        "def letters(completions, answer, **kwargs):\n"
        "    assert len(answer) == len(completions) == len(kwargs['images'])\n"
        "    return [float(sum(letter in 'aeiou02468' for letter in c[0]['content'])) for c in completions]\n"
        "\n\ndef one_for_all(completions, **kwargs):\n    return [1.0]\n"
        "\n\ndef broken(completions, **kwargs):\n    return kwargs['colour']\n"
    )
    return str(file)


@pytest.fixture(scope="module")
def starts(base, conversations, tmp_path_factory) -> dict[str, Path]:
    """What the first stage leaves: branches with open gates, a LoRA adapter, and a whole stock model."""
    folder = tmp_path_factory.mktemp("first_stage")
    for method in ("pvm", "lora"):
        flags = ("--pvm_hidden_size", "32") if method == "pvm" else ("--lora_rank", "4")
        run(base, conversations, folder / method, "--method", method, *flags)
    file = folder / "pvm" / "model.pvm.safetensors"
    branches = load_file(file)
    for name in branches:
        if name.endswith("gate_alpha"):
            branches[name].fill_(0.3)
    save_file(branches, file, metadata={"format": "pt"})
    return {"pvm": folder / "pvm", "lora": folder / "lora", "stock": base}


@pytest.fixture(scope="module")
def run_grpo(starts, conversations, rewards):
    def run_grpo(output_dir: Path, start: str, *flags: str) -> Path:
        own = (
            ()
            if "--reward_functions" in flags
            else ("--reward_functions", f"{rewards}:letters", "--reward_weights", "1")
        )
        names = ("--model_name_or_path", starts[start], "--dataset_name", conversations, "--output_dir", output_dir)
        grpo.main([*map(str, names), *FLAGS, *own, *flags])
        return output_dir

    return run_grpo


def history(folder: Path) -> list[dict]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


# What is trained

TRAINS = {
    "language_model+branches": "pvm",
    "branches": "pvm",
    "branches+lora": "pvm",
    "language_model": "stock",
    "lora": "lora",
}


@pytest.fixture(scope="module")
def trained(run_grpo, tmp_path_factory):
    """A run of each kind, made once."""
    folder = tmp_path_factory.mktemp("second_stage")

    def trained(trains: str) -> Path:
        if not (folder / trains).exists():
            run_grpo(folder / trains, TRAINS[trains], "--trains", trains)
        return folder / trains

    return trained


@pytest.mark.parametrize("trains", TRAINS)
def test_what_trains_moves_and_nothing_else(trained, starts, trains):
    old, new = (
        {
            name.replace(".base_layer", ""): weight
            for name, weight in load_checkpoint(str(folder)).plain_model.state_dict().items()
            if ".lora_" not in name
        }
        for folder in (starts[TRAINS[trains]], trained(trains))
    )
    assert old.keys() == new.keys()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    branches = {name for name in old if ".pvm_block." in name}
    adapted = {name for name in old if ".language_model.layers." in name and name.endswith("_proj.weight")} - branches
    whole = {name for name in old if ".visual." not in name}
    expected = {
        "language_model+branches": whole,
        "branches": branches,
        "branches+lora": branches | adapted,
        "language_model": whole,
        "lora": adapted,
    }[trains]
    assert moved == expected
    log = history(trained(trains))
    assert len(log) == 2 and all(0 <= entry[DIFFERENCE] < 1e-4 for entry in log)
    assert any(entry["reward_std"] > 0 for entry in log)
    assert ("gate/layer_1" in log[-1]) == ("branches" in trains)


@pytest.mark.parametrize("trains", TRAINS)
def test_checkpoints_hold_what_was_trained(trained, base, trains):
    """Adapters where the language model is frozen, whole models where it is not."""
    folder = trained(trains)
    names = {path.name for path in (folder / "checkpoint-1").glob("*.safetensors")} - {MASTER_WEIGHTS}
    if trains == "lora":
        assert names == {"adapter_model.safetensors"}
        assert PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), folder)
        arguments = read_record(folder)["arguments"]
        assert (arguments["lora_rank"], arguments["lora_alpha"]) == (4, 32)  # the first stage's
    elif trains.startswith("language_model"):
        assert names == {"model.safetensors"}
        assert {name.partition(".")[0] for name in load_file(folder / "model.safetensors")} == {"model", "lm_head"}
    else:
        assert names == {"model.pvm.safetensors"}
        assert (folder / "lora" / "adapter_model.safetensors").is_file() == ("lora" in trains)
    if "branches" in trains:
        config = Qwen3VLPVMConfig.from_pretrained(folder)
        assert (config.base_model_name_or_path is None) == trains.startswith("language_model")
        training = config.text_config.pvm_training
        assert (training["stage"], training["method"], training["step"]) == ("grpo", trains, 2)
        assert (training["previous"]["method"], training["previous"]["step"]) == ("pvm", 4)


def test_record_card_and_inspection_know_both_stages(trained, capsys):
    record = read_record(trained("branches"))
    assert (record["stage"], record["previous"]["stage"]) == ("grpo", "sft")
    assert record["last_reward"] == history(trained("branches"))[-1]["reward"]
    assert record["arguments"]["reward_functions"] == ["my_rewards.py:letters"]  # without the path of this machine
    card = (trained("branches") / "README.md").read_text()
    assert "Stage 1, supervised fine-tuning:" in card and "Stage 2, GRPO:" in card
    assert card.index("Stage 1") < card.index("Stage 2") < card.index("## Results")
    inspect.main([str(trained("branches"))])
    stages = [line.split()[-2] for line in capsys.readouterr().out.splitlines() if line.startswith("│ stage ")]
    assert stages == ["sft", "grpo"]


def test_float32_branches_over_a_bfloat16_model(run_grpo, tmp_path):
    folder = run_grpo(
        tmp_path / "run", "pvm", "--trains", "branches", "--dtype", "bfloat16", "--bf16", "true", "--max_steps", "1"
    )
    assert {weight.dtype for weight in weights(folder).values()} == {torch.bfloat16}
    masters = load_file(folder / "checkpoint-1" / MASTER_WEIGHTS)
    assert masters and {weight.dtype for weight in masters.values()} == {torch.float32}
    assert history(folder)[0][DIFFERENCE] < 0.02  # rollouts and trainer compute in the same precision


@pytest.mark.parametrize("trains", TRAINS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run_grpo, trained, tmp_path, trains):
    whole = trained(trains)
    flags = ("--trains", trains, "--resume_from_checkpoint", str(whole / "checkpoint-1"))
    resumed = run_grpo(tmp_path / "resumed", TRAINS[trains], *flags)
    expected, actual = weights(whole), weights(resumed)
    assert expected and expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
    first = weights(whole / "checkpoint-1")
    assert any(not torch.equal(first[name], actual[name]) for name in first), "the second step changed something"
    assert [entry["reward"] for entry in history(resumed)] == [entry["reward"] for entry in history(whole)]


def test_prompts_with_and_without_images(run_grpo, tmp_path):
    """In one generation batch, and in micro-batches of one row; all twelve rows are seen, two of them without."""
    flags = ("--trains", "branches", "--max_steps", "6", "--save_steps", "6")
    flags += ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8")
    log = history(run_grpo(tmp_path / "run", "pvm", *flags))
    assert len(log) == 6 and all(0 <= entry[DIFFERENCE] < 1e-4 for entry in log)


def test_dry_run(starts, conversations, tmp_path, capsys):
    names = ("--model_name_or_path", starts["pvm"], "--dataset_name", conversations, "--output_dir", tmp_path / "run")
    grpo.main([*map(str, names), *FLAGS, "--dry_run", "true"])
    printed = capsys.readouterr().out
    context = Qwen3VLPVMConfig.from_pretrained(starts["pvm"]).text_config.max_position_embeddings
    assert f"A prompt may have {context - 5:,} tokens, and a completion 5." in printed
    assert "A training would continue from here." in printed
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"dry_run.json"}


# Sampling


class Untouched(LogitsProcessor):
    """In the place of the processor that excludes placeholders."""

    def __init__(self, *args):
        pass

    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize("excluded", [True, False])
def test_placeholders_are_never_sampled(run_grpo, starts, tmp_path, monkeypatch, excluded):
    """By a model that would write little else; and without the exclusion, the check of the rollouts says so."""
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(starts["pvm"])
    placeholders = [model.config.image_token_id, model.config.video_token_id]
    states = torch.randn(4096, model.config.text_config.hidden_size)
    with torch.no_grad():  # for any state, one of the two has the largest logit
        direction = 100 * torch.nn.functional.normalize(states.mean(dim=0), dim=0)
        model.lm_head.weight[placeholders] = torch.stack([direction, -direction])
    model.save_pretrained(tmp_path / "start")
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        shutil.copy(starts["pvm"] / name, tmp_path / "start")
    starts["placeholders"] = tmp_path / "start"
    flags = ("--trains", "branches", "--max_steps", "1", "--max_sampling_difference", "1e9")
    if excluded:
        assert history(run_grpo(tmp_path / "run", "placeholders", *flags))
        return
    monkeypatch.setattr(trainer_module, "SuppressTokensLogitsProcessor", Untouched)
    with pytest.raises(RuntimeError, match="wrote a placeholder of an image"):
        run_grpo(tmp_path / "run", "placeholders", *flags)


def test_another_model_in_the_rollouts_stops_the_run(run_grpo, tmp_path, monkeypatch):
    finish = SampledLogProbs.finish
    monkeypatch.setattr(SampledLogProbs, "finish", lambda self, sequences: finish(self, sequences) - 0.01)
    with pytest.raises(UserError, match="Rollouts and trainer do not compute the same: .* by 0.01 on average"):
        run_grpo(tmp_path / "run", "pvm", "--trains", "branches")


def test_vllm_gets_one_placeholder_per_image(run_grpo, starts, tmp_path, monkeypatch):
    """vLLM itself runs in another environment; here something else answers in its place."""
    placeholder = Qwen3VLPVMConfig.from_pretrained(starts["pvm"]).image_token_id
    seen = []

    class Engine:
        def __init__(self, model, *args, generation_kwargs, **kwargs):
            self.generation_kwargs = generation_kwargs or {}

        def sync_weights(self):
            pass

        def generate(self, prompts, images, num_generations, profiler):
            seen.extend(zip(prompts, images))
            seen.append(self.generation_kwargs)
            return None, [[7, 8, 9]] * len(prompts), [[[-7.0]] * 3] * len(prompts), None

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    flags = ("--trains", "branches", "--use_vllm", "true", "--max_sampling_difference", "100", "--max_steps", "1")
    log = history(run_grpo(tmp_path / "run", "pvm", *flags))
    *prompts, kwargs = seen
    assert {ids.count(placeholder) for ids, images in prompts if images} == {1}
    assert kwargs["logit_bias"][placeholder] == -100
    assert log[0][DIFFERENCE] > 0.001


def test_collapsed():
    assert collapsed([1, 9, 9, 9, 2, 2, 9, 3], placeholder=9) == [1, 9, 2, 2, 9, 3]


# Rewards


@pytest.mark.parametrize(
    "text, reward",
    [
        ("<think>Two and two.</think><answer>4</answer>", 1),
        (" <think>\nTwo\n</think>\n\n<answer>\n4</answer>\n", 1),
        ("<think></think><answer>4</answer>", 1),
        ("<answer>4</answer>", 0),
        ("<think>Two</think>4", 0),
        ("<think>Two</think><answer>4</answer> Yes.", 0),
        ("<think>Two<think></think><answer>4</answer>", 0),
        ("<think>Two</think><answer>4</answer><answer>5</answer>", 0),
        ("<answer>4</answer><think>Two</think>", 0),
    ],
)
def test_format(text, reward):
    assert format_reward([[{"role": "assistant", "content": text}]]) == [reward]


@pytest.mark.parametrize(
    "text, reward",
    [("7", 1), ("8", 0), ("<think>8 or 7</think><answer>7</answer>", 1), ("<think>7</think><answer>8</answer>", 0)],
)
def test_accuracy_counts_the_answer(text, reward):
    (accuracy,) = load_rewards(["accuracy_reward"], "number")
    assert accuracy([[{"role": "assistant", "content": text}]], answer=["7"]) == [reward]


def test_the_papers_reward_is_the_default():
    arguments = GRPOArguments(output_dir="unused", use_cpu=True)
    assert dict(zip(arguments.reward_functions, arguments.reward_weights)) == {
        "accuracy_reward": 0.9,
        "format_reward": 0.1,
    }
    assert (arguments.learning_rate, arguments.lr_scheduler_type, arguments.beta) == (1e-6, "constant", 0)
    assert (arguments.num_generations, arguments.temperature, arguments.mask_truncated_completions) == (8, 1, True)


# What is refused


@pytest.mark.parametrize(
    "start, flags, message",
    [
        ("stock", ("--trains", "branches"), "starts from PVM branches that were trained"),
        ("lora", ("--trains", "language_model"), "is a PEFT adapter, which --trains lora trains further"),
        ("lora", ("--trains", "lora", "--lora_rank", "8"), "is trained further. Leave out --lora_rank"),
        ("pvm", ("--max_completion_length", "999999"), "leaves no room for a prompt in a context of"),
        ("pvm", ("--max_length", "6"), "more than max_length 6"),
        ("pvm", ("--streaming", "true", "--max_steps", "1"), "are for `pvm train`"),
        ("pvm", ("--match", "choice", "--max_skipped", "0"), "is not an option"),
        ("pvm", ("--reward_functions", "no.py:f", "--reward_weights", "1"), "name accuracy_reward"),
        ("pvm", ("--reward_functions", "{}:f", "--reward_weights", "1"), "has no function 'f'"),
        ("pvm", ("--reward_functions", "{}:one_for_all", "--reward_weights", "1"), "not two numbers"),
        ("pvm", ("--reward_functions", "{}:broken", "--reward_weights", "1"), "KeyError: 'colour'"),
    ],
)
def test_refused(run_grpo, rewards, tmp_path, start, flags, message):
    with pytest.raises(UserError, match=message):
        run_grpo(tmp_path / "run", start, *(flag.format(rewards) for flag in flags))


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--beta", "0.1"), "no reference model"),
        (("--top_p", "0.9"), "sampled from the distribution that is trained"),
        (("--num_iterations", "2"), "every step samples its own completions"),
        (("--image_dropout", "0.5"), "self-attention must see the image"),
        (("--reward_weights", "1", "2", "3"), "give one for each"),
        (("--dtype", "bfloat16"), "trains the language model in float32"),
        (("--num_generations", "3"), "must be divisible by num_generations"),
        (("--pvm_layers", "1"), "unknown argument"),
        (("--load_in_4bit", "true"), "unknown argument"),
        (("--trains", "everything"), "invalid choice"),
    ],
)
def test_refused_flags(run_grpo, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        run_grpo(tmp_path / "run", "pvm", "--reward_functions", "accuracy_reward", "format_reward", *flags)
    assert message in capsys.readouterr().err


def test_completions_that_would_never_end_are_refused(run_grpo, starts, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(starts["pvm"], start, ignore=shutil.ignore_patterns("checkpoint-*"))
    for name, key, value in (
        ("generation_config.json", "eos_token_id", 5),
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
    ):
        fields = json.loads((start / name).read_text())
        (start / name).write_text(json.dumps({**fields, key: value}))
    starts["endless"] = start
    with pytest.raises(UserError, match="no completion would end"):
        run_grpo(tmp_path / "run", "endless", "--trains", "branches")


def test_without_trl_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match="pip install"):
        runpy.run_path(trainer_module.__file__)


def test_frozen_means_frozen(starts):
    model = load_policy(PolicyArguments(str(starts["pvm"])))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".visual." in name}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model = load_policy(PolicyArguments(str(starts["pvm"]), trains="branches", dtype="bfloat16"))
    trainable = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 3 * 15 and set(trainable.values()) == {torch.float32}
    assert len(tiny.branches(model)) == 3


# Recipes and the pipeline


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*_grpo.yaml")), ids=lambda path: path.stem)
def test_recipes_are_understood(recipe):
    flags = ["--config", str(recipe), "--use_cpu", "true"]
    flags += [] if "\ndataset_name:" in recipe.read_text() else ["--dataset_name", "mine", "--use_vllm", "false"]
    policy, _, training = parse_arguments((PolicyArguments, DataArguments, GRPOArguments), "", flags)
    first = ROOT / "recipes" / recipe.name.replace("_grpo", "_pvm" if "digits" in recipe.stem else "_sft")
    assert f"output_dir: {policy.model_name_or_path}\n" in first.read_text()
    if "qwen3" in recipe.stem:  # the paper's 64 completions a step on 8 GPUs
        assert 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 64
        assert (training.num_generations, training.max_completion_length, policy.trains) == (
            8,
            16_384,
            "language_model+branches",
        )


def test_the_pipeline(base, starts, conversations, tmp_path, monkeypatch):
    """The commands of `make pipeline` after the first stage, with its recipes, on other data."""
    monkeypatch.chdir(tmp_path)
    made = subprocess.run(["make", "-n", "-C", ROOT, "pipeline"], capture_output=True, text=True, check=True).stdout
    for command in ("grpo.py --config recipes/digits_grpo.yaml", "eval.py --config recipes/digits_pipeline_eval.yaml"):
        assert command in made
    file = conversations.with_name("tasks.jsonl")
    rows = [{**json.loads(line), "task": "cell"} for line in conversations.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, first, second = str(file), str(starts["pvm"]), str(tmp_path / "runs" / "digits_grpo")
    config = ["--config", str(ROOT / "recipes" / "digits_grpo.yaml")]
    less = [
        "--max_steps",
        "1",
        "--save_steps",
        "1",
        "--per_device_train_batch_size",
        "8",
        "--max_completion_length",
        "4",
    ]
    grpo.main([*config, "--model_name_or_path", first, "--dataset_name", data, "--output_dir", second, *less])
    config = ["--config", str(ROOT / "recipes" / "digits_pipeline_eval.yaml"), "--model", str(base), first, second]
    names = ["--dataset_name", data, "--dataset_split", "train", "--output_dir", "runs/eval"]
    eval_script.main([*config, *names, "--max_samples", "4"])
    card_module.main([second, "--report", "runs/eval/report.json"])
    card = Path(second, "README.md").read_text()
    assert "Stage 2, GRPO:" in card and "PVM+GRPO" in card.partition("## Results")[2]
