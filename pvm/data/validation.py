"""Validation before training: every row is encoded once, statistics are collected, and unusable rows are left out."""

import hashlib
import json
import os
import signal
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher
from rich.table import Table
from transformers import ProcessorMixin, TrainingArguments

from pvm.data.encoding import ConversationDataset, ConversationEncoder, content_digest, processor_state
from pvm.data.json_rows import place
from pvm.data.sources import Conversations, DataArguments, Mixture, load_sources
from pvm.data.streams import WATCH_AFTER, ConversationStream, load_streams, stream_fingerprint
from pvm.errors import SetupError, UserError
from pvm.terminal import Terminal


SKIPPED_ROWS, DRY_RUN = REPORTS = ("skipped_rows.jsonl", "dry_run.json")  # a new run may overwrite these files only
CHANGED = " It was usable when it was checked. If files have changed, check again with --overwrite_cache true."
SHOWN_ROWS = 3  # unusable rows that an error lists; a dry run prints ten times as many
COUNTS = ("length", "visual_tokens", "label_tokens")
SAMPLED_ROWS = 100  # by which files that have changed since a check are noticed
CHECKED = Features(
    {
        "row": Value("int64"),
        "problem": Value("string"),
        "content": Value("string"),
        **{key: Value("int32") for key in COUNTS},
    }
)


def load_training_data(
    arguments: DataArguments,
    training_args: TrainingArguments,
    processor: ProcessorMixin,
    needs_visuals: bool,
    console: Terminal,
    **encoder_arguments,
) -> ConversationDataset | ConversationStream | None:
    """
    The data of a training run, with every row checked; rows of a stream are checked when they are read.

    Args:
        needs_visuals (`bool`): refuse data without any image or video.
        console (`Terminal`): where the main process prints what the data is.
        encoder_arguments: further ones of [`ConversationEncoder`], if the data is not for training on answers.

    Returns:
        `ConversationDataset`, `ConversationStream`, or `None` after a dry run.

    Raises:
        UserError: if the data cannot be read, too many rows are unusable, or images are needed and there are none;
            also at the end of a dry run.
    """
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    settings = {"max_length": arguments.max_length, "train_on": arguments.train_on, **encoder_arguments}
    if arguments.streaming:
        if training_args.max_steps < 1:
            raise UserError("--streaming true needs --max_steps, because the number of rows is unknown.")
        streams = load_streams(arguments)
        readers = training_args.world_size * max(1, training_args.dataloader_num_workers)
        check_streams(streams, arguments.dataset_name, readers, needs_visuals)
        encoder = ConversationEncoder(processor, **settings)
        rank, world_size = training_args.process_index, training_args.world_size
        fingerprint = stream_fingerprint(streams)
        output_dir = training_args.output_dir
        return ConversationStream(streams, encoder, arguments, output_dir, seed, rank, world_size, fingerprint)

    # The main process does the work; the others read its results from the cache.
    with training_args.main_process_first(desc="checking the data"):
        sources = load_sources(arguments)
        checks = [
            check_rows(source, processor, settings, arguments.preprocessing_num_workers, arguments.overwrite_cache)
            for source in sources
        ]
    usable = [np.flatnonzero([problem is None for problem in check["problem"]]) for check in checks]
    mixture = Mixture(
        [source.select(indices.tolist()) for source, indices in zip(sources, usable)],
        arguments.dataset_weights,
        arguments.stopping_strategy,
        seed,
    )
    report = describe(sources, checks, usable, mixture)
    # A dry run leaves the skipped rows of a run in the same folder alone.
    path = Path(training_args.output_dir) / (DRY_RUN if arguments.dry_run else SKIPPED_ROWS)
    if training_args.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        if arguments.dry_run:
            path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
            for table in tables(report):
                console.print(table)
            console.print(f"Written: {path}")
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in report["refused"]), "utf-8")
            console.print(summary(report, path))
    problem = _problem(report, arguments, needs_visuals, path)
    if problem:
        raise UserError(f"A training would stop here: {problem}" if arguments.dry_run else problem)
    if arguments.dry_run:
        console.print("A training would continue from here.")
        return None
    fingerprint = ", ".join(map(_fingerprint, checks))
    return ConversationDataset(mixture, processor, advice=CHANGED, fingerprint=fingerprint, **settings)


