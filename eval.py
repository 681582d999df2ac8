"""
Evaluate one or several checkpoints side by side: accuracy by the distance of the image and by depth in the answer.

The embedded default, after train.py has made the two checkpoints (no GPU, no network):

    python eval.py --config recipes/digits_eval.yaml

Your own conversations (a file, a folder or a Hub name; docs/data.md shows the forms of rows):

    python eval.py --model Qwen/Qwen3-VL-8B-Instruct runs/qwen3-vl-8b-pvm --names base PVM \\
        --dataset_name my_data --dataset_split test --output_dir runs/my_eval

A checkpoint is a stock Qwen3-VL, a PVM model (this project's or the authors') or a PEFT adapter. The last assistant
turn of a row is the answer to compare with. Written are report.json (everything), report.md and report.png (to read),
and predictions_<name>.jsonl (every answer).
"""

import pvm  # noqa: F401, I001  (first: it makes torchvision importable where its compiled operators are missing)

import json
import platform
import re
import sys
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from tqdm import tqdm
from transformers import ProcessorMixin

from pvm.answers import MATCHES
from pvm.arguments import parse_arguments
from pvm.checkpoints import Checkpoint, checkpoint_kind, load_checkpoint, processor_state
from pvm.data import ConversationCollator, ConversationDataset
from pvm.errors import UserError
from pvm.formats import message_text
from pvm.knockouts import KNOCK_OUTS, SPLIT, ChangedImages, KnockOut, generate_split, knock_outs
from pvm.methods import public_name
from pvm.metrics import (
    Accuracy,
    AccuracyByDepth,
    AccuracyByDistance,
    paired_difference,
    score_pieces,
)
from pvm.plots import plot_report
from pvm.report import checkpoint_lines, markdown_report, remarks, rich_tables
from pvm.sources import Conversations, load_conversations


ANSWER_MARGIN = 8  # tokens that an answer may be longer than its reference, at least
QUESTION_TAIL = 200  # characters of the question that go into predictions_<name>.jsonl
KEPT_BYTES = 2**30  # of processed images kept between models; those beyond are processed again
MAX_GROUPS = 8


