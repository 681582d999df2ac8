"""
Convert a PVM checkpoint to another form. An adapter checkpoint, as train.py saves it, to a whole one:

    python -m pvm convert runs/my_pvm runs/my_pvm_whole --to whole

and back, if all weights outside of the branches are exactly the base's:

    python -m pvm convert runs/my_pvm_whole runs/my_pvm_again --to adapter --base Qwen/Qwen3-VL-8B-Instruct

Both also convert checkpoints of the authors' implementation; `--to reference` writes one for it.
"""

import json
import os
import shutil
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from adapter_qwen3vl_pvm import safetensors_files
from configuration_qwen3vl_pvm import REFERENCE_ARCHITECTURE
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.checkpoints.card import write_card
from pvm.checkpoints.loading import add_peft_adapter, load_processor, load_weights
from pvm.checkpoints.names import branch_block, checkpoint_kind, pvm_config
from pvm.checkpoints.record import RECORD
from pvm.errors import UserError
from pvm.files import LOCK, locked
from pvm.terminal import Terminal


def load_merged(name: str, revision: str) -> Qwen3VLPVMForConditionalGeneration:
    """
    A PVM checkpoint in its dtype. LoRA is merged in float32, and the sums are rounded once.

    Raises:
        UserError: if it cannot be loaded.
    """
    config = pvm_config(name, revision)
    lora, config.peft_adapter = config.peft_adapter, None
    dtype = "float32" if lora else "auto"
    model = load_weights(Qwen3VLPVMForConditionalGeneration, name, config=config, revision=revision, dtype=dtype)
    if lora:
        model = add_peft_adapter(model, name, revision, lora).merge_and_unload()
        model = model.to(config.dtype)
    return model


def stored_weights(model: Qwen3VLPVMForConditionalGeneration) -> dict[str, torch.Tensor]:
    """
    The weights as they are stored: those of a base in its dtype, which may be smaller than that of the training and of
    the branches.
    """
    weights, base = model.state_dict(), model.config.base_model_name_or_path
    dtype = base and pvm_config(base, model.config.base_model_revision or "main").dtype
    if dtype is None:
        return weights
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]  # a copy in another dtype would be stored
    return {name: weight if ".pvm_block." in name else weight.to(dtype) for name, weight in weights.items()}


def check_backbone(model: Qwen3VLPVMForConditionalGeneration, base: str, revision: str | None) -> None:
    """
    Raises:
        UserError: if a weight outside of the branches is not the base's, because an adapter checkpoint has no place
            for it.
    """
    if (kind := checkpoint_kind(base, revision or "main")) != "stock":
        raise UserError(
            f"{base} is of the kind {kind}, and the base of an adapter must be a stock model. Give --base."
        )
    ours = {name: weight for name, weight in model.state_dict().items() if ".pvm_block." not in name}
    if model.config.tie_word_embeddings:
        del ours["lm_head.weight"]
    for file in safetensors_files(base, revision=revision or "main"):
        with safe_open(file, "pt") as weights:
            for name in ours.keys() & set(weights.keys()):
                weight = ours.pop(name)
                theirs = weights.get_tensor(name).to(weight.dtype)
                if theirs.shape != weight.shape or not torch.equal(theirs, weight):
                    raise UserError(
                        f"{name} differs from that of {base}, and an adapter checkpoint would lose the change. Keep "
                        "the whole checkpoint, or name the base that it was made from."
                    )
    if ours:
        raise UserError(f"The base {base} has no {min(ours)}: it is not the base of this checkpoint.")


