"""
The record of a training and the model card that is made of it, of the weights and of evaluations.

train.py writes both with every save. After an evaluation, put its results into the card:

    python -m pvm card runs/digits_pvm --report runs/digits_eval/report.json
"""

import json
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME

from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from pvm.checkpoints.names import public_name
from pvm.checkpoints.record import RECORD
from pvm.errors import UserError
from pvm.evaluation.report import checkpoint_lines, difference_guide, remarks
from pvm.evaluation.tables import difference_table, distance_table, intact_names, overall_table
from pvm.variants import VARIANTS


CARD, TEMPLATE = "README.md", Path(__file__).with_name("model_card.md")
PICTURE = "results.png"
METHODS = {
    "pvm": "PVM branches, trained in a frozen backbone",
    "pvm+lora": "PVM branches and LoRA adapters of the language model, trained together",
    "mlp": "a control for PVM: branches with as many parameters that read no image",
    "token_gate": "an experiment: PVM branches whose gate depends on the token",
    "lora": "a control for PVM: LoRA adapters of the language model",
    "full": "a control for PVM: the model with all its weights trained on",
}
VARIANT_TYPES = [model_class.config_class.model_type for model_class in VARIANTS.values()]
LIMITS = """\
- A branch lets text read the image directly; whether that helps is what the results show. It makes nothing that the
  model says true: check answers that matter.
- What was measured is above; nothing is known of other data, languages, lengths or kinds of image. The figures of the
  paper are those of its authors' checkpoints.
- {class_note}"""


def write_card(
    folder: Path, name: str, reports: list[dict[str, Any]] | None = None, licence: str = "apache-2.0"
) -> None:
    """
    Write the model card of a checkpoint: only what its files say and what was measured.

    Args:
        folder (`Path`): of the checkpoint.
        name (`str`): what the card calls it: the repository's name, if there is one.
        reports (`list[dict]`, *optional*): `{"name", "run", "report"}`: report.json of evaluations, what they call
            this checkpoint, and which of the runs of that name it is.
        licence (`str`): of these weights, as the Hub abbreviates it.
    """
    reports = reports or []
    record = json.loads((folder / RECORD).read_text(encoding="utf-8")) if (folder / RECORD).is_file() else {}
    config = json.loads((folder / CONFIG_NAME).read_text()) if (folder / CONFIG_NAME).is_file() else {}
    kind = config.get("model_type")
    is_pvm = kind == Qwen3VLPVMConfig.model_type
    is_part = config.get("base_model_name_or_path") is not None or (folder / "adapter_config.json").is_file()
    mark = config.get("text_config", {}).get("pvm_training") or {}
    base, revision = (record.get(key) or mark.get(key) for key in ("base_model", "base_revision"))
    named = config.get("base_model_name_or_path")
    if base is None and named is not None and public_name(named)["on_hub"]:
        base, revision = named, config.get("base_model_revision")
    results = [result for report in reports for result in _eval_results(report)]
    data = ModelCardData(
        license=licence,
        library_name="peft" if (folder / "adapter_config.json").is_file() else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=base,
        base_model_relation=None if base is None else "adapter" if is_part else "finetune",
        datasets=[dataset["name"] for dataset in record.get("datasets", []) if dataset["on_hub"]] or None,
        tags=["persistent-visual-memory", "qwen3_vl", *(["custom_code"] if is_pvm else [])],
        **({"model_name": name.split("/")[-1], "eval_results": results} if results else {}),
    )
    ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name.split("/")[-1],
        is_pvm=is_pvm,
        summary=_summary(record, mark, base, is_part),
        loading=_loading(kind, is_part, name),
        loading_note=_loading_note(kind, is_part and base is not None),
        facts=_facts(config, record, base, revision),
        gates=[(layer, f"{gate:+.4f}") for layer, gate in read_gates(folder).items()],
        training=_training(record),
        results="\n\n".join(_results(report) for report in reports) or "Not evaluated yet.",
        limits=LIMITS.format(class_note=_class_note(is_pvm, is_part)),
        licence=licence,
    ).save(folder / CARD)


def _summary(record: dict, mark: dict, base: str | None, is_part: bool) -> str:
    method = METHODS.get(record.get("method") or mark.get("method"), "A checkpoint of unknown training")
    onto = f"[{base}](https://huggingface.co/{base})" if base else "a base that is not on the Hub"
    verb = "They go into" if is_part else "Made from"
    unfinished = record.get("steps") and record["step"] < record["steps"]
    state = f" **Training in progress: step {record['step']:,} of {record['steps']:,}.**" if unfinished else ""
    return f"{method[0].upper()}{method[1:]}. {verb} {onto}.{state}"


def _loading(kind: str | None, is_part: bool, name: str) -> str:
    if kind in VARIANT_TYPES:
        return f'from pvm.checkpoints.loading import load_checkpoint\n\ncheckpoint = load_checkpoint("{name}")'
    code = ", trust_remote_code=True" if kind == Qwen3VLPVMConfig.model_type else ""
    return (
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        f'processor = AutoProcessor.from_pretrained("{name}"{code})\n'
        f'model = AutoModelForImageTextToText.from_pretrained("{name}"{code})'
    )