@dataclass
class EvalArguments:
    """What is evaluated, and on what."""

    model: list[str] = field(
        metadata={"help": "Checkpoints: folders or Hub names. The first is compared with the others."}
    )
    dataset_name: str = field(
        metadata={
            "help": "A .json, .jsonl or .parquet file, a folder of those, or a Hub name. docs/data.md shows the forms "
            "that rows may have."
        }
    )
    output_dir: str = field(metadata={"help": "Where the report goes."})
    names: list[str] | None = field(
        default=None, metadata={"help": "What the report calls the checkpoints; by default the end of their paths."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="test", metadata={"help": "E.g. `test` or `test[:1000]`."})
    max_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on so many rows only, spread evenly over the data set."}
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
            "chooses its option (`choice`: B, (B), The answer is B), ends with its number (`number`), or is the same "
            "mathematical object in LaTeX or plain (`math`, needs math-verify).",
            "choices": tuple(MATCHES),
        },
    )
    scored_pattern: str = field(
        default=r"\S+",
        metadata={
            "help": "Regular expression for the pieces of an answer that are scored by depth; every word by default."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Rows that are answered at once."})
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
    overwrite: bool = field(default=False, metadata={"help": "Replace a report that is in output_dir already."})


@dataclass
class Question:
    """
    A row of the data set as it is scored.

    row (`int`): index in the split.
    group (`str`): its value in the `group_by` column, or "all".
    question (`str`): the end of the last user turn.
    reference (`str`): the last assistant turn.
    depths (`list[int]`): token offsets, in the reference, of its scored pieces.
    distance (`int` or `None`): tokens between the last visual token and the answer; `None` without an image.
    """

    row: int
    group: str
    question: str
    reference: str
    depths: list[int]
    distance: int | None = None


class Prompts:
    """
    The rows of a data set as inputs to generate from, made once for all models with the same processor.

    Args:
        conversations (`Conversations`): the rows.
        processor (`ProcessorMixin`): of the model.
    """

    def __init__(self, conversations: Conversations, processor: ProcessorMixin):
        self.dataset = ConversationDataset(conversations, processor, prompt_only=True)
        self.lengths: list[int] = []
        self.distances: list[int | None] = []
        self.kept: list[dict[str, torch.Tensor] | None] = []
        kept_bytes = 0
        for index in tqdm(range(len(self.dataset)), desc="preparing", unit="row"):
            example = self.dataset[index]
            self.lengths.append(len(example["input_ids"]))
            self.distances.append(image_distance(example["mm_token_type_ids"]))
            kept_bytes += sum(value.nbytes for value in example.values())
            self.kept.append(example if kept_bytes <= KEPT_BYTES else None)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.kept[index] or self.dataset[index]


def image_distance(mm_token_type_ids: torch.Tensor) -> int | None:
    """Tokens after the last visual token of a prompt (`[sequence]`, 0 is text); `None` if there is no such token."""
    visual = mm_token_type_ids.nonzero()
    return len(mm_token_type_ids) - 1 - int(visual[-1]) if len(visual) else None


def piece_depths(text: str, pattern: str, tokenizer) -> list[int]:
    """For each match of `pattern` in `text`, how many tokens of `text` come before it."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ends = [end for _, end in offsets]
    return [bisect_right(ends, match.start()) for match in re.finditer(pattern, text)]


def read_questions(conversations: Conversations, group_by: str | None, pattern: str, tokenizer) -> list[Question]:
    """The questions of a data set that [`Prompts`] has been through, distances still missing."""
    groups = ["all"] * len(conversations) if group_by is None else map(str, conversations.column(group_by))
    questions = []
    for row, group, conversation in zip(conversations.rows, groups, conversations):
        users = [message for message in conversation.messages if message["role"] == "user"]
        question = message_text(users[-1]) if users else ""
        reference = message_text(conversation.messages[-1])
        depths = piece_depths(reference, pattern, tokenizer)
        questions.append(Question(row, group, question[-QUESTION_TAIL:], reference, depths))
    return questions


def check_references(questions: Sequence[Question], arguments: EvalArguments) -> None:
    """
    Raises:
        UserError: naming the row, if a reference is not of the kind that answers are compared with.
    """
    for question in questions:
        try:
            MATCHES[arguments.match]("", question.reference)
        except UserError as error:
            raise UserError(f"{arguments.dataset_name}, row {question.row}: {error}") from error


def answer_limit(reference: str, tokenizer) -> int:
    """
    Tokens that an answer to compare with `reference` may have. A power of two, so that few kinds of batch arise and no
    row's limit depends on its neighbours.
    """
    tokens = len(tokenizer(reference, add_special_tokens=False)["input_ids"]) + 1  # the end of the turn is one
    return 2 ** (tokens + ANSWER_MARGIN - 1).bit_length()


def make_batches(lengths: Sequence[int], kinds: Sequence[Any], batch_size: int) -> list[list[int]]:
    """Indices of rows of equal kind and like lengths. The longest come first: memory fails at once or never."""
    batches = []
    for kind in sorted(set(kinds), reverse=True):
        rows = [index for index in range(len(lengths)) if kinds[index] == kind]
        rows.sort(key=lambda index: lengths[index], reverse=True)
        batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return batches


@torch.inference_mode()
def answer(
    checkpoint: Checkpoint,
    prompts: Prompts,
    limits: Sequence[int],
    batch_size: int,
    name: str,
    knock_out: KnockOut | None = None,
    others: Prompts | None = None,
) -> tuple[list[str], list[bool]]:
    """
    Greedy answers of a model to all prompts.

    Args:
        knock_out (`KnockOut`, *optional*): what is taken from the model.
        others (`Prompts`, *optional*): the same prompts with images of other rows, where it needs them.

    Returns:
        The texts, and for each whether it was cut off at its limit.
    """
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    knock_out = knock_out or KnockOut()
    collator = ConversationCollator(tokenizer.pad_token_id, padding_side="left")
    ends = torch.tensor(model.generation_config.eos_token_id)
    # Prompts in two parts are parted at the same place. Those without an image lack nothing.
    parted = [None if knock_out.kind not in SPLIT else distance for distance in prompts.distances]
    kinds = [(limit, distance or 0) for limit, distance in zip(limits, parted)]

    def inputs(made: Prompts, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return {key: value.to(model.device) for key, value in collator([made[row] for row in rows]).items()}

    answers, cut = [""] * len(limits), [False] * len(limits)
    with tqdm(total=len(limits), desc=name, unit="row") as bar:
        for rows in make_batches(prompts.lengths, kinds, batch_size):
            batch, (limit, distance) = inputs(prompts, rows), kinds[rows[0]]
            if distance:
                other = inputs(others, rows)
                generated = generate_split(model, batch, other, distance, knock_out, limit, ends).cpu()
            else:
                switch = {} if knock_out.use_pvm is True else {"use_pvm": knock_out.use_pvm}
                generated = model.generate(**batch, max_new_tokens=limit, **switch)
                generated = generated[:, batch["input_ids"].shape[1] :].cpu()
            ended = torch.isin(generated, ends).any(dim=1).tolist()
            texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
            for row, text, has_ended in zip(rows, texts, ended):
                answers[row], cut[row] = text, not has_ended
            bar.update(len(rows))
    return answers, cut


def make_records(
    questions: Sequence[Question], answers: Sequence[str], cut: Sequence[bool], match: str = "exact"
) -> list[dict[str, Any]]:
    """The lines of predictions_<name>.jsonl."""
    return [
        {
            **asdict(question),
            "prediction": prediction,
            "correct": MATCHES[match](prediction, question.reference),
            "cut": was_cut,
        }
        for question, prediction, was_cut in zip(questions, answers, cut)
    ]


def score(records: Sequence[dict[str, Any]], pattern: str, match: str = "exact") -> dict[str, Any]:
    """All metrics of one model's records."""
    texts = {
        "predictions": [record["prediction"] for record in records],
        "references": [record["reference"] for record in records],
    }
    distances, depths = [record["distance"] for record in records], [record["depths"] for record in records]
    return {
        "accuracy": Accuracy(keep_in_memory=True).compute(**texts, match=match),
        "by_distance": AccuracyByDistance(keep_in_memory=True).compute(**texts, distances=distances, match=match),
        "by_depth": AccuracyByDepth(keep_in_memory=True).compute(**texts, depths=depths, scored_pattern=pattern),
    }


def compare(
    first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], bins: Sequence[dict[str, Any]], pattern: str
) -> dict[str, Any]:
    """
    What the second model does better than the first on the same rows: `answers` correct, in all and in each distance
    bin, and `pieces` of long answers.
    """
    outcomes = [[[record["correct"]] for record in records] for records in (first, second)]
    by_distance = []
    for span in bins:
        inside = [
            k
            for k, record in enumerate(first)
            if record["distance"] is not None and span["low"] <= record["distance"] <= span["high"]
        ]
        difference = paired_difference(*([rows[k] for k in inside] for rows in outcomes))
        by_distance.append({"low": span["low"], "high": span["high"], **difference})
    pieces = [
        [
            score_pieces(record["prediction"], record["reference"], pattern)
            for record in records
            if len(record["depths"]) > 1
        ]
        for records in (first, second)
    ]
    return {
        "answers": paired_difference(*outcomes),
        "by_distance": by_distance,
        "pieces": paired_difference(*pieces) if pieces[0] else None,
    }


def score_all(records: dict[str, list[dict[str, Any]]], pattern: str, match: str = "exact") -> dict[str, Any]:
    """
    The measured part of the report, from nothing but the records of each model: `overall`, `groups` and `comparisons`
    with the first model.
    """
    first, *others = records
    report: dict[str, Any] = {
        "overall": {name: score(lines, pattern, match)["accuracy"] for name, lines in records.items()},
        "groups": {},
        "comparisons": {},
    }
    for group in dict.fromkeys(record["group"] for record in records[first]):
        mine = {name: [line for line in lines if line["group"] == group] for name, lines in records.items()}
        scores = {name: score(lines, pattern, match) for name, lines in mine.items()}
        bins = scores[first]["by_distance"]["bins"]
        report["groups"][group] = scores
        report["comparisons"][group] = {name: compare(mine[first], mine[name], bins, pattern) for name in others}
    return report


def model_names(arguments: EvalArguments) -> list[str]:
    """
    What the report calls the models.

    Raises:
        UserError: if they are not as many as the models, not distinct, or no file names.
    """
    names = arguments.names or [Path(path).name for path in arguments.model]
    if len(names) != len(arguments.model):
        raise UserError(f"--names has {len(names)} names for {len(arguments.model)} models. Give each model one.")
    if len(set(names)) != len(names):
        raise UserError(f"Two models would both be called one of {', '.join(names)}. Tell them apart with --names.")
    for name in names:
        if not re.fullmatch(r"[\w.+ -]+", name):
            raise UserError(f"--names {name!r}: use letters, digits, spaces and . _ + - only; it becomes a file name.")
    return names


def prepare_output(output_dir: Path, overwrite: bool) -> None:
    """
    Make the folder, without an earlier report in it.

    Raises:
        UserError: if one is there and may not be overwritten.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if (output_dir / "report.json").exists() and not overwrite:
        raise UserError(f"{output_dir} holds a report already. Choose another --output_dir, or give --overwrite true.")
    for old in [*output_dir.glob("report.*"), *output_dir.glob("predictions_*.jsonl")]:
        old.unlink()


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


def check(arguments: EvalArguments) -> list[str]:
    """
    Find out what is wrong with the command line before any time is spent.

    Returns:
        `list[str]`: the names of the models.

    Raises:
        UserError: for anything that is wrong.
    """
    names = model_names(arguments)
    for flag in ("max_samples", "batch_size", "max_new_tokens"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: give a number from 1.")
    try:
        re.compile(arguments.scored_pattern)
    except re.error as error:
        raise UserError(f"--scored_pattern {arguments.scored_pattern}: no regular expression: {error}.") from error
    for path in arguments.model:
        checkpoint_kind(path)
    return names


def main(arguments: list[str] | None = None) -> None:
    (args,) = parse_arguments((EvalArguments,), __doc__, arguments)
    names = check(args)
    conversations = load_rows(args)
    output_dir = Path(args.output_dir)
    prepare_output(output_dir, args.overwrite)

    questions: list[Question] = []
    prompts, prompts_state = None, None
    records: dict[str, list[dict[str, Any]]] = {}
    models = []
    for name, path in zip(names, args.model):
        checkpoint = load_checkpoint(path, args.dtype)
        tokenizer = checkpoint.processor.tokenizer
        state = processor_state(checkpoint.processor)
        if state != prompts_state:
            prompts, prompts_state = Prompts(conversations, checkpoint.processor), state
        if not questions:
            # Distance and depth are measured in the first model's tokens, so that all share one axis.
            questions = read_questions(conversations, args.group_by, args.scored_pattern, tokenizer)
            for question, distance in zip(questions, prompts.distances):
                question.distance = distance
            check_references(questions, args)
        limits = [args.max_new_tokens or answer_limit(question.reference, tokenizer) for question in questions]
        description = checkpoint.description
        layers = [int(layer) for layer in description.gates] if description.kind == "pvm" else []
        for knock_out in knock_outs(args.knock_outs, layers):
            made, others = prompts, None
            if knock_out.kind in ("blank_image", "another_image"):
                changed = ChangedImages(conversations, blank=knock_out.kind == "blank_image")
                made = Prompts(changed, checkpoint.processor)
            elif knock_out.kind in SPLIT:
                others = Prompts(ChangedImages(conversations, blank=False), checkpoint.processor)
            start, called = time.perf_counter(), f"{name}{knock_out.name}"
            answers, cut = answer(checkpoint, made, limits, args.batch_size, called, knock_out, others)
            models.append(
                {
                    **asdict(description),
                    "name": called,
                    "knock_out": knock_out.kind,
                    "gates_on": description.gates_on,
                    "answers_cut": sum(cut),
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
            records[called] = make_records(questions, answers, cut, args.match)
            with open(output_dir / f"predictions_{called}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records[called])
        del checkpoint

    report = {
        "arguments": asdict(args),
        "dataset": public_name(args.dataset_name),
        "rows": len(conversations),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "peft", "datasets", "evaluate")},
        },
        "models": models,
        **score_all(records, args.scored_pattern, args.match),
    }
    (output_dir / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (output_dir / "report.md").write_text(markdown_report(report), encoding="utf-8")
    plot_report(report, output_dir / "report.png")

    console = Console(soft_wrap=True)
    for line in [*checkpoint_lines(report), *remarks(report)]:
        console.print(line, highlight=False)
    for table in rich_tables(report):
        console.print(table)
    console.print(f"\nWritten: {output_dir}/report.md, report.png, report.json, predictions_*.jsonl")


if __name__ == "__main__":
    try:
        main()
    except (UserError, StrictDataclassError, OSError) as error:
        sys.exit(f"eval.py: error: {error}")