def check_streams(streams: Sequence[IterableDataset], names: Sequence[str], readers: int, needs_visuals: bool) -> None:
    """
    Check the first rows of streams, with the same result on all ranks.

    Args:
        streams (`Sequence[datasets.IterableDataset]`): see [`load_streams`].
        names (`Sequence[str]`): names of the data sets.
        readers (`int`): processes, or all their data loader workers, that share the rows.
        needs_visuals (`bool`): refuse streams without an image or a video in their first rows.

    Raises:
        UserError: if there are fewer rows than readers, or images are needed and there are none.
    """
    for name, stream in zip(names, streams):
        rows = sum(1 for _ in stream.take(readers))
        if rows < readers:
            raise UserError(
                f"{name} has {rows} rows for {readers} readers (processes x --dataloader_num_workers). Use fewer "
                "readers, or leave out --streaming."
            )
    first = (record for stream in streams for record in islice(stream, WATCH_AFTER))
    if needs_visuals and not any(record["images"] or record["videos"] for record in first):
        raise UserError(_no_visuals(f"None of the first {WATCH_AFTER} rows of {' '.join(names)}"))


def check_rows(
    conversations: Conversations,
    processor: ProcessorMixin,
    settings: dict[str, Any],
    num_workers: int = 1,
    overwrite_cache: bool = False,
) -> Dataset:
    """
    Encode every row once and keep its problem or its numbers of tokens. The result is cached by rows, processor,
    settings and code. The tensors are not: pixel values take too much disk space.

    Args:
        settings (`dict`): arguments of the [`ConversationEncoder`].
        num_workers (`int`): number of processes.
        overwrite_cache (`bool`): ignore an earlier result.

    Returns:
        `datasets.Dataset`: for each conversation `row`, its number in the data set; `problem`, `None` if it is usable;
        `content`, its [`content_digest`], `None` if it is not; `length`, `visual_tokens` and `label_tokens`, then 0.

    Raises:
        SetupError: if there are videos and PyAV is not installed.
    """
    fingerprint = Hasher.hash(
        [
            conversations.dataset._fingerprint,
            str(conversations.root),
            conversations.allow_image_urls,
            conversations.rows,
            processor_state(processor),
            settings,
            transformers.__version__,
            [file.read_text("utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))],
        ]
    )
    cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "pvm_checks"
    cache_dir.mkdir(parents=True, exist_ok=True)
    encoder = ConversationEncoder(processor, **settings)
    check = partial(
        Dataset.from_dict({"row": conversations.rows}).map,
        partial(_check_row, conversations, encoder, os.getpid()),
        with_indices=True,
        features=CHECKED,
        num_proc=min(num_workers, len(conversations)) if num_workers > 1 else None,
        new_fingerprint=fingerprint,
        cache_file_name=str(cache_dir / f"{fingerprint}.arrow"),
        desc=f"checking {conversations.name}",
    )
    checked = check(load_from_cache_file=not overwrite_cache)
    return checked if _is_up_to_date(checked, conversations) else check(load_from_cache_file=False)


def _is_up_to_date(checked: Dataset, conversations: Conversations) -> bool:
    """Whether a sample of the rows is what was checked: other images may have come under their names since."""
    count = min(SAMPLED_ROWS, len(checked))
    indices = [k * len(checked) // count for k in range(count)]
    try:
        return all(
            digest is None or digest == content_digest(conversations[index])
            for index, digest in zip(indices, checked[indices]["content"])
        )
    except UserError:  # a file is missing
        return False


def _check_row(
    conversations: Conversations, encoder: ConversationEncoder, main_process: int, row: dict[str, int], index: int
) -> dict[str, Any]:
    if os.getpid() != main_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the main process, which ends its workers
    try:
        conversation = conversations[index]
        example = encoder(conversation)
    except SetupError:
        raise
    except UserError as error:
        return {**row, "problem": str(error), "content": None, **dict.fromkeys(COUNTS, 0)}
    return {
        **row,
        "problem": None,
        "content": content_digest(conversation),
        "length": len(example["input_ids"]),
        "visual_tokens": int((example["mm_token_type_ids"] > 0).sum()),
        "label_tokens": int((example["labels"] >= 0).sum()) if "labels" in example else 0,
    }


def _fingerprint(check: Dataset) -> str:
    """What the usable rows of a data set contain."""
    digests = [digest for digest in check["content"] if digest is not None]
    return f"{len(digests):,} rows of {hashlib.sha256(''.join(digests).encode()).hexdigest()[:16]}"


def describe(
    sources: Sequence[Conversations], checks: Sequence[Dataset], usable: Sequence[np.ndarray], mixture: Mixture
) -> dict[str, Any]:
    """
    Statistics of the data: `sources`, with the share of each in an epoch; `quantiles` of the lengths in an epoch; and
    the `refused` rows.

    Args:
        sources (`Sequence[Conversations]`): the data sets.
        checks (`Sequence[Dataset]`): [`check_rows`] of each.
        usable (`Sequence[np.ndarray]`): indices of the usable rows in each check.
        mixture (`Mixture`): the usable rows of an epoch.
    """
    counts = [
        np.stack([np.asarray(check[key][:], dtype=np.int64)[indices] for key in COUNTS], axis=1)
        for check, indices in zip(checks, usable)
    ]
    parts, indices = np.asarray(mixture.places, dtype=np.int64).reshape(-1, 2).T
    by_source = [count[indices[parts == part]] for part, count in enumerate(counts)]
    epoch = np.concatenate(by_source)
    described = [
        {
            "name": source.name,
            "rows": len(check),
            "refused": len(check) - len(kept),
            "epoch_rows": len(rows),
            **dict(zip(("tokens", "visual_tokens", "label_tokens"), rows.sum(axis=0).tolist())),
        }
        for source, check, kept, rows in zip(sources, checks, usable, by_source)
    ]
    quantiles = {}
    if len(epoch):
        for label, share in (("least", 0), ("half", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("most", 1)):
            values = np.quantile(epoch, share, axis=0, method="nearest").tolist()
            quantiles[label] = dict(zip(COUNTS, values))
    refused = [
        {**source.origin(index), "problem": problem}
        for source, check in zip(sources, checks)
        for index, problem in enumerate(check["problem"])
        if problem is not None
    ]
    return {"sources": described, "quantiles": quantiles, "refused": refused}


def tables(report: dict[str, Any]) -> list[Table]:
    """The tables that a dry run prints."""
    tokens = max(1, sum(source["tokens"] for source in report["sources"]))
    by_source = _table(
        "data sets",
        ("data set", "rows", "refused", "epoch", "tokens", "share", "visual", "labels"),
        [
            (
                source["name"],
                *(f"{source[key]:,}" for key in ("rows", "refused", "epoch_rows", "tokens")),
                f"{source['tokens'] / tokens:.1%}",
                *(f"{source[key]:,}" for key in ("visual_tokens", "label_tokens")),
            )
            for source in report["sources"]
        ],
    )
    lengths = _table(
        "tokens of a row",
        ("", *report["quantiles"]),
        [(key.replace("_", " "), *(f"{values[key]:,}" for values in report["quantiles"].values())) for key in COUNTS],
    )
    refused = report["refused"]
    shown = refused[: 10 * SHOWN_ROWS]
    title = f"refused rows, {len(shown)} of {len(refused)}" if len(shown) < len(refused) else "refused rows"
    problems = _table(
        title,
        ("data set", "row", "line", "problem"),
        [(row["dataset"], str(row["row"]), str(row.get("line", "")), row["problem"]) for row in shown],
    )
    problems.columns[-1].justify, problems.columns[-1].no_wrap = "left", False
    return [by_source, lengths, *([problems] if refused else [])]


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for index, heading in enumerate(headings):
        # Names are wrapped and numbers kept on one line, so that neither is cut off.
        table.add_column(heading, justify="right" if index else "left", overflow="fold", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row)
    return table


def summary(report: dict[str, Any], path: Path) -> str:
    """What a training prints about its data."""
    rows, tokens, visual = (
        sum(source[key] for source in report["sources"]) for key in ("epoch_rows", "tokens", "visual_tokens")
    )
    sentence = f"{rows:,} conversations per epoch, {tokens:,} tokens, {visual:,} of them visual."
    if refused := len(report["refused"]):
        sentence += f" Skipped {refused:,} unusable rows, listed in {path}"
    return sentence


def _problem(report: dict[str, Any], arguments: DataArguments, needs_visuals: bool, path: Path) -> str | None:
    """Why a training with this data must stop, `None` if it need not."""
    for source in report["sources"]:  # each on its own, so that no small data set vanishes in a mixture
        if source["refused"] <= arguments.max_skipped * source["rows"]:
            continue
        refused = [row for row in report["refused"] if row["dataset"] == source["name"]]
        first = "".join(f"\n  {place(row)}: {row['problem']}" for row in refused[:SHOWN_ROWS])
        return (
            f"{len(refused):,} of {source['rows']:,} rows of {source['name']} cannot be used, more than --max_skipped "
            f"{arguments.max_skipped:g} allows. {path} lists them; the first:{first}\n"
            "Results are cached: after fixing files that rows refer to, add --overwrite_cache true."
        )
    if not any(source["epoch_rows"] for source in report["sources"]):
        return "No row can be used."
    if needs_visuals and not any(source["visual_tokens"] for source in report["sources"]):
        return _no_visuals(f"No row of {' '.join(source['name'] for source in report['sources'])}")
    return None


def _no_visuals(subject: str) -> str:
    return (
        f"{subject} has an image or a video, without which PVM branches learn nothing. Check the columns `images` and "
        "`videos`, or use --method lora or full."
    )
