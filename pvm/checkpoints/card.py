"""The model card of a checkpoint. train.py writes it with every save, pvm.evaluation.card again with results."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers.utils import CONFIG_NAME

from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from pvm.checkpoints.names import describe_block, public_name
from pvm.checkpoints.record import read_record


CARD, TEMPLATE = "README.md", Path(__file__).with_name("model_card.md")
METHODS = {
    "pvm": "PVM branches, trained in a frozen backbone",
    "pvm+lora": "PVM branches and LoRA adapters of the language model, trained together",
    "lora": "A control for PVM: LoRA adapters of the language model",
    "full": "A control for PVM: full fine-tuning of the model",
    # Of the second stage, see pvm.rl.policy.
    "branches": "PVM branches, trained in a frozen backbone and then with rewards",
    "branches+lora": "PVM branches, then trained with rewards together with LoRA adapters of the language model",
    "language_model+branches": "PVM branches, then trained with rewards together with the language model",
    "language_model": "A control for PVM: the language model, trained with rewards",
}
STAGES = {"sft": "supervised fine-tuning", "grpo": "GRPO"}


@dataclass
class Results:
    """What an evaluation found: a section of the card in Markdown, and the numbers for its metadata."""

    markdown: str
    metrics: list[EvalResult]


def write_card(folder: Path, name: str, results: Sequence[Results] = (), licence: str = "apache-2.0") -> None:
    """
    Write the model card of a checkpoint: what its files say and what was measured, nothing else.

    Args:
        folder (`Path`): of the checkpoint.
        name (`str`): the title; the name of the repository, if there is one.
        results (`Sequence[Results]`): of its evaluations.
        licence (`str`): of these weights, as the Hub abbreviates it.
    """
    record = read_record(folder)
    config = json.loads((folder / CONFIG_NAME).read_text()) if (folder / CONFIG_NAME).is_file() else {}
    is_pvm = config.get("model_type") == Qwen3VLPVMConfig.model_type
    is_peft = (folder / "adapter_config.json").is_file()
    is_adapter = is_peft or config.get("base_model_name_or_path") is not None
    text = config.get("text_config", {})
    trained = text.get("pvm_training") or {}
    block = text.get("pvm_block", "pvm")
    base, revision = (record.get(key) or trained.get(key) for key in ("base_model", "base_revision"))
    named = config.get("base_model_name_or_path")
    if base is None and named is not None and public_name(named)["on_hub"]:
        base, revision = named, config.get("base_model_revision")
    metrics = [metric for result in results for metric in result.metrics]
    data = ModelCardData(
        license=licence,
        library_name="peft" if is_peft else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=base,
        base_model_relation=None if base is None else "adapter" if is_adapter else "finetune",
        datasets=[dataset["name"] for dataset in record.get("datasets", []) if dataset["on_hub"]] or None,
        tags=["persistent-visual-memory", "qwen3_vl", *(["custom_code"] if is_pvm else [])],
        **({"model_name": name.split("/")[-1], "eval_results": metrics} if metrics else {}),
    )
    ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        method=METHODS.get(record.get("method") or trained.get("method"), "A checkpoint of unknown training"),
        base=base,
        is_pvm=is_pvm,
        is_adapter=is_adapter,
        variant=describe_block(block) if block != "pvm" else None,
        record=record,
        facts=_facts(text, record, base, revision),
        gates=read_gates(folder),
        stages=_stages(record),
        results="\n\n".join(result.markdown for result in results),
    ).save(folder / CARD)


def _facts(text: dict[str, Any], record: dict[str, Any], base: str | None, revision: str | None) -> list[tuple]:
    facts = [("base", base or "not on the Hub"), ("revision of the base", revision or "unknown")]
    if "pvm_layers" in text:
        facts += [
            ("layers with a branch", ", ".join(map(str, text["pvm_layers"]))),
            ("width of a branch", text["pvm_hidden_size"]),
            ("kind of branch", describe_block(text.get("pvm_block", "pvm"))),
            ("text attends to", "the images before it" if text.get("pvm_causal", True) else "all images"),
        ]
    if record:
        trained, total = record["trained_parameters"], record["all_parameters"]
        facts.append(("trained parameters", f"{trained:,} of {total:,} ({trained / max(total, 1):.2%})"))
    return facts


def _stages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of a training, the first one first."""
    if not record:
        return []
    # Records of release 0.1.0 name no stage.
    name = STAGES[record.get("stage", "sft")]
    return [*_stages(record.get("previous") or {}), {"name": name, "training": _training(record)}]


def _training(record: dict[str, Any]) -> list[tuple[str, str]]:
    data = [
        d["name"] + ("" if d["on_hub"] else " (a local file)") + (f", weight {d['weight']:g}" if d["weight"] else "")
        for d in record["datasets"]
    ]
    recipe = [
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in record["arguments"].items()
        if value not in (None, False)
    ]
    reward = record.get("last_reward")
    return [
        ("data", "; ".join(data) or "not recorded"),
        ("steps", f"{record['step']:,} of {record['steps']:,}, {record['epochs']} epochs"),
        *([("last logged reward", f"{reward:.4g}")] if reward is not None else []),
        ("last logged loss", "none" if record["last_loss"] is None else f"{record['last_loss']:.4g}"),
        ("recipe", "; ".join(recipe)),
        ("hardware", record["hardware"]),
        ("versions", ", ".join(f"{package} {number}" for package, number in record["versions"].items())),
    ]


def read_gates(folder: Path) -> dict[int, float]:
    """The gates of the branches in a folder's safetensors files, by layer."""
    gates = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                if name.endswith(".pvm_block.gate_alpha"):
                    gates[int(name.split(".layers.")[1].split(".")[0])] = weights.get_tensor(name).item()
    return dict(sorted(gates.items()))