def _loading_note(kind: str | None, is_part: bool) -> str:
    if kind in VARIANT_TYPES:
        return "A control for comparisons; only the project that trained it loads it."
    notes = []
    if kind == Qwen3VLPVMConfig.model_type:
        notes.append(
            "`trust_remote_code=True` runs the two Python files of this repository. Read them, and pin what you have "
            'read: `revision="COMMIT", code_revision="COMMIT"`. `model.generate(..., use_pvm=False)` answers without '
            "the branches, for comparison."
        )
    if is_part:
        notes.append("Only what was trained is here; the base is downloaded from its own repository.")
    return " ".join(notes)


def _class_note(is_pvm: bool, is_part: bool) -> str:
    if not is_pvm:
        return "This is a control, made for comparisons."
    if is_part:
        return "The stock class `Qwen3VLForConditionalGeneration` cannot load this; use the lines above."
    return (
        "Loaded by the stock class `Qwen3VLForConditionalGeneration`, this is its base: the branches are left out "
        "with no more than a warning. Use the lines above."
    )


def _facts(config: dict, record: dict, base: str | None, revision: str | None) -> list[tuple[str, str]]:
    text = config.get("text_config", {})
    facts = [("base", base or "not on the Hub"), ("revision of the base", revision or "not known")]
    if "pvm_layers" in text:
        facts += [
            ("layers with a branch", ", ".join(map(str, text["pvm_layers"]))),
            ("width of a branch", f"{text['pvm_hidden_size']}"),
            ("text reads", "only images before it" if text.get("pvm_causal", True) else "all images"),
        ]
    if record:
        trained, total = record["trained_parameters"], record["all_parameters"]
        facts.append(("trained parameters", f"{trained:,} of {total:,} ({trained / max(total, 1):.2%})"))
    return facts


def _training(record: dict) -> list[tuple[str, str]]:
    if not record:
        return []
    data = [
        d["name"] + ("" if d["on_hub"] else " (a local file)") + (f", weight {d['weight']:g}" if d["weight"] else "")
        for d in record["datasets"]
    ]
    recipe = [
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in record["arguments"].items()
        if value not in (None, False)
    ]
    return [
        ("data", "; ".join(data) or "not recorded"),
        ("steps", f"{record['step']:,} of {record['steps']:,}, {record['epochs']} epochs"),
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


def _eval_results(entry: dict[str, Any]) -> list[EvalResult]:
    report = entry["report"]
    result = report["overall"][entry["name"]]
    low, high = result["interval"]
    what, value = f"95 % interval {low:.3f} to {high:.3f}", result["accuracy"]
    if "by_run" in result:  # of which this checkpoint is one
        what, value = f"{len(result['by_run'])} runs: {value:.3f}, {what}; this one", result["by_run"][entry["run"]]
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=report["dataset"]["name"],
            dataset_name=report["dataset"]["name"],
            dataset_split=report["arguments"]["dataset_split"],
            metric_type="exact_match" if report["arguments"]["match"] == "exact" else "accuracy",
            metric_name=f"{report['arguments']['match']} match, n = {result['n']:,}, {what}",
            metric_value=round(value, 4),
        )
    ]


def _results(entry: dict[str, Any]) -> str:
    report, name = entry["report"], entry["name"]
    first = report["models"][0]["name"]
    parts = [
        f"On {report['dataset']['name']} (split `{report['arguments']['dataset_split']}`, {report['rows']:,} "
        f"questions), this checkpoint is **{name}**. Share of correct answers, with 95 % intervals:",
        overall_table(report).markdown(),
    ]
    for group in report["groups"]:
        for table in (distance_table(report, group), difference_table(report, group, first)):
            if table is not None:
                parts += [f"**{table.title}**", table.markdown()]
    if len(intact_names(report)) > 1:
        parts.append(difference_guide(first))
    parts += [f"- {line}" for line in remarks(report, only_intact=True)]
    parts.append("\n".join(f"- {line}" for line in checkpoint_lines(report)))
    if entry.get("picture"):
        parts.insert(1, f"![Accuracy by distance and by depth]({PICTURE})")
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser("python -m pvm card", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="Folder of a checkpoint, in which the card is written.")
    parser.add_argument("--report", type=Path, nargs="*", default=[], help="report.json of evaluations by eval.py.")
    parser.add_argument("--name", help="What the card calls it, e.g. YOUR_NAME/REPOSITORY; the folder's by default.")
    parser.add_argument("--license", default="apache-2.0", help="Of these weights, as the Hub abbreviates it.")
    args = parser.parse_args(arguments)
    if not (args.checkpoint / CONFIG_NAME).is_file() and not (args.checkpoint / "adapter_config.json").is_file():
        raise UserError(f"{args.checkpoint} is no checkpoint: it has no config.json and no adapter_config.json.")
    reports = []
    for number, path in enumerate(args.report):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            models = report["models"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is no report.json of eval.py: {error}") from error
        mine = [m for m in models if Path(m["path"]).resolve() == args.checkpoint.resolve()]
        if not mine:
            paths = ", ".join(dict.fromkeys(model["path"] for model in models))
            raise UserError(f"{path} is a report on {paths}, and {args.checkpoint} is none of them.")
        picture = path.with_name("report.png")
        if number == 0 and picture.is_file():
            shutil.copy(picture, args.checkpoint / PICTURE)
        report = {"name": mine[0]["name"], "run": mine[0]["run"], "report": report}
        reports.append({**report, "picture": number == 0 and picture.is_file()})
    write_card(args.checkpoint, args.name or args.checkpoint.resolve().name, reports, args.license)
    print(f"Written: {args.checkpoint / CARD}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, SafetensorError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"pvm card: error: {error}")
