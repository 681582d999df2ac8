"""One evaluation: from the rows of a data set to the files of its report."""

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import ProcessorMixin

from pvm.checkpoints.loading import Checkpoint, load_checkpoint, processor_of
from pvm.checkpoints.names import checkpoint_state, public_name
from pvm.data.encoding import processor_state
from pvm.data.sources import Conversations, load_conversations
from pvm.errors import UserError
from pvm.evaluation.ablations import (
    CHANGED_IMAGES,
    OF_BRANCHES,
    Ablation,
    ChangedImages,
    ablations_of,
    refuse_videos,
)
from pvm.evaluation.answering import answer, answer_with_vllm
from pvm.evaluation.arguments import EvalArguments, Model
from pvm.evaluation.diagnostics import choose_rows, diagnose, summarise
from pvm.evaluation.page import html_page
from pvm.evaluation.plots import draw_all
from pvm.evaluation.progress import Progress
from pvm.evaluation.questions import Prompts, answer_limit, check_references, piece_depths, read_questions
from pvm.evaluation.report import markdown_report
from pvm.evaluation.scoring import Entry, make_records, score_all
from pvm.files import write_atomically


if TYPE_CHECKING:  # an extra
    from pvm.vllm.engine import Engine


MAX_GROUPS = 8
PACKAGES = ("torch", "transformers", "peft", "datasets", "evaluate")
UNFINISHED = "unfinished"  # folder in output_dir
REPORT_FILES = ("report.json", "report.md", "report.html", "report.png", "diagnostics.json")


def evaluate(arguments: EvalArguments, models: list[Model]) -> dict[str, Any]:
    """
    Evaluate models and write the report, or resume that.

    Args:
        models (`list[Model]`): as checked by [`check_arguments`].

    Returns:
        `dict`: the content of report.json.

    Raises:
        UserError: if the rows do not fit the arguments, or `output_dir` holds something else.
    """
    conversations = load_rows(arguments)
    output_dir = Path(arguments.output_dir)
    check_output(output_dir, arguments.overwrite)
    evaluation = Evaluation(arguments, models, conversations)
    described, records, diagnostics = evaluation.run()

    entries = []
    for name in dict.fromkeys(model["name"] for model in described):
        runs = [model for model in described if model["name"] == name]
        entries.append(Entry(name, [records[model["label"]] for model in runs], runs[0]["intact"]))
    report = {
        "arguments": asdict(arguments),
        "dataset": public_name(arguments.dataset_name),
        "rows": len(conversations),
        "versions": versions(arguments.backend),
        "models": described,
        **score_all(entries, arguments.scored_pattern, arguments.match),
        "diagnostics": summarise(diagnostics),
    }
    write_report(output_dir, report, records, diagnostics, conversations)
    evaluation.progress.remove()
    return report


def load_rows(arguments: EvalArguments) -> Conversations:
    """
    The conversations to evaluate on.

    Raises:
        UserError: if there are none, or `group_by` is not a column with few values.
    """
    conversations = load_conversations(
        arguments.dataset_name,
        arguments.dataset_split,
        arguments.dataset_config,
        arguments.image_root,
        arguments.allow_image_urls,
    )
    column = arguments.group_by
    if column is not None:
        groups = conversations.column(column)
        if all(group is None for group in groups):
            columns = ", ".join(conversations.columns)
            raise UserError(f"--group_by {column}: no row has a value in this column. The columns are {columns}.")
        values = len(set(map(str, groups)))
        if values > MAX_GROUPS:
            raise UserError(f"--group_by {column}: it has {values} values; a report has at most {MAX_GROUPS} groups.")
    return conversations.sample(arguments.max_samples)


def report_files(output_dir: Path) -> list[Path]:
    """The files of a report that exist."""
    named = [output_dir / file for file in REPORT_FILES]
    pictures, predictions = output_dir.glob("report_*.png"), output_dir.glob("predictions/*.jsonl")
    return [file for file in (*named, *pictures, *predictions) if file.exists()]


