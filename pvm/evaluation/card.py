"""
Put the results of evaluations into the model card of a checkpoint:

    python -m pvm card runs/digits_pvm --report runs/digits_eval/report.json

The card is written anew from the checkpoint's own files and the report.json of each evaluation.
"""

import json
import shutil
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from transformers.utils import CONFIG_NAME

from pvm.checkpoints.card import CARD, Results, write_card
from pvm.errors import UserError
from pvm.evaluation.report import checkpoint_lines, difference_guide, remarks
from pvm.evaluation.tables import difference_table, distance_table, intact_names, overall_table
from pvm.terminal import Terminal


PICTURE = "results.png"


def read_report(path: Path, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    A report.json, and its entry in `models` for a checkpoint.

    Raises:
        UserError: if the file is not a report, or the checkpoint is not in it.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        models = report["models"]
        if any("ablation" not in model for model in models):
            raise KeyError("its models have no `ablation`; evaluate again, an earlier version wrote it")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a report.json written by eval.py: {error}") from error
    for model in models:
        if Path(model["path"]).resolve() == checkpoint.resolve():
            return report, model
    paths = ", ".join(dict.fromkeys(model["path"] for model in models))
    raise UserError(f"{path} reports on {paths}, and {checkpoint} is not one of them.")


def results_of(report: dict[str, Any], model: dict[str, Any], has_picture: bool) -> Results:
    """
    What a report says about one of its models.

    Args:
        has_picture (`bool`): whether the card shows `PICTURE`.
    """
    name, first = model["name"], report["models"][0]["name"]
    parts = [
        f"On {report['dataset']['name']} (split `{report['arguments']['dataset_split']}`, {report['rows']:,} "
        f"questions), this checkpoint is **{name}**. Share of correct answers, with 95 % intervals:",
        overall_table(report).markdown(),
    ]
    if has_picture:
        parts.insert(1, f"![Accuracy by distance and by depth]({PICTURE})")
    for group in report["groups"]:
        for table in (distance_table(report, group), difference_table(report, group, first)):
            if table is not None:
                parts += [f"**{table.title}**", table.markdown()]
    if len(intact_names(report)) > 1:
        parts.append(difference_guide(first))
    parts.append("\n".join(f"- {line}" for line in [*remarks(report, only_intact=True), *checkpoint_lines(report)]))
    return Results("\n\n".join(parts), [_metric(report, model)])


def _metric(report: dict[str, Any], model: dict[str, Any]) -> EvalResult:
    arguments, result = report["arguments"], report["overall"][model["name"]]
    low, high = result["interval"]
    what, value = f"95 % interval {low:.3f} to {high:.3f}", result["accuracy"]
    if "by_run" in result:
        what, value = f"{len(result['by_run'])} runs: {value:.3f}, {what}; this one", result["by_run"][model["run"]]
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=report["dataset"]["name"],
        dataset_name=report["dataset"]["name"],
        dataset_split=arguments["dataset_split"],
        metric_type="exact_match" if arguments["match"] == "exact" else "accuracy",
        metric_name=f"{arguments['match']} match, n = {result['n']:,}, {what}",
        metric_value=round(value, 4),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser("python -m pvm card", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="Folder of the checkpoint; the card is written into it.")
    parser.add_argument("--report", type=Path, nargs="*", default=[], help="report.json of evaluations by eval.py.")
    parser.add_argument("--name", help="Title of the card, e.g. YOUR_NAME/REPOSITORY; by default the folder's name.")
    parser.add_argument("--license", default="apache-2.0", help="Licence of the weights, as the Hub abbreviates it.")
    args = parser.parse_args(arguments)
    folder = args.checkpoint
    if not any((folder / file).is_file() for file in (CONFIG_NAME, PEFT_CONFIG_NAME)):
        raise UserError(f"{folder} is not a checkpoint: it has neither {CONFIG_NAME} nor {PEFT_CONFIG_NAME}.")
    results = []
    for number, path in enumerate(args.report):
        report, model = read_report(path, folder)
        picture = path.with_name("report.png")
        has_picture = number == 0 and picture.is_file()  # the card shows that of the first report
        if has_picture:
            shutil.copy(picture, folder / PICTURE)
        results.append(results_of(report, model, has_picture))
    write_card(folder, args.name or folder.resolve().name, results, args.license)
    Terminal().print(f"Written: {folder / CARD}")
