"""
Train Persistent Visual Memory branches, or a control, in a frozen Qwen3-VL.

On the embedded default (real handwritten digits, a tiny Qwen3-VL; no GPU, no network):

    python train.py --config recipes/digits_pvm.yaml
    python train.py --config recipes/digits_pvm.yaml --seed 1 --output_dir runs/digits_pvm_seed1

On a real model and your own conversations (files, folders or Hub names; docs/data.md shows the forms of rows):

    python train.py --model_name_or_path Qwen/Qwen3-VL-8B-Instruct --dataset_name my_data.jsonl --bf16 true \\
        --output_dir runs/qwen3-vl-8b-pvm

With `--dry_run true` the same line checks the data, shows what is in it, and loads no model.

Controls for a claim about PVM: the same line with `--method lora`, `mlp` (as many parameters, no image) or `full`. On
several GPUs: `accelerate launch --config_file recipes/accelerate/ddp.yaml train.py ...`. An interrupted run goes on
with `--resume_from_checkpoint last`. transformers' TrainingArguments are accepted; some are refused, with a reason.
"""

import pvm  # noqa: F401, I001  (first: it makes torchvision importable where its compiled operators are missing)

import sys
from contextlib import suppress
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table
from transformers import set_seed

from pvm.arguments import parse_arguments
from pvm.training.callbacks import AllLoaded, StopBeforeTraining
from pvm.checkpoints.loading import load_processor
from pvm.data.validation import load_training_data
from pvm.data.encoding import ConversationCollator
from pvm.errors import UserError, user_errors
from pvm.training.methods import ModelArguments, load_model, model_config
from pvm.training.resume import find_checkpoint, is_over, run_settings
from pvm.data.sources import DataArguments
from pvm.checkpoints.record import count_parameters
from pvm.training.trainer import PVMTrainer, PVMTrainingArguments


def parameter_table(model) -> Table:
    """What trains and what does not."""
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
    model_config(model_args)  # what does not fit is found out before the data is gone through
    settings = run_settings(model_args, data_args, training_args)
    if training_args.push_to_hub and Path(settings["base_model"]).is_dir():
        raise UserError(
            f"--push_to_hub with the base {name}, a folder that nobody else has: give its name on the Hub with "
            "--base_model_id, or train without pushing and make a whole checkpoint of it (python -m pvm convert)."
        )
    checkpoint = None if data_args.dry_run else find_checkpoint(training_args, settings)
    # Text alone gives the vision tower no gradient.
    training_args.ddp_find_unused_parameters = model_args.method == "full"
    with user_errors("--seed"):
        set_seed(training_args.seed)

    processor = load_processor(name, model_args.model_revision)
    dataset = load_training_data(data_args, training_args, processor, model_args.has_branches, console)
    if data_args.dry_run:
        return
    model = load_model(model_args)
    console.print(parameter_table(model))

    with user_errors("The training cannot be set up"):
        trainer = PVMTrainer(
            method=model_args.method,
            settings=settings,
            model=model,
            args=training_args,
            train_dataset=dataset,
            data_collator=ConversationCollator(processor.tokenizer.pad_token_id),
            processing_class=processor,
        )
    with trainer.stop_on_sigterm:
        frozen = trainer.frozen_hash()
        if checkpoint is not None and is_over(checkpoint, training_args):
            trainer.add_callback(StopBeforeTraining())  # killed in the final save: only that is left to do
        with suppress(AllLoaded):
            trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.stop_on_sigterm.stopped:
            sys.exit(
                f"train.py: stopped by SIGTERM after step {trainer.state.global_step} and saved it. Go on with the "
                "same line and --resume_from_checkpoint last."
            )
        if trainer.frozen_hash() != frozen:
            raise RuntimeError(
                "Weights that were frozen changed during training. This is a bug; it has no final save."
            )
        if trainer.state.global_step == 0:
            raise UserError("No step was made: there are fewer rows than one batch, or no epochs. Nothing was saved.")
        trainer.save_state()
        trainer.save_model()
    if frozen is not None:
        console.print(f"\nEverything frozen is as it was: SHA-256 {frozen[:16]} before and after.")
    console.print(f"\nSaved in {training_args.output_dir}. Compare it with its base on a test set of yours:")
    console.print(
        f"  python eval.py --model {name} {training_args.output_dir} --dataset_name YOUR_TEST_SET "
        f"--dataset_split test --output_dir {training_args.output_dir}-eval",
        highlight=False,
    )


if __name__ == "__main__":
    try:
        main()
    except (UserError, StrictDataclassError, OSError) as error:
        sys.exit(f"train.py: error: {error}")
