"""
Train Persistent Visual Memory (PVM) branches in a frozen Qwen3-VL, or a control to compare them with.

The demo (real handwritten digits and a tiny Qwen3-VL; no GPU, no network):

    python train.py --config recipes/digits_pvm.yaml
    python train.py --config recipes/digits_pvm.yaml --seed 1 --output_dir runs/digits_pvm_seed1

A real model and your own conversations (files, folders or Hub names; docs/data.md shows the supported formats):

    python train.py --model_name_or_path Qwen/Qwen3-VL-8B-Instruct --dataset_name my_data.jsonl --bf16 true \\
        --output_dir runs/qwen3-vl-8b-pvm

`--dry_run true` only checks the data and shows statistics; no model is loaded.

Controls: add `--method lora`, `--method full`, or `--pvm_block parallel_mlp` (branches of the same size that do not
see the image). Several GPUs: `accelerate launch --config_file recipes/accelerate/ddp.yaml train.py ...`. To resume an
interrupted run, add `--resume_from_checkpoint last`. All of transformers' TrainingArguments are accepted except those
that would have no effect; they are refused with the reason.
"""

import pvm  # noqa: F401, I001  (first: it makes torchvision importable where its compiled operators are missing)

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import ProcessorMixin, set_seed

from pvm.arguments import parse_arguments
from pvm.checkpoints.loading import load_processor
from pvm.checkpoints.record import count_parameters
from pvm.data.encoding import ConversationCollator
from pvm.data.sources import DataArguments
from pvm.data.validation import load_training_data
from pvm.errors import UserError, ends_in_a_sentence, user_errors
from pvm.training.methods import ModelArguments, load_model, model_config
from pvm.training.resume import find_checkpoint, run_settings
from pvm.training.saving import locked_on_main_process
from pvm.training.trainer import PVMTrainer, PVMTrainingArguments


def parameter_table(model) -> Table:
    """The number of parameters and of trainable parameters by part."""
    table = Table(title="parameters")
    for heading in ("part", "all", "trainable", "share of all"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    counts = count_parameters(model)
    for count in counts:
        share = f"{count.trainable / counts[-1].total:.2%}"
        table.add_row(count.part, f"{count.total:,}", f"{count.trainable:,}", share, end_section=count is counts[-2])
    return table


def main(arguments: list[str] | None = None) -> None:
    model_args, data_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, PVMTrainingArguments), __doc__, arguments
    )
    name = model_args.model_name_or_path
    console = Console(soft_wrap=True, quiet=training_args.process_index > 0)
    model_config(model_args)  # refuse what does not fit before going through the data
    settings = run_settings(model_args, data_args, training_args)
    if training_args.push_to_hub and Path(settings["base_model"]).is_dir():
        raise UserError(
            f"--push_to_hub: the base {name} is a local folder that nobody else has. Give its name on the Hub with "
            "--base_model_id, or train without pushing and make a whole checkpoint (python -m pvm convert)."
        )
    with user_errors("--seed"):
        set_seed(training_args.seed)
    processor = load_processor(name, model_args.model_revision)
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
    console: Console,
) -> None:
    """
    A run, from the check of its data to its result in the output folder, which nobody else may write into meanwhile.

    Args:
        settings (`dict[str, Any]`): [`run_settings`].
    """
    name, output_dir = model_args.model_name_or_path, training_args.output_dir
    checkpoint = find_checkpoint(training_args, settings)
    dataset = load_training_data(data_args, training_args, processor, model_args.has_branches, console)
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
    with trainer.stop_on_sigterm:
        frozen = trainer.frozen_hash()
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.stop_on_sigterm.stopped:
            sys.exit(
                f"train.py: stopped by SIGTERM after step {trainer.state.global_step}, which is saved. To resume, add "
                "--resume_from_checkpoint last to the same command."
            )
        if trainer.state.global_step == 0:
            raise UserError("No step was made: there are fewer rows than one batch, or no epochs. Nothing was saved.")
        trainer.save_state()
        trainer.save_model()
        if trainer.frozen_hash() != frozen:
            sys.exit(
                "train.py: error: FROZEN WEIGHTS CHANGED DURING TRAINING. This is a bug, please report it. What was "
                f"trained is saved in {output_dir}, but the base it will be loaded with is not the one it was trained "
                "in: evaluate it before you trust it. The final push was left out."
            )
        if training_args.push_to_hub:
            trainer.push_to_hub()
    if frozen is not None:
        console.print(f"\nThe frozen weights did not change: SHA-256 {frozen[:16]} before and after.")
    console.print(f"\nSaved in {output_dir}. To compare it with its base on your test set:")
    console.print(
        f"  python eval.py --model {name} {output_dir} --dataset_name YOUR_TEST_SET --output_dir {output_dir}-eval "
        "(for a single file add --dataset_split train)",
        highlight=False,
    )


if __name__ == "__main__":
    with ends_in_a_sentence(
        "train.py", "interrupted. If there is a checkpoint, --resume_from_checkpoint last continues from it."
    ):
        main()
