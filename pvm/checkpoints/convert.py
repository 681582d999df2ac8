"""
Turn a checkpoint into another form. The adapter that train.py saved into a whole checkpoint:

    python -m pvm convert runs/my_pvm runs/my_pvm_whole --to full

and back, which is refused unless its other weights are exactly the base's:

    python -m pvm convert runs/my_pvm_whole runs/my_pvm_again --to adapter --base Qwen/Qwen3-VL-8B-Instruct

The authors' checkpoints become ours with either, and ours theirs with `--to reference`.
"""

import pvm  # noqa: F401, I001  (first: it makes torchvision importable where its compiled operators are missing)

import json
import os
import shutil
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from configuration_qwen3vl_pvm import REFERENCE_ARCHITECTURE
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration, safetensors_files

from pvm.checkpoints.card import write_card
from pvm.checkpoints.loading import MODEL_CLASS, checkpoint_kind, load_processor
from pvm.errors import UserError
from pvm.checkpoints.loading import load_weights
from pvm.checkpoints.record import RECORD
from pvm.variants import VARIANTS


def load_merged(name: str, revision: str, kind: str) -> Qwen3VLPVMForConditionalGeneration:
    """
    The model of any checkpoint with branches, in the dtype of its backbone, and with its LoRA in its weights: added in
    float32, and rounded once.

    Raises:
        UserError: if it cannot be loaded.
    """
    model_class = MODEL_CLASS[kind]
    config = model_class.config_class.from_pretrained(name, revision=revision)
    lora, config.peft_adapter = config.peft_adapter, None
    dtype = config.dtype
    model, info = load_weights(
        model_class, name, config=config, revision=revision, dtype="float32" if lora else "auto"
    )
    if info["missing_keys"]:
        raise UserError(f"{name} lacks weights, e.g. {min(info['missing_keys'])}. Get the complete checkpoint.")
    if lora:
        model = PeftModel.from_pretrained(model, name, subfolder=lora, revision=revision).merge_and_unload().to(dtype)
    return model


def check_backbone(model: Qwen3VLPVMForConditionalGeneration, base: str, revision: str | None) -> None:
    """
    Raises:
        UserError: if a weight outside of the branches is not the base's: an adapter would lose it.
    """
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
                        f"{name} is not the base's: the backbone was changed, which an adapter would lose. Keep the "
                        f"whole checkpoint, or name its true base (this was {base})."
                    )
    if ours:
        raise UserError(f"The base {base} has no {min(ours)}: it is not the base of this checkpoint.")


def reference_config(fields: dict[str, Any]) -> dict[str, Any]:
    """A config.json of ours as the authors' implementation, on transformers 4.57, writes it."""
    ours = ("auto_map", "base_model_name_or_path", "base_model_revision", "peft_adapter", "transformers_version")
    fields = {key: value for key, value in fields.items() if key not in ours}
    text = {key: value for key, value in fields["text_config"].items() if key not in ("pvm_causal", "pvm_training")}
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
    """Write a model in one of the forms."""
    model.save_pretrained(folder, adapter_only=form == "adapter")
    if form == "reference":
        for file in folder.glob("*.py"):
            file.unlink()  # their code is their own
        fields = json.loads((folder / CONFIG_NAME).read_text())
        (folder / CONFIG_NAME).write_text(json.dumps(reference_config(fields), indent=2) + "\n")
        if model.config.text_config.pvm_causal:
            print(
                "Note: in this model text reads only the images before it, and in the authors' implementation all "
                "images of its row. It computes something else wherever text stands before an image, be it only the "
                "header of the chat format."
            )


def convert(args: Namespace) -> None:
    """
    Raises:
        UserError: if the folder is not empty, or the checkpoint cannot have that form.
    """
    name, folder = args.checkpoint, args.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty, and would be overwritten. Name another folder.")
    kind = checkpoint_kind(name, args.revision)
    if kind not in ("pvm", *VARIANTS) or (kind in VARIANTS and args.to == "reference"):
        raise UserError(f"{name} is of the kind {kind}, and cannot be made {args.to}: only PVM checkpoints can.")
    model = load_merged(name, args.revision, kind)
    if args.to == "adapter":
        mark = model.config.text_config.pvm_training or {}
        base = args.base or model.config.base_model_name_or_path or mark.get("base_model")
        revision = args.base_revision or model.config.base_model_revision or mark.get("base_revision")
        if base is None:
            raise UserError("An adapter names its base, and this checkpoint does not say which: give --base.")
        check_backbone(model, base, revision)
        if Path(base).is_dir():
            base, revision = str(Path(base).absolute()), None
        else:
            revision = extract_commit_hash(cached_file(base, CONFIG_NAME, revision=revision or "main"), None)
        model.config.base_model_name_or_path, model.config.base_model_revision = base, revision

    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        staging = Path(temporary, "checkpoint")
        save(model, staging, args.to)
        try:
            load_processor(name, args.revision).save_pretrained(staging)
        except (OSError, ValueError):
            print(f"Note: {name} has no processor; take the base's.")
        if Path(name, RECORD).is_file():
            shutil.copy(Path(name, RECORD), staging)
        if args.to != "reference":
            write_card(staging, folder.name)
        if folder.exists():
            folder.rmdir()
        os.replace(staging, folder)
    print(f"Written: {folder}")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser("python -m pvm convert", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="Folder or Hub name, of ours or the authors'.")
    parser.add_argument("folder", type=Path, help="Where the new form is written; it must not exist or be empty.")
    parser.add_argument("--to", choices=("full", "adapter", "reference"), required=True, help="The form.")
    parser.add_argument("--revision", default="main", help="Branch, tag or commit of a checkpoint on the Hub.")
    parser.add_argument("--base", help="With --to adapter: folder or Hub name of the base, if it is not known.")
    parser.add_argument("--base_revision", help="Its branch, tag or commit on the Hub.")
    convert(parser.parse_args(arguments))


if __name__ == "__main__":
    try:
        main()
    except (UserError, StrictDataclassError, SafetensorError, OSError) as error:
        sys.exit(f"pvm convert: error: {error}")
