"""The files of a checkpoint, here or on the Hub, read without trust in what they say."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from huggingface_hub import HfApi, HfFileSystem

from pvm.checkpoints.names import LARGEST_JSON, not_found, parse_object, read_object


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 2**20  # bytes


@dataclass
class Files:
    """The files of a folder or repository: sizes in bytes, SHA-256 where the Hub knows it, and how to open one."""

    name: str
    sizes: dict[str, int]
    hashes: dict[str, str]
    open: Callable[[str], BinaryIO]
    local: bool

    def json(self, name: str) -> dict[str, Any]:
        """
        The content of a JSON file; empty if there is none.

        Raises:
            UserError: if it is not a JSON object.
        """
        if name not in self.sizes:
            return {}
        with self.open(name) as file:
            return read_object(file, f"{self.name}/{name}")

    def size(self, name: str) -> int | None:
        """Of any file, in bytes; `None` if there is none."""
        if self.local:
            file = Path(self.name, name)
            return file.stat().st_size if file.is_file() else None
        return self.sizes.get(name)

    def sha256(self, name: str) -> str:
        """The hash of a file's content, which is read for it."""
        digest = hashlib.sha256()
        with self.open(name) as content:
            while block := content.read(CHUNK):
                digest.update(block)
        return digest.hexdigest()


def list_files(name: str, revision: str) -> Files:
    """
    The files of a folder, with those in `lora/` and `custom_generate/`, or of a repository.

    Raises:
        UserError: if there is no such checkpoint.
    """
    folder = Path(name)
    if folder.is_dir():
        found = sorted([*folder.glob("*"), *folder.glob("lora/*"), *folder.glob("custom_generate/*")])
        sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in found if file.is_file()}
        return Files(name, sizes, {}, lambda file: open(folder / file, "rb"), True)
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:  # the network raises errors of many libraries
        raise not_found(name, error) from error
    sizes = {file.rfilename: file.size for file in info.siblings}
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
    hub = HfFileSystem()
    # In blocks of 256 KiB: with fsspec's default of 5 MiB, much more would be downloaded than is read.
    at = f"{name}@{info.sha}"
    return Files(name, sizes, hashes, lambda file: hub.open(f"{at}/{file}", "rb", block_size=2**18), False)


class Tensor(NamedTuple):
    """A tensor in a safetensors file: dtype by safetensors' name, shape, and where its bytes are in the file."""

    dtype: str
    shape: list[int]
    start: int
    end: int


def read_header(file: BinaryIO, size: int) -> dict[str, Tensor]:
    """
    The tensors of a safetensors file.

    Args:
        size (`int`): of the file, in bytes.

    Raises:
        Exception: of any kind, if the file is damaged.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, LARGEST_JSON):
        raise ValueError(f"it has {size:,} bytes, and its header would have {length:,}")
    header = parse_object(file.read(length), "its header")
    header.pop("__metadata__", None)
    at, tensors = 8 + length, {}
    for key, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, end) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        expected = prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - start
        if 8 + length + start != at or not 0 <= end - start == expected:
            raise ValueError(f"its header gives {key} the bytes {start} to {end}")
        tensors[key] = Tensor(dtype, shape, at, at := at + end - start)
    if at != size:
        raise ValueError(f"it has {size:,} bytes, and its header describes {at:,}")
    return tensors
