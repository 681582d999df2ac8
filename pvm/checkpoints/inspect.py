"""
Say what a checkpoint is, here or on the Hub, without loading its base or any model:

    python -m pvm inspect runs/digits_pvm
    python -m pvm inspect YOUR_NAME/qwen3-vl-8b-pvm --revision main --json

Printed are its kind, base, layers, gates, how it was trained, its files with their SHA-256, and what is wrong with it.
The exit status is 1 if something is.
"""

import pvm  # noqa: F401, I001  (first: it makes torchvision importable where its compiled operators are missing)

import hashlib
import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import Qwen3VLConfig
from transformers.utils import CONFIG_NAME

from configuration_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME, Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import MAX_GATE

from pvm.checkpoints.loading import MODEL_CLASS, checkpoint_kind
from pvm.errors import UserError
from pvm.checkpoints.record import RECORD
from pvm.variants import VARIANTS


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KINDS = {
    "stock": "stock Qwen3-VL",
    "pvm": "PVM",
    "mlp": "parallel MLP, a control",
    "token_gate": "PVM with token-wise gates",
    "adapter": "PEFT adapter",
}
PICKLES = (".bin", ".pt", ".pth", ".pkl")
CODE = ("configuration_qwen3vl_pvm.py", "modeling_qwen3vl_pvm.py")


@dataclass
class Files:
    """The files of a checkpoint, here or on the Hub: their sizes in bytes, known SHA-256, and how to open one."""

    sizes: dict[str, int]
    hashes: dict[str, str]
    open: Callable[[str], BinaryIO]
    local: bool

    def json(self, name: str) -> dict[str, Any]:
        if name not in self.sizes:
            return {}
        with self.open(name) as file:
            return json.load(file)


def list_files(name: str, revision: str) -> Files:
    """
    The files of a folder or of a repository.

    Raises:
        UserError: if there is no such checkpoint.
    """
    folder = Path(name)
    if folder.is_dir():
        found = [file for file in sorted([*folder.glob("*"), *folder.glob("lora/*")]) if file.is_file()]
        sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in found}
        return Files(sizes, {}, lambda file: open(folder / file, "rb"), True)
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:  # whatever the network does
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name} is no folder, and cannot be had from the Hub: {reason}") from error
    sizes = {file.rfilename: file.size for file in info.siblings}
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
    hub = HfFileSystem()
    # Not much more is read than asked for: 5 MB at a time is fsspec's own choice.
    return Files(sizes, hashes, lambda file: hub.open(f"{name}@{info.sha}/{file}", "rb", block_size=2**18), False)


@dataclass
class Inspection:
    """What is printed; `branches` and `gates` are of the weights themselves, `problems` are sentences."""

    name: str
    kind: str
    base: str | None = None
    base_revision: str | None = None
    layers: list[int] = field(default_factory=list)
    width: int | None = None
    causal: bool | None = None
    branches: dict[str, Any] = field(default_factory=dict)
    gates: dict[int, float] = field(default_factory=dict)
    trained: dict[str, Any] | None = None
    record: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def inspect(name: str, revision: str = "main") -> Inspection:
    """
    Look at a checkpoint. Of its weights only the headers and the branches are read.

    Raises:
        UserError: if there is none.
    """
    files = list_files(name, revision)
    kind = checkpoint_kind(name, revision)
    config = files.json(CONFIG_NAME)
    text = config.get("text_config", {})
    found = Inspection(name, KINDS[kind], record=files.json(RECORD))
    if kind == "adapter":
        peft = files.json("adapter_config.json")
        found.base, found.base_revision = peft.get("base_model_name_or_path"), peft.get("revision")
        if "adapter_model.safetensors" not in files.sizes:
            found.problems.append("There is no adapter_model.safetensors.")
    if kind in ("pvm", *VARIANTS):
        found.base, found.base_revision = config.get("base_model_name_or_path"), config.get("base_model_revision")
        found.kind += ", an adapter" if found.base else ", whole"
        found.kind += " with LoRA" if config.get("peft_adapter") else ""
        found.kind += ", of the authors' implementation" if config["model_type"] == Qwen3VLConfig.model_type else ""
        found.layers, found.width = text.get("pvm_layers", []), text.get("pvm_hidden_size")
        found.causal = text.get("pvm_causal", config["model_type"] != Qwen3VLConfig.model_type)
        found.trained = text.get("pvm_training")
        _look_at_branches(found, files, kind, name, revision)
        _look_at_rest(found, files, config)
    found.problems += [f"{file} is a pickle, which nothing here reads." for file in _pickles(files)]
    for file in tqdm(files.sizes, desc="hashing", unit="file", leave=False, disable=not files.local):
        known = files.hashes.get(file) or (_sha256(files, file) if files.local else None)
        found.files[file] = {"size": files.sizes[file], "sha256": known}
    return found


