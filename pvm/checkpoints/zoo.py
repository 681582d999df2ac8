"""
A table of checkpoints, in folders or on the Hub:

    pvm zoo runs/digits_pvm YOUR_NAME/qwen3-vl-8b-pvm --output docs/zoo.md

It says what their own cards, records and configs say. Results are those in a card's metadata, where `pvm card` puts
them. No weights are read.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from tqdm import tqdm
from transformers.utils import CONFIG_NAME

from pvm.checkpoints.card import CARD
from pvm.checkpoints.names import LARGEST_JSON, base_of, public_name
from pvm.checkpoints.record import RECORD, training_metadata
from pvm.checkpoints.stored import Files, list_files
from pvm.errors import UserError, reason
from pvm.files import write_atomically
from pvm.terminal import Terminal


HUB = "https://huggingface.co"
TITLE = "# Model zoo"
INTRODUCTION = """
What these checkpoints' own cards and records say, collected by `pvm zoo NAME ... --output docs/zoo.md`; the names are
folders or repositories, all that the table is to have. Training writes card and record, and `pvm card` adds results.
"""
HEADER = ("checkpoint", "base", "stages", "image dropout", "data", "results")


def zoo_row(name: str) -> list[str]:
    """
    The line of a checkpoint in Markdown, by the columns of `HEADER`.

    Args:
        name (`str`): folder or Hub name.

    Raises:
        UserError: if there is no such checkpoint, or one of these files is damaged.
    """
    files, base = list_files(name, "main"), base_of(name)
    record, config, results = files.json(RECORD), files.json(CONFIG_NAME), _results(files)
    try:
        text = config.get("text_config", {})
        block = text.get("pvm_block", "pvm") if "pvm_layers" in text else "pvm"
        stages = _stages(training_metadata(record) if record else text.get("pvm_training"))
        trained_from = next((stage["base_model"] for stage in stages if stage["base_model"]), base and base[0])
        unfinished = f" of {record['steps']:,}" if record and record["step"] < record["steps"] else ""
        # GRPO has no image dropout.
        dropout = [stage["image_dropout"] for stage in stages if stage.get("stage", "sft") == "sft"]
        return [
            _mention(str(Path(name).resolve()) if files.local else name),
            _mention(trained_from) if trained_from else "not recorded",
            "; then ".join(_describe(stage, block) for stage in stages) + unfinished or "not recorded",
            ", ".join(f"with, {share:g}" if share else "without" for share in dropout) or "not recorded",
            "; ".join(_datasets(record)) or "not recorded",
            "<br>".join(results) or "not evaluated",
        ]
    except Exception as error:  # files from the Hub may hold anything
        raise UserError(f"{name}: {RECORD} or {CONFIG_NAME} is damaged: {reason(error)}. Get it again.") from error


def _stages(training: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Of a training as [`training_metadata`] describes it, the first one first."""
    return [] if not training else [*_stages(training.get("previous")), training]


def _describe(stage: dict[str, Any], block: str) -> str:
    method = (stage["method"] or "unknown method") + (f" ({block})" if block != "pvm" else "")
    return _cell(f"{stage.get('stage', 'sft').upper()}: {method}, step {stage['step']:,}")


def _datasets(record: dict[str, Any]) -> list[str]:
    """Those of all stages."""
    if not record:
        return []
    names = [
        dataset["name"] if dataset["on_hub"] else f"{dataset['name']} (a local file)" for dataset in record["datasets"]
    ]
    return list(dict.fromkeys([*_datasets(record.get("previous") or {}), *map(_cell, names)]))


def _results(files: Files) -> list[str]:
    """
    Those in the metadata of the card.

    Raises:
        UserError: if the metadata are damaged.
    """
    if CARD not in files.sizes:
        return []
    try:
        with files.open(CARD) as file:
            card = ModelCard(file.read(LARGEST_JSON).decode())
        lines = []
        for result in card.data.eval_results or []:
            about = (result.dataset_name, result.dataset_split, result.metric_name or result.metric_type)
            lines.append(_cell(f"{', '.join(filter(None, about))}: **{float(result.metric_value):g}**"))
        return lines
    except Exception as error:
        raise UserError(f"{files.name}/{CARD} is not a model card: {reason(error)}.") from error


def _mention(name: str) -> str:
    """A model by its name; with a link, if it is on the Hub."""
    public = public_name(name)
    return f"[{_cell(name)}]({HUB}/{name})" if public["on_hub"] else _cell(public["name"])


def _cell(text: str) -> str:
    """Escaped: names may contain what ends a cell or a row, or what is read as HTML."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def zoo_page(rows: Sequence[Sequence[str]]) -> str:
    """The page in Markdown; of each row its columns as [`zoo_row`] returns them."""
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else "None yet."
    return f"{TITLE}\n{INTRODUCTION}\n{table}\n"


def main(arguments: list[str] | None = None) -> None:
    """The command `pvm zoo`."""
    parser = ArgumentParser("pvm zoo", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="*", help="Folders or Hub names; without any, an empty page.")
    parser.add_argument(
        "--output", type=Path, help="A Markdown file, which is written anew. By default the page is printed."
    )
    args = parser.parse_args(arguments)
    output = args.output
    if output is not None and output.exists() and not output.read_bytes().startswith(f"{TITLE}\n".encode()):
        raise UserError(f"{output} is not a page of this command, and would be overwritten. Choose another --output.")
    page = zoo_page([zoo_row(name) for name in tqdm(args.checkpoint, unit="checkpoint", leave=False, disable=None)])
    if output is None:
        Terminal().print(page, end="")
    else:
        write_atomically(output, page)
        Terminal().print(f"Written: {output}")
