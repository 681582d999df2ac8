"""
Evaluate one or several checkpoints side by side: how often they are right, what that rests on, what happens inside.

The embedded default, after train.py has made the two checkpoints (no GPU, no network):

    python eval.py --config recipes/digits_eval.yaml

Your own conversations (a file, a folder or a Hub name; docs/data.md shows the forms of rows):

    python eval.py --model Qwen/Qwen3-VL-8B-Instruct runs/qwen3-vl-8b-pvm --names base PVM \\
        --dataset_name my_data --dataset_split test --output_dir runs/my_eval \\
        --knock_outs branch_off another_memory hidden_image blind

A checkpoint is a stock Qwen3-VL, a PVM model (this project's or the authors'), a control, or a PEFT adapter. The last
assistant turn of a row is the answer to compare with. Written are report.html (everything on one page), report.md with
its pictures, report.json, and predictions/ (every answer). The same line goes on with an evaluation that was
interrupted.

Public benchmarks, through lmms-eval (docs/benchmarks.md):

    python eval.py --model Qwen/Qwen3-VL-8B-Instruct runs/qwen3-vl-8b-pvm --names base PVM \\
        --tasks mmstar,mathvision_testmini --temperature 0.7 --runs 3 --output_dir runs/my_benchmarks
"""

import pvm  # noqa: F401, I001  (first: it makes torchvision importable where its compiled operators are missing)

import hashlib
import json
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from tqdm import tqdm
from transformers import ProcessorMixin

from pvm.evaluation.answering import answer
from pvm.evaluation.matching import MATCHES
from pvm.arguments import parse_arguments, refuse_flags
from pvm.lmms.run import BenchmarkArguments, run_benchmarks
from pvm.checkpoints.loading import (
    Checkpoint,
    branch_layers,
    checkpoint_kind,
    checkpoint_state,
    load_checkpoint,
    processor_of,
)
from pvm.errors import UserError
from pvm.evaluation.ablations import (
    KNOCK_OUTS,
    NEEDS_BRANCHES,
    NEEDS_MEMORY,
    ChangedImages,
    KnockOut,
    knock_outs,
    refuse_videos,
)
from pvm.evaluation.page import html_page
from pvm.evaluation.plots import draw_all
from pvm.evaluation.diagnostics import choose_rows, probe, summarise
from pvm.evaluation.questions import Prompts, answer_limit, check_references, piece_depths, read_questions
from pvm.evaluation.report import checkpoint_lines, findings, markdown_report, remarks, rich_tables
from pvm.evaluation.scoring import Entry, make_records, score_all
from pvm.data.sources import Conversations, load_conversations
from pvm.evaluation.unfinished import Unfinished
from pvm.checkpoints.names import public_name
from pvm.data.encoding import processor_state
from pvm.variants import VARIANTS, WITH_MEMORY


MAX_GROUPS = 8
UNFINISHED = "unfinished"  # folder in output_dir
REPORT_FILES = ("report.json", "report.md", "report.html", "report.png", "probes.json")
# Flags that --tasks takes, too; the others are about a data set.
WITH_TASKS = ("model", "names", "output_dir", "max_samples", "batch_size", "max_new_tokens", "dtype", "overwrite")


@dataclass(kw_only=True)
class EvalArguments:
    """What is evaluated, and on what."""

    model: list[str] = field(
        metadata={"help": "Checkpoints: folders or Hub names. The first is compared with the others."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A .json, .jsonl or .parquet file, a folder of those, or a Hub name. docs/data.md shows the forms "
            "that rows may have."
        },
    )
    output_dir: str = field(metadata={"help": "Where the report goes."})
    names: list[str] | None = field(
        default=None,
        metadata={
            "help": "What the report calls the checkpoints; by default the end of their paths. Several with the same "
            "name are runs of one method (seeds), and are reported together (but not with --tasks)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="test", metadata={"help": "E.g. `test` or `test[:1000]`."})
    max_samples: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate on so many rows only, spread evenly over the data set; with --tasks the first ones."
        },
    )
    group_by: str | None = field(
        default=None, metadata={"help": "Column, e.g. of task names, whose values are reported apart."}
    )
    knock_outs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What to take from each model, beside the intact one, to see what its answers rest on: "
            + "; ".join(f"`{kind}`, {what}" for kind, what in KNOCK_OUTS.items())
            + ".",
            "choices": tuple(KNOCK_OUTS),
        },
    )
    match: str = field(
        default="exact",
        metadata={
            "help": "When an answer is right: it is the reference's text, whatever its case and spaces (`exact`), "
            "chooses its option (`choice`: B, (B), The answer is B), gives its number (`number`), or is the same "
            "mathematical object in LaTeX or plain (`math`, needs math-verify).",
            "choices": tuple(MATCHES),
        },
    )
    scored_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression for the pieces of an answer that are scored by depth, each being right if it "
            "is the reference's text. By default every word with `--match exact`, otherwise none."
        },
    )
    probe_rows: int = field(
        default=8,
        metadata={
            "help": "Rows of each group on which to look inside the first run of each model: where attention goes, "
            "when the prediction is made, what branches add. 0: none."
        },
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Rows that are answered at once; 32 by default, 1 with --tasks."}
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest answer in tokens. By default the next power of two that leaves 8 tokens more than the "
            "row's reference answer takes: too few for a model that thinks aloud before a short answer."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the models; `auto` is the checkpoint's.",
            "choices": ("auto", "float32", "bfloat16", "float16"),
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace what is in output_dir already: a report, or what was begun with other arguments."},
    )

    def __post_init__(self):
        # A word that is not the reference's may be right, where an option or a number is what counts.
        if self.scored_pattern is None and self.match == "exact":
            self.scored_pattern = r"\S+"


