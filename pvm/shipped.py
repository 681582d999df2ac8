"""
The files that come along with the package: recipes, and the tiny Qwen3-VL of the demo.

    pvm recipes

puts the recipes into ./recipes, where the documentation's commands look for them, and keeps what is there.
"""

import filecmp
import os
import shutil
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from tempfile import TemporaryDirectory

from pvm.terminal import Terminal


def shipped(name: str) -> Path:
    """The folder `recipes` or `assets`: in an installation beside this file, in a clone beside the package."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


def put_here(name: str, console: Terminal) -> None:
    """
    Copy what is in a shipped folder, each file or folder whole or not at all, into the folder of that name in the
    working directory. What is there is kept; what of it differs is named.

    Args:
        name (`str`): `recipes` or `assets`.
    """
    folder = Path(name)
    folder.mkdir(exist_ok=True)
    for source in sorted(shipped(name).iterdir()):
        target = folder / source.name
        if target.exists():
            if not _is_same(source, target):
                console.print(f"Kept, though it is not what comes with this version: {target}")
            continue
        with TemporaryDirectory(dir=folder, prefix=".") as temporary:
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            os.replace(copy(source, Path(temporary, source.name)), target)


def _is_same(source: Path, target: Path) -> bool:
    if source.is_dir():
        return all(_is_same(file, target / file.name) for file in source.iterdir())
    return target.is_file() and filecmp.cmp(source, target, shallow=False)


def main(arguments: list[str] | None = None) -> None:
    """The command `pvm recipes`."""
    parser = ArgumentParser("pvm recipes", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    console = Terminal()
    put_here("recipes", console)
    console.print("The recipes are in ./recipes. For instance: pvm train --config recipes/qwen3_vl_8b_sft.yaml --help")
