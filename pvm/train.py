"""
Train Persistent Visual Memory (PVM) branches in a frozen Qwen3-VL, or a control to compare them with.

The demo (real handwritten digits and a tiny Qwen3-VL; no GPU, no network):

    pvm train --config recipes/digits_pvm.yaml
    pvm train --config recipes/digits_pvm.yaml --seed 1 --output_dir runs/digits_pvm_seed1

A real model and your own conversations (files, folders or Hub names; docs/data.md shows the supported formats):

    pvm train --model_name_or_path Qwen/Qwen3-VL-8B-Instruct --dataset_name my_data.jsonl --bf16 true \\
        --output_dir runs/qwen3-vl-8b-pvm

`--dry_run true` only checks the data and shows statistics; no model is loaded.

Controls: add `--method lora`, `--method full`, or `--pvm_block parallel_mlp` (branches of the same size that do not
see the image). Several GPUs: `accelerate launch --config_file recipes/accelerate/ddp.yaml -m pvm train ...`. To resume
an interrupted run, add `--resume_from_checkpoint last`. All of transformers' TrainingArguments are accepted except
those that would have no effect; they are refused with the reason.
"""

from pathlib import Path
from typing import Any

from transformers import ProcessorMixin, set_seed

from pvm.arguments import parse_arguments
from pvm.checkpoints.loading import load_processor
from pvm.data.encoding import ConversationCollator
from pvm.data.sources import DataArguments
from pvm.data.validation import load_training_data
from pvm.errors import user_errors
from pvm.terminal import Terminal
from pvm.training.methods import ModelArguments, load_model, model_config
from pvm.training.resume import base_fingerprints, check_content, find_checkpoint, run_settings
from pvm.training.run import check_push, parameter_table, train_and_save
from pvm.training.saving import locked_on_main_process
from pvm.training.trainer import PVMTrainer, PVMTrainingArguments


def main(arguments: list[str] | None = None) -> None:
    model_args, data_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, PVMTrainingArguments), __doc__, arguments, "pvm train"
    )
    console = Terminal(quiet=training_args.process_index > 0)
    model_config(model_args)  # refuse what does not fit before going through the data
    settings = run_settings(model_args, data_args, training_args)
    check_push(training_args, settings["base_model"])
    with user_errors("--seed"):
        set_seed(training_args.seed)
    processor = load_processor(model_args.model_name_or_path, model_args.model_revision)
    if data_args.dry_run:
        load_training_data(data_args, training_args, processor, model_args.has_branches, console)
        return
    with locked_on_main_process(Path(training_args.output_dir), training_args.process_index == 0):
        train(model_args, data_args, training_args, settings, processor, console)


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: PVMTrainingArguments,
    settings: dict[str, Any],
    processor: ProcessorMixin,
    console: Terminal,
) -> None:
    """
    A run, from the check of its data to its result in the output folder, which nobody else may write into meanwhile.

    Args:
        settings (`dict[str, Any]`): [`run_settings`].
    """
    checkpoint = find_checkpoint(training_args, settings)
    settings["content"] = content = base_fingerprints(model_args, processor)
    check_content(checkpoint, content)
    dataset = load_training_data(data_args, training_args, processor, model_args.has_branches, console)
    content["the rows of the data"] = dataset.fingerprint
    check_content(checkpoint, content)
    # Text-only batches give the vision tower no gradient.
    training_args.ddp_find_unused_parameters = model_args.method == "full"
    model = load_model(model_args)
    console.print(parameter_table(model))

    with user_errors("The training cannot be set up"):
        trainer = PVMTrainer(
            settings=settings,
            model=model,
            args=training_args,
            train_dataset=dataset,
            data_collator=ConversationCollator(processor.tokenizer.pad_token_id),
            processing_class=processor,
        )
    train_and_save(trainer, checkpoint, "pvm train", model_args.model_name_or_path, console)
