"""Every row is tried before training, by the code that training uses: what is in the data, and what cannot be used."""

import json
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
from rich.console import Console
from rich.table import Table
from transformers import ProcessorMixin, TrainingArguments

from pvm.data import encoding, forms, json_rows
from pvm.data import sources as sources_module
from pvm.data.encoding import (
    WATCH_AFTER,
    ConversationDataset,
    ConversationEncoder,
    ConversationStream,
    no_visuals,
    processor_state,
)
from pvm.data.sources import Conversations, DataArguments, Mixture, load_sources, load_streams
from pvm.errors import SetupError, UserError


SKIPPED_ROWS, DRY_RUN = REPORTS = ("skipped_rows.jsonl", "dry_run.json")  # the only files that a new run replaces
CHANGED = " It could be used when it was checked: if files have changed, check again with --overwrite_cache true."
SHOWN_ROWS = 3  # bad rows that an error names; the dry run shows ten times as many
COUNTS = ("length", "visual_tokens", "label_tokens")
CHECKED = Features({"row": Value("int64"), "problem": Value("string"), **{key: Value("int32") for key in COUNTS}})


def load_training_data(
    arguments: DataArguments,
    training_args: TrainingArguments,
    processor: ProcessorMixin,
    needs_visuals: bool,
    console: Console,
) -> ConversationDataset | ConversationStream | None:
    """
    The data of a training run, every row checked, or checked as it comes if the data is streamed.

    Args:
        needs_visuals (`bool`): refuse data without an image or a video.
        console (`rich.console.Console`): the main process prints what the data is.

    Returns:
        `ConversationDataset`, `ConversationStream`, or `None` after a dry run.

    Raises:
        UserError: if the data cannot be read, too many rows cannot be used, or no row has an image that needs one;
            after a dry run, too.
    """
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    settings = {"max_length": arguments.max_length, "train_on": arguments.train_on}
    if arguments.streaming:
        if training_args.max_steps < 1:
            raise UserError("--streaming true needs --max_steps: how many rows a stream has is not known.")
        streams = load_streams(arguments)
        readers = training_args.world_size * max(1, training_args.dataloader_num_workers)
        check_streams(streams, arguments.dataset_name, readers, needs_visuals)
        encoder = ConversationEncoder(processor, **settings)
        rank, world_size = training_args.process_index, training_args.world_size
        return ConversationStream(streams, encoder, arguments, training_args.output_dir, seed, rank, world_size)

    # The main process does the work, the others find it in the cache.
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
    report = describe([source.name for source in sources], checks, usable, mixture)
    output_dir = Path(training_args.output_dir)
    # The folder may hold a run already, which has rows skipped that a dry run says nothing about.
    written = output_dir / (DRY_RUN if arguments.dry_run else SKIPPED_ROWS)
    if training_args.process_index == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        if arguments.dry_run:
            written.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
            for table in tables(report):
                console.print(table)
            console.print(f"Written: {written}", highlight=False)
        else:
            with open(written, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in report["refused"])
            console.print(summary(report, written), highlight=False)
    problem = _objection(report, arguments, needs_visuals, written)
    if problem:
        raise UserError(f"A training would stop here: {problem}" if arguments.dry_run else problem)
    if arguments.dry_run:
        console.print("A training would go on from here.")
        return None
    return ConversationDataset(mixture, processor, advice=CHANGED, **settings)


def check_streams(streams: Sequence[IterableDataset], names: Sequence[str], readers: int, needs_visuals: bool) -> None:
    """
    Refuse what would end a training later, on all ranks alike.

    Args:
        streams (`Sequence[datasets.IterableDataset]`): of [`load_streams`].
        names (`Sequence[str]`): of the data sets.
        readers (`int`): processes, or their workers, that share the rows.
        needs_visuals (`bool`): refuse data without an image or a video in its first rows.

    Raises:
        UserError: if there are fewer rows than readers, or no image that is needed.
    """
    for name, stream in zip(names, streams):
        rows = sum(1 for _ in stream.take(readers))
        if rows < readers:
            raise UserError(
                f"{name} has {rows} rows for {readers} readers, the processes and their --dataloader_num_workers. "
                "Leave --streaming out, or take fewer."
            )
    first = (record for stream in streams for record in islice(stream, WATCH_AFTER))
    if needs_visuals and not any(record["images"] or record["videos"] for record in first):
        raise UserError(no_visuals(f"None of the first {WATCH_AFTER} rows of {' '.join(names)}"))


def check_rows(
    conversations: Conversations,
    processor: ProcessorMixin,
    settings: dict[str, Any],
    num_workers: int = 1,
    overwrite_cache: bool = False,
) -> Dataset:
    """
    Make model inputs of every row once, and remember only what they are. Cached: the same rows, processor,
    settings and code are not gone through again.

    Args:
        settings (`dict`): of the [`ConversationEncoder`].
        num_workers (`int`): processes that share the work.
        overwrite_cache (`bool`): do it again.

    Returns:
        `datasets.Dataset`: for each conversation `row`, its number in the data set; `problem`, `None` if it can be
        used; `length`, `visual_tokens` and `label_tokens` in tokens, 0 if not.

    Raises:
        SetupError: if there are videos and nothing to read them with.
    """
    fingerprint = Hasher.hash(
        [
            conversations.dataset._fingerprint,
            str(conversations.folder),
            conversations.rows,
            processor_state(processor),
            settings,
            transformers.__version__,
            [
                Path(file).read_text("utf-8")
                for file in (encoding.__file__, forms.__file__, json_rows.__file__, sources_module.__file__, __file__)
            ],
        ]
    )
    cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "pvm_checks"
    cache_dir.mkdir(parents=True, exist_ok=True)
    encoder = ConversationEncoder(processor, **settings)
    return Dataset.from_dict({"row": conversations.rows}).map(
        partial(_check_row, conversations, encoder),
        with_indices=True,
        features=CHECKED,
        num_proc=min(num_workers, len(conversations)) if num_workers > 1 else None,
        new_fingerprint=fingerprint,
        cache_file_name=str(cache_dir / f"{fingerprint}.arrow"),
        load_from_cache_file=not overwrite_cache,
        desc=f"checking {conversations.name}",
    )


