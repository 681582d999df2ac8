"""From the data sets of a command line to files with the rows that are kept, and their card."""

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from rich.table import Table
from transformers import ProcessorMixin

from pvm.checkpoints.loading import load_checkpoint, processor_of
from pvm.checkpoints.names import checkpoint_state, public_name
from pvm.data.encoding import processor_state
from pvm.data.json_rows import JSON_ROW
from pvm.data.sources import Conversations, DataArguments, Source, load_sources
from pvm.data.validation import check_rows
from pvm.errors import UserError
from pvm.files import write_atomically
from pvm.filtering.card import Filtered, counts_table, data_card, non_commercial, quantiles_table
from pvm.filtering.gray import journal_name, measure
from pvm.filtering.rules import RULES, FilterArguments, Removal, find_removals
from pvm.terminal import Terminal


CARD, REMOVED, DRY_RUN, DATA, MEASURED = "README.md", "removed_rows.jsonl", "dry_run.jsonl", "data", "gray_images"
SHOWN_ROWS = 3  # that an error lists


def filter_rows(arguments: FilterArguments, data_args: DataArguments, console: Terminal) -> None:
    """
    Write the rows that are kept, a file for each data set; the rows that are not; and the data card, last.

    Raises:
        UserError: if data cannot be read, too much of it is unusable, no row is left, or a result is in the way.
    """
    output_dir = Path(arguments.output_dir)
    names = file_names(data_args.sources())
    listed = output_dir / (DRY_RUN if data_args.dry_run else REMOVED)  # a dry run leaves those of a result alone
    if not data_args.dry_run:
        check_output(output_dir, names, arguments.overwrite)
    processor = processor_of(arguments.model_name_or_path)
    sources = load_sources(data_args)
    checks = [
        check_rows(
            source,
            processor,
            {"max_length": None, "train_on": data_args.train_on},
            data_args.preprocessing_num_workers,
            data_args.overwrite_cache,
        )
        for source in sources
    ]
    removals = [
        find_removals(source, check, arguments, data_args.max_length) for source, check in zip(sources, checks)
    ]
    list_removals(listed, sources, removals)
    check_unusable(sources, removals, data_args.max_skipped, listed)

    drops: list[list[float]] = [[] for _ in sources]
    if arguments.min_drop is not None and not data_args.dry_run:
        drops = remove_by_drop(arguments, names, sources, checks, removals, processor, output_dir)
        list_removals(listed, sources, removals)

    filtered = [
        Filtered(source, name, len(rows), dict(Counter(removal.rule for removal in removed.values())), dropped)
        for source, name, rows, removed, dropped in zip(data_args.sources(), names, sources, removals, drops)
    ]
    show(counts_table(filtered), console)
    if any(drops):
        show(quantiles_table(filtered), console)
    console.print(f"Removed rows, with reasons: {listed}")
    if not any(each.kept for each in filtered):
        counts = sum((Counter(each.removed) for each in filtered), Counter())
        reasons = "; ".join(f"{counts[rule]:,}: {RULES[rule]}" for rule in RULES if counts[rule])
        raise UserError(f"No row is left ({reasons}). Nothing else was written.")
    if data_args.dry_run:
        unapplied = " --min_drop was not applied." if arguments.min_drop is not None else ""
        console.print(f"Nothing else was written.{unapplied}")
        return

    (output_dir / CARD).unlink(missing_ok=True)  # it is there if the result is complete
    (output_dir / DATA).mkdir(exist_ok=True)
    for each, source, removed in zip(filtered, sources, removals):
        if each.kept:
            kept = source.select([index for index in range(len(source)) if index not in removed])
            each.file = f"{DATA}/{write_rows(kept, output_dir / DATA / each.name).name}"
            each.root = kept.root if has_image_files(kept) else None
    write_atomically(output_dir / CARD, data_card(filtered, used_flags(arguments, data_args)))
    if (warning := non_commercial(filtered)) is not None:
        console.print(warning)
    for each in filtered:
        if each.kept:
            console.print(f"{each.kept:,} rows, licence {each.licence}: {output_dir / each.file}")
    console.print(f"The card: {output_dir / CARD}. Train on them with\n  {flags(filtered, output_dir, data_args)}")


def file_names(sources: Sequence[Source]) -> list[str]:
    """A different file name, without suffix, for the rows of each data set."""
    names: list[str] = []
    for source in sources:
        path = Path(source.name)
        parts = [path.resolve().stem if path.is_file() else path.resolve().name, source.config_name, source.split]
        if source.split == "train":
            parts.pop()
        name = re.sub(r"[^\w.-]+", "-", "-".join(filter(None, parts)), flags=re.ASCII).strip("-.") or "rows"
        same = sum(re.fullmatch(rf"{re.escape(name)}(\+\d+)?", other) is not None for other in names)
        names.append(f"{name}+{same + 1}" if same else name)
    return names


def check_output(output_dir: Path, names: Sequence[str], overwrite: bool) -> None:
    """
    Raises:
        UserError: if there is a result that may not be overwritten, or a file that is not of one.
    """
    card, data = output_dir / CARD, sorted((output_dir / DATA).glob("[!.]*"))
    old = [file for file in (card, *data) if file.exists()]
    if old and not (output_dir / REMOVED).is_file():
        raise UserError(f"{old[0]} is not a result of `pvm filter`. Choose another --output_dir.")
    if card.exists() and not overwrite:
        raise UserError(f"{card} exists already. Choose another --output_dir, or replace it with --overwrite true.")
    for file in data:
        if file.stem not in names:
            raise UserError(f"{file} is not of these data sets. Move it away, or choose another --output_dir.")