@dataclass
class Model:
    """
    One of the checkpoints.

    name (`str`): in the report; several runs of one method share it.
    run (`int`): which of them.
    label (`str`): this one's own name.
    path (`str`): folder or Hub name.
    """

    name: str
    run: int
    label: str
    path: str


def name_models(arguments: EvalArguments) -> list[Model]:
    """
    What the report calls the models. A name that several have is that of a method, and they are its runs.

    Raises:
        UserError: if the names are not as many as the models, or no file names; if two models have the same path.
    """
    names = arguments.names or [
        Path(path).resolve().name if Path(path).is_dir() else path.rpartition("/")[2] for path in arguments.model
    ]
    if len(names) != len(arguments.model):
        raise UserError(f"--names has {len(names)} names for {len(arguments.model)} models. Give each model one.")
    if arguments.names is None and len(set(names)) != len(names):
        raise UserError(f"Two models would both be called one of {', '.join(names)}. Tell them apart with --names.")
    if len({Path(path).resolve() if Path(path).is_dir() else path for path in arguments.model}) < len(names):
        raise UserError("--model names a checkpoint twice. Name each once.")
    models = []
    for name, path in zip(names, arguments.model):
        if not re.fullmatch(r"[\w.+ -]{1,80}", name, re.ASCII) or " - " in name:
            raise UserError(
                f"{name!r} cannot be what the report calls {path}. Choose with --names up to 80 plain letters, "
                "digits, spaces and . _ + -, and no dash between spaces: it becomes a file name, and knock-outs' have "
                "such a dash."
            )
        run = sum(model.name == name for model in models)
        models.append(Model(name, run, name if names.count(name) == 1 else f"{name} run {run + 1}", path))
    labels = [model.label for model in models]
    if len(set(labels)) != len(labels):
        raise UserError(f"--names: two models would both be called one of {', '.join(labels)}.")
    return models


def report_files(output_dir: Path) -> list[Path]:
    """What is there of a report."""
    named = [output_dir / file for file in REPORT_FILES]
    pictures, predictions = output_dir.glob("report_*.png"), output_dir.glob("predictions/*.jsonl")
    return [file for file in (*named, *pictures, *predictions) if file.exists()]