def _look_at_branches(found: Inspection, files: Files, kind: str, name: str, revision: str) -> None:
    """Gates, number and hash of the branches' weights, and what is missing of them."""
    digest, shapes, dtypes, keys = hashlib.sha256(), {}, set(), set()
    entries = []
    weights = [file for file in files.sizes if file.startswith("model") and file.endswith(".safetensors")]
    # A file of the other kind may be left from an earlier push.
    weights = [file for file in weights if (file == ADAPTER_WEIGHTS_NAME) == (found.base is not None)]
    if not weights:
        found.problems.append(f"There is no {ADAPTER_WEIGHTS_NAME if found.base else 'model.safetensors'}.")
    for file_name in weights:
        with files.open(file_name) as file:
            length, size = int.from_bytes(file.read(8), "little"), files.sizes[file_name]
            try:
                header = json.loads(file.read(length)) if length < size else None
                ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
            except (AttributeError, KeyError, TypeError, ValueError):
                found.problems.append(f"{file_name} is no safetensors file.")
                continue
            if 8 + length + max(ends, default=0) != size:
                found.problems.append(
                    f"{file_name} has {size:,} bytes, and its header speaks of others: it is damaged."
                )
                continue
            keys |= header.keys()
            for key, tensor in header.items():
                if ".pvm_block." in key:
                    file.seek(8 + length + tensor["data_offsets"][0])
                    entries.append((key, tensor, file.read(tensor["data_offsets"][1] - tensor["data_offsets"][0])))
    for key, tensor, content in sorted(entries, key=lambda entry: entry[0]):
        digest.update(f"{key} {tensor['dtype']} {tensor['shape']}".encode())
        digest.update(content)
        shapes[key] = tuple(tensor["shape"])
        dtypes.add(tensor["dtype"])
        if tensor["dtype"] not in DTYPES:
            found.problems.append(f"{key} is of the dtype {tensor['dtype']}.")
            continue
        values = torch.frombuffer(bytearray(content), dtype=DTYPES[tensor["dtype"]])
        if not values.isfinite().all() and not key.endswith("gate_alpha"):
            found.problems.append(f"{key} is not finite.")
        if key.endswith("gate_alpha") and values.numel() == 1:
            gate = values.item()
            found.gates[int(key.split(".layers.")[1].split(".")[0])] = gate
            if not abs(gate) <= MAX_GATE:
                found.problems.append(f"{key} is {gate}, and no trained gate is above {MAX_GATE:g}.")
    found.branches = {
        "parameters": sum(map(prod, shapes.values())),
        "dtypes": sorted(dtypes),
        "sha256": digest.hexdigest() if entries else None,
    }
    found.gates = dict(sorted(found.gates.items()))
    if found.trained and found.gates and not any(found.gates.values()):
        found.problems.append("All gates are exactly 0, although it says that it was trained.")

    model_class = MODEL_CLASS[kind]
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_pretrained(name, revision=revision))
    expected = {key: tuple(weight.shape) for key, weight in model.state_dict().items() if ".pvm_block." in key}
    if found.base is None:
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        rest = sorted(model.state_dict().keys() - expected.keys() - keys - tied)
        found.problems += [f"It lacks {len(rest)} weights of its backbone, e.g. {rest[0]}."] if rest else []
    for key in sorted(expected.keys() | shapes.keys()):
        if key not in shapes:
            found.problems.append(f"{key} is missing.")
        elif shapes[key] != expected.get(key):
            found.problems.append(f"{key} has the shape {shapes[key]}, and the config wants {expected.get(key)}.")