def check_output(output_dir: Path, overwrite: bool) -> None:
    """
    Raises:
        UserError: if it holds a report that may not be overwritten, or other files with the names of a report's.
    """
    old = report_files(output_dir)
    if output_dir / "report.json" in old:
        if not overwrite:
            raise UserError(f"{output_dir} already holds a report. Choose another --output_dir or --overwrite true.")
    elif old and not (output_dir / UNFINISHED).is_dir():
        raise UserError(f"{old[0]} is not part of a report and would be overwritten. Choose another --output_dir.")


def write_report(
    output_dir: Path,
    report: dict[str, Any],
    records: dict[str, list[dict[str, Any]]],
    diagnostics: dict[str, list[dict[str, Any]]],
    conversations: Conversations,
) -> None:
    """Write all files of a report; report.json, which marks it as finished, last."""
    for file in report_files(output_dir):
        file.unlink()
    (output_dir / "predictions").mkdir(exist_ok=True)
    for label, lines in records.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(output_dir / "predictions" / f"{label}.jsonl", text)
    if diagnostics:
        write_atomically(output_dir / "diagnostics.json", json.dumps(diagnostics) + "\n")
    text = markdown_report(report, draw_all(report, diagnostics, conversations, output_dir))
    write_atomically(output_dir / "report.md", text)
    write_atomically(output_dir / "report.html", html_page(text, output_dir))
    write_atomically(output_dir / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def versions(backend: str, packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of the packages on which the numbers depend."""
    found = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    if backend == "vllm":
        import vllm  # whose package has other names, too

        found["vllm"] = vllm.__version__
    return found


class Evaluation:
    """
    The questions, and what the models do with them. Finished parts are kept in `progress`.

    Args:
        arguments (`EvalArguments`), models (`list[Model]`): checked.
        conversations (`Conversations`): the rows.

    Raises:
        UserError: if the rows do not fit the arguments, and see [`Progress`].
    """

    def __init__(self, arguments: EvalArguments, models: list[Model], conversations: Conversations):
        self.arguments, self.models, self.conversations = arguments, models, conversations
        self.prompts: Prompts | None = None
        self.prompts_state: str | None = None

        # Distance, depth and length are in tokens of the first model, so that they are the same for all.
        processor = processor_of(models[0].path)
        prompts = self._prompts(processor)
        self.questions = read_questions(
            conversations, arguments.group_by, arguments.scored_pattern, processor.tokenizer
        )
        for question, distance in zip(self.questions, prompts.distances):
            question.distance = distance
        check_references(self.questions, arguments.match, arguments.dataset_name)
        self.diagnosed = choose_rows(self.questions, arguments.diagnostic_rows)

        of_images = [kind for kind in arguments.ablations if kind not in OF_BRANCHES]
        if of_images and all(question.distance is None for question in self.questions):
            raise UserError(f"--ablations {' '.join(of_images)}: no row of {arguments.dataset_name} has an image.")
        if of_images:
            refuse_videos(conversations)
        self.changed = {
            kind: ChangedImages(conversations, blank=kind == "blank_image")
            for kind in of_images
            if kind in CHANGED_IMAGES
        }

        unimportant = ("overwrite", "output_dir", "backend")  # the last is told by the versions
        settings = {key: value for key, value in asdict(arguments).items() if key not in unimportant}
        rows = hashlib.sha256(json.dumps([asdict(question) for question in self.questions]).encode())
        settings |= {"rows": [prompts.sha256, rows.hexdigest()], "versions": versions(arguments.backend)}
        for path in arguments.model:
            settings[f"state of {path}"] = checkpoint_state(path)
        self.progress = Progress(Path(arguments.output_dir) / UNFINISHED, settings, arguments.overwrite)

    def run(self) -> tuple[list[dict[str, Any]], dict[str, list[dict]], dict[str, list[dict]]]:
        """
        Answer and diagnose what has not been yet.

        Returns:
            `models` as in report.json, records by label, and results of [`diagnose`] by name.
        """
        models, records, diagnostics = [], {}, {}
        texts: list[str] = []  # the first model's answers, which all models write for their diagnostics
        for model in self.models:
            loaded: Checkpoint | Engine | None = None
            with ExitStack() as stack:
                for ablation in ablations_of(model.path, self.arguments.ablations):
                    label = f"{model.label}{ablation.suffix}"
                    part = self.progress.load(label)
                    if part is None:
                        loaded = loaded or self._load(model.path, stack)
                        part = self._answer(model, loaded, ablation, label)
                        self.progress.save(label, part)
                    models.append(part["model"])
                    records[label] = part["records"]
            texts = texts or [record["prediction"] for record in records[model.label]]
            if model.run == 0 and self.diagnosed:
                label = f"{model.label} - diagnostics"
                part = self.progress.load(label)
                if part is None:
                    loaded = loaded or load_checkpoint(model.path, self.arguments.dtype)
                    part = self._diagnose(loaded, label, texts)
                    self.progress.save(label, part)
                diagnostics[model.name] = part
        return models, records, diagnostics

    def _prompts(self, processor: ProcessorMixin) -> Prompts:
        state = processor_state(processor)
        if state != self.prompts_state:
            self.prompts, self.prompts_state = Prompts(self.conversations, processor), state
        return self.prompts

    def _limits(self, processor: ProcessorMixin) -> list[int]:
        """The most tokens of each answer."""
        most, tokenizer = self.arguments.max_new_tokens, processor.tokenizer
        return [most or answer_limit(question.reference, tokenizer) for question in self.questions]

    def _load(self, path: str, stack: ExitStack) -> "Checkpoint | Engine":
        """The model, in memory as long as `stack` is open."""
        arguments = self.arguments
        if arguments.backend == "transformers":
            return load_checkpoint(path, arguments.dtype)
        from pvm.vllm.engine import Engine

        processor = processor_of(path)
        longest = max(map(sum, zip(self._prompts(processor).lengths, self._limits(processor))))
        return stack.enter_context(closing(Engine(path, arguments.dtype, arguments.batch_size, longest)))

    def _answer(
        self, model: Model, checkpoint: "Checkpoint | Engine", ablation: Ablation, label: str
    ) -> dict[str, Any]:
        arguments, processor, description = self.arguments, checkpoint.processor, checkpoint.description
        prompts, others = self._prompts(processor), None
        if ablation.kind == "another_memory":
            others = Prompts(self.changed[ablation.kind], processor)
        elif ablation.kind in CHANGED_IMAGES:
            prompts = Prompts(self.changed[ablation.kind], processor)
        limits = self._limits(processor)
        journal = self.progress.journal(label)
        resumed, start = journal.exists(), time.perf_counter()
        if arguments.backend == "vllm":
            answers = answer_with_vllm(checkpoint, prompts, limits, label, journal)
        else:
            size, cache = arguments.batch_size or 32, arguments.image_kv_cache
            answers = answer(checkpoint, prompts, limits, size, label, ablation, others, journal, cache)
        sizes = [answer.cache_bytes for answer in answers if answer.cache_bytes is not None]
        return {
            "model": {
                **asdict(description),
                "base": description.base and public_name(description.base)["name"],  # reports are shown to others
                "name": f"{model.name}{ablation.suffix}",
                "run": model.run,
                "label": label,
                "ablation": ablation.kind,
                "intact": None if ablation.kind == "none" else model.name,
                "gates_on": description.gates_on,
                "cache_bytes": round(sum(sizes) / len(sizes)) if sizes else None,
                "answers_cut": sum(answer.cut for answer in answers),
                "seconds": None if resumed else round(time.perf_counter() - start, 1),
            },
            "records": make_records(self.questions, answers, arguments.match),
        }

    def _diagnose(self, checkpoint: Checkpoint, label: str, texts: list[str]) -> list[dict[str, Any]]:
        prompts = self._prompts(checkpoint.processor)
        results = []
        for index in tqdm(self.diagnosed, desc=label, unit="row"):
            question = self.questions[index]
            depths = piece_depths(texts[index], self.arguments.scored_pattern, checkpoint.processor.tokenizer)
            result = diagnose(checkpoint, prompts, index, texts[index], depths)
            about = {"row": question.row, "group": question.group, "question": question.question}
            results.append({"index": index, **about, **result})
        return results