def check_output(output_dir: Path, overwrite: bool) -> None:
    """
    Make the folder.

    Raises:
        UserError: if a report is there and may not be overwritten, or files that are not this script's.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    old = report_files(output_dir)
    if output_dir / "report.json" in old and not overwrite:
        raise UserError(f"{output_dir} holds a report already. Choose another --output_dir, or give --overwrite true.")
    if old and output_dir / "report.json" not in old and not (output_dir / UNFINISHED).is_dir():
        raise UserError(f"{old[0]} is no part of a report, and would be overwritten. Choose another --output_dir.")


def load_rows(arguments: EvalArguments) -> Conversations:
    """
    The conversations to evaluate on.

    Raises:
        UserError: if there are none, or the column to group by does not fit.
    """
    conversations = load_conversations(arguments.dataset_name, arguments.dataset_split, arguments.dataset_config)
    column = arguments.group_by
    if column is not None:
        groups = conversations.column(column)
        if all(group is None for group in groups):
            columns = ", ".join(conversations.columns)
            raise UserError(f"--group_by {column}: no row has a value there; the columns are {columns}.")
        values = len(set(map(str, groups)))
        if values > MAX_GROUPS:
            raise UserError(f"--group_by {column}: it has {values} values, and at most {MAX_GROUPS} make a report.")
    return conversations.sample(arguments.max_samples)


def check(arguments: EvalArguments) -> list[Model]:
    """
    Find out what is wrong with the command line before any time is spent.

    Returns:
        `list[Model]`: the models.

    Raises:
        UserError: for anything that is wrong.
    """
    models = name_models(arguments)
    for flag, least in (("max_samples", 1), ("batch_size", 1), ("max_new_tokens", 1), ("probe_rows", 0)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: give a number from {least}.")
    if arguments.scored_pattern is not None:
        try:
            re.compile(arguments.scored_pattern)
        except re.error as error:
            raise UserError(f"--scored_pattern {arguments.scored_pattern}: no regular expression: {error}.") from error
        if re.match(arguments.scored_pattern, ""):
            raise UserError(
                f"--scored_pattern {arguments.scored_pattern!r} matches nothing at all, too, at any place."
            )
    kinds = {checkpoint_kind(path) for path in arguments.model}
    for kind in arguments.knock_outs:
        takers = WITH_MEMORY if kind in NEEDS_MEMORY else ("pvm", *VARIANTS)
        if kind in NEEDS_BRANCHES and not kinds & set(takers):
            raise UserError(f"--knock_outs {kind}: none of the models has PVM branches to take it from.")
    return models


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    packages = ("torch", "transformers", "peft", "datasets", "evaluate")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


class Evaluation:
    """
    One run of this script: the questions, and what each model makes of them.

    Args:
        arguments (`EvalArguments`), models (`list[Model]`): checked.
        conversations (`Conversations`): the rows.

    Raises:
        UserError: for rows that do not fit what is asked for, and as [`Unfinished`].
    """

    def __init__(self, arguments: EvalArguments, models: list[Model], conversations: Conversations):
        self.arguments, self.models, self.conversations = arguments, models, conversations
        self.prompts: Prompts | None = None
        self.prompts_state: str | None = None

        # Distance and depth are measured in the first model's tokens, so that all share one axis.
        processor = processor_of(models[0].path)
        prompts = self._prompts(processor)
        self.questions = read_questions(
            conversations, arguments.group_by, arguments.scored_pattern, processor.tokenizer
        )
        for question, distance in zip(self.questions, prompts.distances):
            question.distance = distance
        check_references(self.questions, arguments.match, arguments.dataset_name)
        self.probed = choose_rows(self.questions, arguments.probe_rows)

        of_images = [kind for kind in arguments.knock_outs if kind not in ("branch_off", "branch_alone")]
        if of_images and all(question.distance is None for question in self.questions):
            raise UserError(f"--knock_outs {' '.join(of_images)}: no row of {arguments.dataset_name} has an image.")
        if of_images:
            refuse_videos(conversations)
        self.changed = {
            kind: ChangedImages(conversations, blank=kind == "blank_image")
            for kind in of_images
            if kind in ("blank_image", "another_image", "another_memory")
        }

        settings = {key: value for key, value in asdict(arguments).items() if key not in ("overwrite", "output_dir")}
        rows = hashlib.sha256(json.dumps([asdict(question) for question in self.questions]).encode())
        settings |= {"rows": [prompts.sha256, rows.hexdigest()], "versions": versions()}
        for path in arguments.model:
            settings[f"state of {path}"] = checkpoint_state(path)
        self.unfinished = Unfinished(Path(arguments.output_dir) / UNFINISHED, settings, arguments.overwrite)

    def run(self) -> dict[str, Any]:
        """
        Answer and probe what has not been yet.

        Returns:
            `dict`: `models` as in report.json, `records` `{label: records}`, `probes` `{name: results}`.
        """
        result: dict[str, Any] = {"models": [], "records": {}, "probes": {}}
        texts: list[str] = []  # the first model's answers, which all are made to write for the probes
        for model in self.models:
            checkpoint = None
            layers = branch_layers(model.path)
            reads_images = checkpoint_kind(model.path) in WITH_MEMORY
            for knock_out in knock_outs(self.arguments.knock_outs, layers, reads_images):
                label = f"{model.label}{knock_out.name}"
                part = self.unfinished.load(label)
                if part is None:
                    checkpoint = checkpoint or load_checkpoint(model.path, self.arguments.dtype)
                    part = self._answer(model, checkpoint, knock_out, label)
                    self.unfinished.save(label, part)
                result["models"].append(part["model"])
                result["records"][label] = part["records"]
            texts = texts or [record["prediction"] for record in result["records"][model.label]]
            if model.run == 0 and self.probed:
                part = self.unfinished.load(f"{model.label} - probes")
                if part is None:
                    checkpoint = checkpoint or load_checkpoint(model.path, self.arguments.dtype)
                    part = self._probe(checkpoint, model.label, texts)
                    self.unfinished.save(f"{model.label} - probes", part)
                result["probes"][model.name] = part
        return result

    def _prompts(self, processor: ProcessorMixin) -> Prompts:
        state = processor_state(processor)
        if state != self.prompts_state:
            self.prompts, self.prompts_state = Prompts(self.conversations, processor), state
        return self.prompts

    def _answer(self, model: Model, checkpoint: Checkpoint, knock_out: KnockOut, label: str) -> dict[str, Any]:
        arguments, processor = self.arguments, checkpoint.processor
        made, others = self._prompts(processor), None
        if knock_out.kind in ("blank_image", "another_image"):
            made = Prompts(self.changed[knock_out.kind], processor)
        elif knock_out.kind == "another_memory":
            others = Prompts(self.changed[knock_out.kind], processor)
        limits = [
            arguments.max_new_tokens or answer_limit(question.reference, processor.tokenizer)
            for question in self.questions
        ]
        start, journal = time.perf_counter(), self.unfinished.journal(label)
        goes_on = journal.exists()
        answers = answer(checkpoint, made, limits, arguments.batch_size or 32, label, knock_out, others, journal)
        description = checkpoint.description
        return {
            "model": {
                **asdict(description),
                "base": description.base and public_name(description.base)["name"],  # a report is shown to others
                "name": f"{model.name}{knock_out.name}",
                "run": model.run,
                "label": label,
                "knock_out": knock_out.kind,
                "intact": None if knock_out.kind == "nothing" else model.name,
                "gates_on": description.gates_on,
                "answers_cut": sum(answer.cut for answer in answers),
                "seconds": None if goes_on else round(time.perf_counter() - start, 1),
            },
            "records": make_records(self.questions, answers, arguments.match),
        }

    def _probe(self, checkpoint: Checkpoint, label: str, texts: list[str]) -> list[dict[str, Any]]:
        prompts = self._prompts(checkpoint.processor)
        results = []
        for index in tqdm(self.probed, desc=f"{label} - probes", unit="row"):
            question = self.questions[index]
            depths = piece_depths(texts[index], self.arguments.scored_pattern, checkpoint.processor.tokenizer)
            seen = probe(checkpoint, prompts, index, texts[index], depths)
            about = {"row": question.row, "group": question.group, "question": question.question}
            results.append({"index": index, **about, **seen})
        return results


def main(arguments: list[str] | None = None) -> None:
    args, benchmarks = parse_arguments((EvalArguments, BenchmarkArguments), __doc__, arguments)
    models = check(args)
    if benchmarks.tasks:
        refuse_flags(args, WITH_TASKS, "is about a data set, and does nothing with --tasks")
        shared = {name: vars(args)[name] for name in ("dtype", "max_samples", "max_new_tokens", "overwrite")}
        paths = {model.label: model.path for model in models}
        run_benchmarks(paths, benchmarks, Path(args.output_dir), batch_size=args.batch_size or 1, **shared)
        return
    refuse_flags(benchmarks, (), "does nothing without --tasks")
    if args.dataset_name is None:
        raise UserError("Nothing to evaluate on: give --dataset_name, or --tasks.")
    conversations = load_rows(args)
    output_dir = Path(args.output_dir)
    check_output(output_dir, args.overwrite)
    evaluation = Evaluation(args, models, conversations)
    result = evaluation.run()

    names = dict.fromkeys(model["name"] for model in result["models"])
    entries = []
    for name in names:
        runs = [model for model in result["models"] if model["name"] == name]
        entries.append(Entry(name, [result["records"][model["label"]] for model in runs], runs[0]["intact"]))
    report = {
        "arguments": asdict(args),
        "dataset": public_name(args.dataset_name),
        "rows": len(conversations),
        "versions": versions(),
        "models": result["models"],
        **score_all(entries, args.scored_pattern, args.match),
        "probes": summarise(result["probes"]),
    }
    for file in report_files(output_dir):
        file.unlink()
    (output_dir / "predictions").mkdir(exist_ok=True)
    for label, records in result["records"].items():
        with open(output_dir / "predictions" / f"{label}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if result["probes"]:
        (output_dir / "probes.json").write_text(json.dumps(result["probes"]) + "\n", encoding="utf-8")
    pictures = draw_all(report, result["probes"], conversations, output_dir)
    text = markdown_report(report, pictures)
    (output_dir / "report.md").write_text(text, encoding="utf-8")
    (output_dir / "report.html").write_text(html_page(text, output_dir), encoding="utf-8")
    # Last, because with it the evaluation is over.
    (output_dir / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    evaluation.unfinished.remove()

    console = Console(soft_wrap=True)
    for line in [*checkpoint_lines(report), *remarks(report)]:
        console.print(line, highlight=False, markup=False)
    for table in rich_tables(report):
        console.print(table)
    for line in findings(report):
        console.print(f"- {line}", highlight=False, markup=False)
    print(f"\nWritten: {output_dir}/report.html (all in one page), report.md, report.json, predictions/")


if __name__ == "__main__":
    try:
        main()
    except (UserError, StrictDataclassError, OSError) as error:
        sys.exit(f"eval.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("eval.py: interrupted. The same line goes on with it.")
