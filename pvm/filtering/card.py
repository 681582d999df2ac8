"""The data card of filtered rows: where they come from, what was removed and why, and their licences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import DatasetCardData

from pvm import __version__
from pvm.checkpoints.names import public_name
from pvm.data.sources import Source
from pvm.filtering.rules import RULES


NON_COMMERCIAL, EITHER, UNKNOWN = "cc-by-nc-4.0", "apache-2.0 or mit", "unknown"
# As their publishers state them, by the name of a data set or of a configuration.
LICENCES = {
    "We-Math2.0-Pro": NON_COMMERCIAL,
    "We-Math2.0-Standard": NON_COMMERCIAL,
    "wemath_pro": NON_COMMERCIAL,  # of OpenMMReasoner-RL-74K
    "wemath_standard": NON_COMMERCIAL,
    "OpenMMReasoner-SFT-874K": NON_COMMERCIAL,
    "OpenMMReasoner-RL-74K": EITHER,
    "ViRL39K": "mit",
    "MMK12": EITHER,
    "ThinkLite-VL-hard-11k": EITHER,
}
QUANTILES = {"least": 0, "10 %": 0.1, "half": 0.5, "90 %": 0.9, "most": 1}


def licence_of(name: str, config_name: str | None) -> str:
    """
    The licence of a data set by the names in its path, "unknown" if none is in the list. Of several, the first in the
    list counts, which has the strictest at its start.
    """
    path = Path(name).absolute()
    names = {*path.parts, path.stem, config_name}
    return next((LICENCES[name] for name in LICENCES if name in names), UNKNOWN)


@dataclass
class Filtered:
    """
    What was kept of a data set.

    source (`Source`): where it was.
    name (`str`): of the file with its kept rows, without suffix.
    file (`str` or `None`): this file; `None` if no row was kept.
    rows (`int`): in all.
    removed (`dict[str, int]`): rows removed by each of `RULES`.
    drops (`list[float]`): of the rows that were measured, in nats per token.
    root (`Path` or `None`): what paths of images start from; `None` if all images are in the rows.
    """

    source: Source
    name: str
    rows: int
    removed: dict[str, int]
    drops: list[float]
    file: str | None = None
    root: Path | None = None

    @property
    def kept(self) -> int:
        return self.rows - sum(self.removed.values())

    @property
    def licence(self) -> str:
        return licence_of(self.source.name, self.source.config_name)


def counts_table(filtered: Sequence[Filtered]) -> list[list[str]]:
    """Headings, then how many rows each rule removed from each data set, and from all."""
    columns = [[each.name, each.rows, *(each.removed.get(rule, 0) for rule in RULES), each.kept] for each in filtered]
    if len(columns) > 1:
        columns.append(["all", *(sum(numbers) for numbers in zip(*(column[1:] for column in columns)))])
    texts = [[number if isinstance(number, str) else f"{number:,}" for number in column] for column in columns]
    return [list(row) for row in zip(["", "rows", *RULES, "kept"], *texts)]


def quantiles_table(filtered: Sequence[Filtered]) -> list[list[str]]:
    """Headings, then quantiles of the drops in each data set where any were measured."""
    measured = [each for each in filtered if each.drops]
    rows = [
        [each.name, *(f"{np.quantile(each.drops, share):.3f}" for share in QUANTILES.values())] for each in measured
    ]
    return [["nats per token", *QUANTILES], *rows]


def non_commercial(filtered: Sequence[Filtered]) -> str | None:
    """The warning, if any kept row needs one."""
    names = [each.name for each in filtered if each.licence == NON_COMMERCIAL and each.kept]
    return f"NON-COMMERCIAL: the rows of {', '.join(names)} are under {NON_COMMERCIAL}." if names else None


def data_card(filtered: Sequence[Filtered], settings: dict[str, str]) -> str:
    """
    Args:
        filtered (`Sequence[Filtered]`): of all data sets.
        settings (`dict[str, str]`): the flags that decided which rows are kept.
    """
    written = [each for each in filtered if each.file is not None]
    licences = {each.licence for each in written}
    licence = licences.pop() if len(licences) == 1 else NON_COMMERCIAL if NON_COMMERCIAL in licences else "other"
    configs = [{"config_name": each.name, "data_files": [{"split": "train", "path": each.file}]} for each in written]
    metadata = DatasetCardData(license="other" if licence == EITHER else licence, configs=configs).to_yaml()
    parts = [
        f"---\n{metadata}\n---",
        f"# Visually centred rows of {', '.join(public_name(each.source.name)['name'] for each in filtered)}",
    ]
    if (warning := non_commercial(filtered)) is not None:
        parts.append(f"> **{warning}**")
    parts += [
        f"Chosen by `pvm filter` {__version__} of Persistent Visual Memory for Qwen3-VL. Rows are as published: their "
        "columns and texts have not been changed. The filter of the paper (arXiv 2605.00814), which kept 526k of 874k "
        "rows, is not public; this is another one.",
        "| file | data set | rows | licence |\n|---|---|---|---|\n"
        + "\n".join(
            f"| {each.file} | {public_name(each.source.name)['name']}, "
            f"{', '.join(filter(None, (each.source.config_name, each.source.split)))} | {each.kept:,} | "
            f"{each.licence} |"
            for each in written
        ),
        'Licences are those of the data sets, by their names; "unknown" is one that `pvm filter` does not know. '
        "Images may have others: see their publishers.",
        "## What was removed",
        _markdown(counts_table(filtered)),
        "A row counts for the first rule that removes it. `removed_rows.jsonl` lists every one with its reason.\n\n"
        + "\n".join(f"- {rule}: {meaning}" for rule, meaning in RULES.items()),
        "Settings: " + ", ".join(f"`--{flag} {value}`" for flag, value in settings.items()) + ".",
    ]
    if any(each.drops for each in filtered):
        parts += [
            "Drop of the last answer's log-probability when its images are gray, over the rows that no other rule "
            "removes:",
            _markdown(quantiles_table(filtered)),
        ]
    if files := [each for each in written if each.root is not None]:
        parts.append(
            "## Images\n\nThe rows name files of images, which are not here. Paths start from `--image_root`: "
            + "; ".join(f"for {each.name} `{each.root.name}` of the data set" for each in files)
            + "."
        )
    return "\n\n".join(parts) + "\n"


def _markdown(table: list[list[str]]) -> str:
    headings, *rows = table
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] + ["---:"] * (len(headings) - 1), *rows))
