"""
Train a PVM checkpoint further with rewards: the second stage, GRPO, on trl.

The demo, after `pvm train --config recipes/digits_pvm.yaml`:

    pvm grpo --config recipes/digits_grpo.yaml

The paper's stage, on rows with `prompt`, `images` and `answer`:

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m pvm grpo \\
        --config recipes/qwen3_vl_8b_grpo.yaml --dataset_name my_questions.jsonl

What a completion is worth: 0.9 for a correct answer (`--match math`, as in `pvm eval`), 0.1 for the format
`<think>...</think><answer>...</answer>`; or functions of your own: `--reward_functions my_rewards.py:brevity
--reward_weights 1`.

`--trains branches` trains the branches only, in any frozen model. Controls: `--trains language_model` or `lora`, from
a checkpoint without branches. `--dry_run true` only checks the data; `--resume_from_checkpoint last` continues an
interrupted run. docs/recipe.md has the whole pipeline.
"""

from pathlib import Path
from typing import Any

from transformers import ProcessorMixin, set_seed

from pvm.arguments import parse_arguments
from pvm.checkpoints.loading import processor_of
from pvm.data.encoding import ConversationDataset
from pvm.data.sources import DataArguments
from pvm.data.validation import load_training_data
from pvm.errors import UserError, user_errors
from pvm.rl.policy import PolicyArguments, base_arguments, load_policy, policy_config, policy_settings
from pvm.rl.prompts import PromptCheck, as_prompts, longest_prompt
from pvm.rl.rewards import RewardFunction, check_rewards, code_of_rewards, load_rewards
from pvm.rl.trainer import VLLM_IMAGE_TOKENS, GRPOArguments, PVMGRPOTrainer, check_ends, grpo_settings
from pvm.terminal import Terminal
from pvm.training.resume import base_fingerprints, check_content, find_checkpoint, run_settings
from pvm.training.run import check_push, parameter_table, train_and_save
from pvm.training.saving import locked_on_main_process


def main(arguments: list[str] | None = None) -> None:
    policy_args, data_args, training_args = parse_arguments(
        (PolicyArguments, DataArguments, GRPOArguments), __doc__, arguments, "pvm grpo"
    )
    console = Terminal(quiet=training_args.process_index > 0)
    config = policy_config(policy_args)  # refuse what does not fit before going through the data
    if data_args.streaming or data_args.train_on != "all":
        raise UserError("--streaming and --train_on are for `pvm train`. Leave them out.")
    window = training_args.vllm_max_model_length if training_args.use_vllm else None
    completion = training_args.max_completion_length
    data_args.max_length = longest_prompt(config, data_args.max_length, completion, window)
    console.print(f"A prompt may have {data_args.max_length:,} tokens, and a completion {completion:,}.")
    reward_functions = load_rewards(training_args.reward_functions, training_args.match)
    settings = run_settings(policy_args, data_args, training_args)
    settings |= grpo_settings(training_args) | policy_settings(policy_args)
    if not policy_args.trains_language_model:
        check_push(training_args, settings["base_model"])
    with user_errors("--seed"):
        set_seed(training_args.seed)
    processor = processor_of(policy_args.model_name_or_path, policy_args.model_revision)
    if data_args.dry_run:
        load_prompts(policy_args, data_args, training_args, processor, console)
        return
    with locked_on_main_process(Path(training_args.output_dir), training_args.process_index == 0):
        train(policy_args, data_args, training_args, settings, reward_functions, processor, console)


def load_prompts(
    policy_args: PolicyArguments,
    data_args: DataArguments,
    training_args: GRPOArguments,
    processor: ProcessorMixin,
    console: Terminal,
) -> ConversationDataset | None:
    """The rows, each of them checked; `None` after a dry run."""
    is_colocated = training_args.use_vllm and training_args.vllm_mode == "colocate"
    check = PromptCheck(
        training_args.match, VLLM_IMAGE_TOKENS if is_colocated else None, processor.image_processor.merge_size
    )
    return load_training_data(
        data_args, training_args, processor, policy_args.has_branches, console, prompt_only=True, check=check
    )


def train(
    policy_args: PolicyArguments,
    data_args: DataArguments,
    training_args: GRPOArguments,
    settings: dict[str, Any],
    reward_functions: list[RewardFunction],
    processor: ProcessorMixin,
    console: Terminal,
) -> None:
    """
    A run, from the check of its data to its result in the output folder, which nobody else may write into meanwhile.

    Args:
        settings (`dict[str, Any]`): of [`run_settings`], [`grpo_settings`] and [`policy_settings`].
    """
    checkpoint = find_checkpoint(training_args, settings)
    settings["content"] = content = base_fingerprints(base_arguments(policy_args), processor)
    check_content(checkpoint, content)
    dataset = load_prompts(policy_args, data_args, training_args, processor, console)
    content["the rows of the data"] = dataset.fingerprint
    content["the files of the reward functions"] = code_of_rewards(training_args.reward_functions)
    check_content(checkpoint, content)
    prompts = as_prompts(dataset.conversations)
    check_rewards(reward_functions, training_args.reward_functions, prompts[0])
    model = load_policy(policy_args)
    check_ends(model.generation_config.eos_token_id, processor.tokenizer)
    console.print(parameter_table(model))
    processor.tokenizer.padding_side = "left"  # trl pads prompts with it
    with user_errors("The training cannot be set up"):
        trainer = PVMGRPOTrainer(
            settings=settings,
            model=model,
            reward_funcs=reward_functions,
            args=training_args,
            train_dataset=prompts,
            processing_class=processor,
        )
    train_and_save(trainer, checkpoint, "pvm grpo", policy_args.model_name_or_path, console)