def check_unusable(
    sources: Sequence[Conversations], removals: Sequence[dict[int, Removal]], max_skipped: float, listed: Path
) -> None:
    """
    Raises:
        UserError: if more than a share of a data set is unusable: a wrong folder, rather than a few broken files.
    """
    for source, removed in zip(sources, removals):
        unusable = [index for index, removal in removed.items() if removal.rule == "unusable"]
        if len(unusable) > max_skipped * len(source):
            first = "".join(f"\n  {source.where(index)}: {removed[index].problem}" for index in unusable[:SHOWN_ROWS])
            raise UserError(
                f"{len(unusable):,} of {len(source):,} rows of {source.name} cannot be used, more than --max_skipped "
                f"{max_skipped:g} allows. {listed} lists them; the first:{first}"
            )


def remove_by_drop(
    arguments: FilterArguments,
    names: Sequence[str],
    sources: Sequence[Conversations],
    checks: Sequence[Dataset],
    removals: Sequence[dict[int, Removal]],
    processor: ProcessorMixin,
    output_dir: Path,
) -> list[list[float]]:
    """
    Add to `removals` the rows whose answers need their images too little.

    Returns:
        The drops of each data set.
    """
    checkpoint = load_checkpoint(arguments.model_name_or_path, arguments.dtype)
    (output_dir / MEASURED).mkdir(exist_ok=True)
    settings = [checkpoint_state(arguments.model_name_or_path), arguments.dtype, arguments.batch_size]
    settings += [processor_state(processor), version("torch"), version("transformers")]
    drops = []
    for name, source, check, removed in zip(names, sources, checks, removals):
        left = [index for index in range(len(source)) if index not in removed]
        rows, content = source.select(left), check.select(left)
        journal = output_dir / MEASURED / journal_name(name, [*settings, rows.rows, content["content"][:]])
        measured = measure(checkpoint, rows, content["length"][:], arguments.batch_size, journal)
        drops.append([measured[row].drop for row in rows.rows])
        for index, drop in zip(left, drops[-1]):
            if not drop >= arguments.min_drop:  # NaN, of a broken model, is no evidence
                loses = f"its answer loses {drop:.4f} nats per token, less than {arguments.min_drop:g}"
                removed[index] = Removal("not visual", f"with gray images {loses}.")
    return drops


def list_removals(file: Path, sources: Sequence[Conversations], removals: Sequence[dict[int, Removal]]) -> None:
    """Write a line for each removed row: where it is, the rule, and what of the row breaks it."""
    lines = (
        {**source.origin(index), **removed[index]._asdict()}
        for source, removed in zip(sources, removals)
        for index in sorted(removed)
    )
    write_atomically(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_rows(rows: Conversations, file: Path) -> Path:
    """
    Write rows as they are: JSON as JSON Lines, others as Parquet.

    Args:
        file (`Path`): without suffix.
    """
    is_json = rows.features == JSON_ROW
    file = file.with_name(f"{file.name}.{'jsonl' if is_json else 'parquet'}")
    temporary = file.with_name(f".{file.name}.tmp")
    dataset = rows.dataset.with_format(None).select(rows.rows)
    if is_json:
        with open(temporary, "wb") as stream:
            # Line breaks inside a JSON text are white space: in strings they are escaped.
            stream.writelines(row["json"].replace(b"\r", b" ").replace(b"\n", b" ") + b"\n" for row in dataset)
    else:
        dataset.to_parquet(temporary)
    os.replace(temporary, file)
    return file


def has_image_files(rows: Conversations) -> bool:
    """Whether any image is a file, and not in its row."""
    return any(image["bytes"] is None for index in range(len(rows)) for image in rows[index].images)


def flags(filtered: Sequence[Filtered], output_dir: Path, data_args: DataArguments) -> str:
    """The flags of a training on the rows that were written."""
    written = [each for each in filtered if each.file is not None]
    words = ["--dataset_name", *(str(output_dir / each.file) for each in written)]
    if any(each.root is not None for each in written):
        words += ["--image_root", *(str(each.root or output_dir) for each in written)]
    if data_args.allow_image_urls:
        words += ["--allow_image_urls", "true"]
    return shlex.join(words)


def used_flags(arguments: FilterArguments, data_args: DataArguments) -> dict[str, str]:
    """The flags that decided which rows are kept."""
    used = {
        "model_name_or_path": public_name(arguments.model_name_or_path)["name"],
        "max_samples": data_args.max_samples and " ".join(map(str, data_args.max_samples)),
        "match": " ".join(arguments.match),
        "max_length": data_args.max_length,
        "max_per_id": arguments.max_per_id,
        "min_drop": arguments.min_drop,
    }
    return {flag: str(value) for flag, value in used.items() if value is not None}


def show(table: list[list[str]], console: Terminal) -> None:
    headings, *rows = table
    printed = Table()
    for index, cells in enumerate(zip(*rows)):
        # Names of data sets are wrapped, and nothing else, so that nothing is cut off.
        least = max(map(len, cells))
        printed.add_column(headings[index], justify="right" if index else "left", overflow="fold", min_width=least)
    for row in rows:
        printed.add_row(*row)
    console.print(printed)