def _look_at_rest(found: Inspection, files: Files, config: dict[str, Any]) -> None:
    """Code files, the LoRA adapter, a base that others do not have."""
    if found.base is not None and Path(found.base).is_absolute():
        there = "" if Path(found.base).is_dir() else ", which is not there"
        found.problems += [f"Its base is the folder {found.base}{there}."] if there or not files.local else []
    if config.get("peft_adapter"):
        wanted = {f"{config['peft_adapter']}/{file}" for file in ("adapter_config.json", "adapter_model.safetensors")}
        found.problems += [f"There is no {file}." for file in sorted(wanted - files.sizes.keys())]
    if config["model_type"] != Qwen3VLPVMConfig.model_type:
        return  # the authors', or a control, which have no code here
    foreign = sorted(value for value in config.get("auto_map", {}).values() if "--" in value)
    found.problems += [f"Its code is that of another repository: {value}." for value in foreign]
    missing = [key for key in ("AutoConfig", "AutoModelForImageTextToText") if key not in config.get("auto_map", {})]
    found.problems += [
        f"Its config.json has no `auto_map` for {key}: trust_remote_code cannot load it." for key in missing
    ]
    found.problems += [
        f"There is no {file}: trust_remote_code cannot load it." for file in CODE if file not in files.sizes
    ]


def _pickles(files: Files) -> list[str]:
    """Pickles in the place of weights; a training's own folders have some for themselves."""
    names = ("optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin")
    return [f for f in files.sizes if f.endswith(PICKLES) and f not in names and not f.startswith("rng_state")]


def _sha256(files: Files, name: str) -> str:
    with files.open(name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def show(found: Inspection, console: Console) -> None:
    """Print an inspection as tables."""
    facts = {
        "kind": found.kind,
        "base": found.base,
        "revision of the base": found.base_revision,
        "layers with a branch": ", ".join(map(str, found.layers)) or None,
        "width of a branch": found.width,
        "text reads": None if found.causal is None else "only images before it" if found.causal else "all images",
        "parameters of the branches": f"{found.branches['parameters']:,}" if found.branches else None,
        "their dtype": ", ".join(found.branches.get("dtypes", [])) or None,
        "their SHA-256": found.branches.get("sha256"),
        "gates": ", ".join(f"layer {layer}: {gate:+.4f}" for layer, gate in found.gates.items()) or None,
        "trained": _trained(found),
    }
    console.print(found.name, highlight=False, style="bold")
    console.print(_table(facts))
    if found.record:
        console.print(RECORD)
        console.print(_table(found.record))
    table = Table()
    for heading in ("file", "bytes", "SHA-256"):
        table.add_column(heading, justify="right" if heading == "bytes" else "left", overflow="fold")
    for name, facts in found.files.items():
        table.add_row(name, f"{facts['size']:,}", (facts["sha256"] or "")[:16])
    console.print(table)
    for problem in found.problems:
        console.print(f"Problem: {problem}", style="red", highlight=False)


def _table(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if value is not None:
            table.add_row(key.replace("_", " "), str(_short(value)))
    return table


def _trained(found: Inspection) -> str | None:
    if not found.layers:
        return None
    if found.trained is None:
        return "not marked as trained" + ("; all gates are 0" if not any(found.gates.values()) else "")
    return ", ".join(f"{key} {value}" for key, value in found.trained.items() if value is not None)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items() if item not in (None, False))
    if isinstance(value, list):
        return ", ".join(str(_short(item)) for item in value)
    return value


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser("python -m pvm inspect", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="Folder or Hub name.")
    parser.add_argument("--revision", default="main", help="Branch, tag or commit on the Hub.")
    parser.add_argument("--json", action="store_true", help="Print everything as JSON.")
    args = parser.parse_args(arguments)
    found = inspect(args.checkpoint, args.revision)
    if args.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        show(found, Console(soft_wrap=False))
    if found.problems:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except (UserError, StrictDataclassError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"pvm inspect: error: {error}")
