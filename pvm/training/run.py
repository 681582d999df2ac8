"""A run of `pvm train` or `pvm grpo`, once its trainer is set up."""

import sys
from pathlib import Path

from rich.table import Table
from transformers import TrainingArguments

from pvm.checkpoints.record import count_parameters
from pvm.errors import UserError
from pvm.terminal import Terminal
from pvm.training.resume import check_content
from pvm.training.trainer import CheckpointingTrainer


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


def train_and_save(
    trainer: CheckpointingTrainer, checkpoint: str | None, command: str, model_name: str, console: Terminal
) -> None:
    """
    Train, save the result with record and card, and push it if that was asked for.

    Args:
        checkpoint (`str`, *optional*): to resume from.
        command (`str`): "pvm train" or "pvm grpo", for messages.
        model_name (`str`): what training started from.

    Raises:
        UserError: if no step was made.
        SystemExit: after SIGTERM, or if frozen weights have changed.
    """
    output_dir = trainer.args.output_dir
    with trainer.stop_on_sigterm:
        content = trainer.settings.setdefault("content", {})
        content["the weights of the base"] = frozen = trainer.frozen_hash()
        check_content(checkpoint, content)
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.stop_on_sigterm.stopped:
            sys.exit(
                f"{command}: stopped by SIGTERM after step {trainer.state.global_step}, which is saved. To resume, "
                "add --resume_from_checkpoint last to the same command."
            )
        if trainer.state.global_step == 0:
            raise UserError("No step was made: there are fewer rows than one batch, or no epochs. Nothing was saved.")
        trainer.save_state()
        trainer.save_model()
        if trainer.frozen_hash() != frozen:
            sys.exit(
                f"{command}: error: FROZEN WEIGHTS CHANGED DURING TRAINING. This is a bug, please report it. What was "
                f"trained is saved in {output_dir}, but the base it will be loaded with is not the one it was trained "
                "in: evaluate it before you trust it. The final push was left out."
            )
        if trainer.args.push_to_hub:
            trainer.push_to_hub()
    if frozen is not None:
        console.print(f"\nThe frozen weights did not change: SHA-256 {frozen[:16]} before and after.")
    console.print(f"\nSaved in {output_dir}. To compare it with its base on your test set:")
    console.print(
        f"  python -m pvm eval --model {model_name} {output_dir} --dataset_name YOUR_TEST_SET --output_dir "
        f"{output_dir}-eval (for a single file add --dataset_split train)"
    )


def check_push(arguments: TrainingArguments, base: str) -> None:
    """
    Raises:
        UserError: if checkpoints are to be pushed that name a base on this machine.
    """
    if arguments.push_to_hub and Path(base).is_dir():
        raise UserError(
            f"--push_to_hub: the base {base} is a local folder that nobody else has. Give its name on the Hub with "
            "--base_model_id, or train without pushing and make a whole checkpoint (python -m pvm convert)."
        )