def _check_row(
    conversations: Conversations, encoder: ConversationEncoder, row: dict[str, int], index: int
) -> dict[str, Any]:
    try:
        example = encoder(conversations[index])
    except SetupError:
        raise
    except UserError as error:
        return {**row, "problem": str(error), **dict.fromkeys(COUNTS, 0)}
    return {
        **row,
        "problem": None,
        "length": len(example["input_ids"]),
        "visual_tokens": int((example["mm_token_type_ids"] > 0).sum()),
        "label_tokens": int((example["labels"] >= 0).sum()),
    }


def describe(
    names: Sequence[str], checks: Sequence[Dataset], usable: Sequence[np.ndarray], mixture: Mixture
) -> dict[str, Any]:
    """
    What the data is, as plain numbers: `sources`, with what each contributes to an epoch; `quantiles` of the lengths
    in an epoch; and the rows `refused`.

    Args:
        names (`Sequence[str]`): of the data sets.
        checks (`Sequence[Dataset]`): [`check_rows`] of each.
        usable (`Sequence[np.ndarray]`): the indices in it of the rows that can be used.
        mixture (`Mixture`): of those rows, an epoch.
    """
    counts = [
        np.stack([np.asarray(check[key][:], dtype=np.int64)[indices] for key in COUNTS], axis=1)
        for check, indices in zip(checks, usable)
    ]
    parts, indices = np.asarray(mixture.places, dtype=np.int64).reshape(-1, 2).T
    epoch = [count[indices[parts == part]] for part, count in enumerate(counts)]
    together = np.concatenate(epoch)
    sources = [
        {
            "name": name,
            "rows": len(check),
            "refused": len(check) - len(kept),
            "epoch_rows": len(mine),
            **dict(zip(("tokens", "visual_tokens", "label_tokens"), mine.sum(axis=0).tolist())),
        }
        for name, check, kept, mine in zip(names, checks, usable, epoch)
    ]
    quantiles = {}
    if len(together):
        for label, share in (("least", 0), ("half", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("most", 1)):
            values = np.quantile(together, share, axis=0, method="nearest").tolist()
            quantiles[label] = dict(zip(COUNTS, values))
    refused = [
        {"dataset": name, "row": row, "problem": problem}
        for name, check in zip(names, checks)
        for row, problem in zip(check["row"], check["problem"])
        if problem is not None
    ]
    return {"sources": sources, "quantiles": quantiles, "refused": refused}


def tables(report: dict[str, Any]) -> list[Table]:
    """The tables that a dry run prints."""
    tokens = max(1, sum(source["tokens"] for source in report["sources"]))
    by_source = _table(
        "data sets",
        ("data set", "rows", "refused", "epoch", "tokens", "share", "visual", "learned"),
        [
            (
                source["name"],
                *(f"{source[key]:,}" for key in ("rows", "refused", "epoch_rows")),
                f"{source['tokens']:,}",
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
    bad = _table(title, ("data set", "row", "problem"), [(r["dataset"], f"{r['row']}", r["problem"]) for r in shown])
    bad.columns[-1].justify, bad.columns[-1].no_wrap = "left", False
    return [by_source, lengths, *([bad] if refused else [])]


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for index, heading in enumerate(headings):
        # A name is broken into lines rather than cut, and a number neither.
        table.add_column(heading, justify="right" if index else "left", overflow="fold", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row)
    return table


def summary(report: dict[str, Any], path: Path) -> str:
    """What a training says about its data."""
    sources = report["sources"]
    rows, tokens, visual = (
        sum(source[key] for source in sources) for key in ("epoch_rows", "tokens", "visual_tokens")
    )
    sentence = f"{rows:,} conversations an epoch, {tokens:,} tokens, {visual:,} of them visual."
    if refused := len(report["refused"]):
        sentence += f" Skipped {refused:,} rows that cannot be used: {path}"
    return sentence


def _objection(report: dict[str, Any], arguments: DataArguments, needs_visuals: bool, path: Path) -> str | None:
    """Why a training must not go on with this data, if it must not."""
    sources, refused = report["sources"], report["refused"]
    for source in sources:  # each for itself: in a mixture a whole data set must not vanish
        if source["refused"] <= arguments.max_skipped * source["rows"]:
            continue
        mine = [row for row in refused if row["dataset"] == source["name"]]
        first = "".join(f"\n  {row['dataset']}, row {row['row']}: {row['problem']}" for row in mine[:SHOWN_ROWS])
        return (
            f"{len(mine):,} of {source['rows']:,} rows of {source['name']} cannot be used, more than --max_skipped "
            f"{arguments.max_skipped:g}. "
            f"{path} names them all; the first:{first}\n"
            "Results are cached: after mending files that rows only name, add --overwrite_cache true."
        )
    if not any(source["epoch_rows"] for source in sources):
        return "No row can be used."
    if needs_visuals and not any(source["visual_tokens"] for source in sources):
        return no_visuals(f"No row of {' '.join(source['name'] for source in sources)}")
    return None