def reference_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Our config.json in the form that the authors' implementation writes on transformers 4.57."""
    ours = ("auto_map", "base_model_name_or_path", "base_model_revision", "peft_adapter", "transformers_version")
    fields = {key: value for key, value in fields.items() if key not in ours}
    text = {
        key: value
        for key, value in fields["text_config"].items()
        if key not in ("pvm_causal", "pvm_block", "pvm_training")
    }
    rope = dict(text.pop("rope_parameters"))
    text |= {"model_type": "qwen3_vl_text", "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    vision = {key: value for key, value in fields["vision_config"].items() if key != "rope_parameters"}
    return {
        **fields,
        "architectures": [REFERENCE_ARCHITECTURE],
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": {**vision, "model_type": "qwen3_vl"},
    }


def save(model: Qwen3VLPVMForConditionalGeneration, folder: Path, form: str) -> None:
    """Write a model in one of the forms: "whole", "adapter" or "reference"."""
    if form == "adapter":
        return model.save_pretrained(folder, adapter_only=True)
    model.save_pretrained(folder, state_dict=stored_weights(model))
    if form == "reference":
        for file in folder.glob("*.py"):
            file.unlink()  # the authors' checkpoints come without code
        fields = json.loads((folder / CONFIG_NAME).read_text())
        (folder / CONFIG_NAME).write_text(json.dumps(reference_config(fields), indent=2) + "\n")
        if model.config.text_config.pvm_causal:
            Terminal().print(
                "Note: in this model text attends to the images before it only, in the authors' implementation to all "
                "images of its row. The results differ wherever text comes before an image, even if that is only the "
                "header of the chat format."
            )


def convert(args: Namespace) -> None:
    """
    Raises:
        UserError: if the folder is not empty, or the checkpoint cannot have that form.
    """
    name, folder = args.checkpoint, args.folder
    if folder.is_dir() and any(file.name != LOCK for file in folder.iterdir()):
        raise UserError(f"{folder} is not empty and would be overwritten. Choose another folder.")
    kind, block = checkpoint_kind(name, args.revision), branch_block(name, args.revision)
    if kind != "pvm":
        raise UserError(f"{name} is of the kind {kind}, and only PVM checkpoints can be converted.")
    if args.to == "reference" and block != "pvm":
        raise UserError(f"{name} has branches of the kind {block}, which the authors' implementation does not have.")
    model = load_merged(name, args.revision)
    if args.to == "adapter":
        training = model.config.text_config.pvm_training or {}
        base = args.base or model.config.base_model_name_or_path or training.get("base_model")
        revision = args.base_revision or model.config.base_model_revision or training.get("base_revision")
        if base is None:
            raise UserError(f"{name} does not name its base, which an adapter checkpoint needs: give --base.")
        check_backbone(model, base, revision)
        if Path(base).is_dir():
            base, revision = str(Path(base).absolute()), None
        else:
            revision = extract_commit_hash(cached_file(base, CONFIG_NAME, revision=revision or "main"), None)
        model.config.base_model_name_or_path, model.config.base_model_revision = base, revision

    with TemporaryDirectory(dir=folder, prefix=".") as temporary:
        staging = Path(temporary, "checkpoint")
        save(model, staging, args.to)
        try:
            load_processor(name, args.revision).save_pretrained(staging)
        except (OSError, ValueError):
            Terminal().print(f"Note: {name} has no processor; use the base's.")
        if Path(name, RECORD).is_file():
            shutil.copy(Path(name, RECORD), staging)
        if args.to != "reference":
            write_card(staging, folder.resolve().name)
        for file in sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_NAME):
            os.replace(file, folder / file.name)  # without config.json, the last one, nothing loads the folder
    Terminal().print(f"Written: {folder}")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser("python -m pvm convert", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="Folder or Hub name of a PVM checkpoint.")
    parser.add_argument("folder", type=Path, help="Where the new form is written; must be empty or not exist.")
    parser.add_argument("--to", choices=("whole", "adapter", "reference"), required=True, help="The form.")
    parser.add_argument("--revision", default="main", help="Branch, tag or commit of a checkpoint on the Hub.")
    parser.add_argument("--base", help="With --to adapter: folder or Hub name of the base, if not recorded.")
    parser.add_argument("--base_revision", help="Branch, tag or commit of the base on the Hub.")
    args = parser.parse_args(arguments)
    with locked(args.folder):
        convert(args)
