"""
Show what a checkpoint is, in a folder or on the Hub, without loading a model or its base:

    python -m pvm inspect runs/digits_pvm
    python -m pvm inspect YOUR_NAME/qwen3-vl-8b-pvm --revision main --json

Prints its kind, base, layers, gates, training, files with their SHA-256, and problems. The exit status is 1 if it has
problems.
"""

import hashlib
import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import HfApi, HfFileSystem
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import CONFIG_NAME, cached_file

from adapter_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME, MAX_GATE
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.checkpoints.names import branch_block, checkpoint_kind, describe_block
from pvm.checkpoints.record import RECORD
from pvm.errors import UserError


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KINDS = {"stock": "stock Qwen3-VL", "pvm": "PVM", "peft": "PEFT adapter"}
PICKLES = (".bin", ".pt", ".pth", ".pkl")
# Pickles that the Trainer resumes from; they hold no weights and are never pushed.
TRAINER_PICKLES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin")


@dataclass
class Files:
    """The files of a folder or repository: sizes in bytes, SHA-256 where the Hub knows it, and how to open one."""

    sizes: dict[str, int]
    hashes: dict[str, str]
    open: Callable[[str], BinaryIO]
    local: bool

    def json(self, name: str) -> dict[str, Any]:
        """
        The content of a JSON file; empty if there is none.

        Raises:
            UserError: if it is not JSON.
        """
        if name not in self.sizes:
            return {}
        with self.open(name) as file:
            try:
                return json.load(file)
            except ValueError as error:
                raise UserError(f"{name} is not valid JSON: {error}") from error


def list_files(name: str, revision: str) -> Files:
    """
    The files of a folder, with those in `lora/`, or of a repository.

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
    except Exception as error:  # the network raises errors of many libraries
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name} is not a folder, and could not be loaded from the Hub: {reason}") from error
    sizes = {file.rfilename: file.size for file in info.siblings}
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
    hub = HfFileSystem()
    # In blocks of 256 KiB: with fsspec's default of 5 MiB, much more would be downloaded than is read.
    return Files(sizes, hashes, lambda file: hub.open(f"{name}@{info.sha}/{file}", "rb", block_size=2**18), False)


@dataclass
class Inspection:
    """What is printed; `branches` and `gates` come from the weights, `problems` are sentences."""

    name: str
    kind: str
    base: str | None = None
    base_revision: str | None = None
    block: str | None = None
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
        UserError: if there is none, or a file is not what its name says.
    """
    files = list_files(name, revision)
    kind = checkpoint_kind(name, revision)
    found = Inspection(name, KINDS[kind], record=files.json(RECORD))
    if kind == "peft":
        config = files.json(PEFT_CONFIG_NAME)
        found.base, found.base_revision = config.get("base_model_name_or_path"), config.get("revision")
        if PEFT_WEIGHTS_NAME not in files.sizes:
            found.problems.append(f"There is no {PEFT_WEIGHTS_NAME}.")
    if kind == "pvm":
        stored, config = files.json(CONFIG_NAME), Qwen3VLPVMConfig.from_pretrained(name, revision=revision)
        text, is_ours = config.text_config, stored["model_type"] == Qwen3VLPVMConfig.model_type
        found.base, found.base_revision = config.base_model_name_or_path, config.base_model_revision
        found.kind += ", adapter checkpoint" if found.base else ", whole checkpoint"
        found.kind += " with LoRA" if config.peft_adapter else ""
        found.kind += "" if is_ours else " of the authors' implementation"
        found.block = describe_block(branch_block(name, revision))
        found.layers, found.width = list(text.pvm_layers), text.pvm_hidden_size
        found.causal, found.trained = text.pvm_causal, text.pvm_training
        found.problems += _branch_problems(found, files, config)
        found.problems += _base_problems(found, files, config)
        if is_ours:
            found.problems += _code_problems(name, revision, files, stored.get("auto_map", {}))
    found.problems += [
        f"{file} is a pickle, which is never loaded: only safetensors are."
        for file in files.sizes
        if file.endswith(PICKLES) and file not in TRAINER_PICKLES and not file.startswith("rng_state")
    ]
    for file in tqdm(files.sizes, desc="hashing", unit="file", leave=False, disable=not files.local):
        found.files[file] = {"size": files.sizes[file], "sha256": files.hashes.get(file)}
        if files.local:
            digest = hashlib.sha256()
            with files.open(file) as content:
                while block := content.read(2**20):
                    digest.update(block)
            found.files[file]["sha256"] = digest.hexdigest()
    return found


def _branch_problems(found: Inspection, files: Files, config: Qwen3VLPVMConfig) -> Iterator[str]:
    """Read the branches into `found`, and compare all weights with what the config expects."""
    expected_file = ADAPTER_WEIGHTS_NAME if found.base else "model.safetensors"
    # An earlier push may have left weights of the other form.
    weights = [file for file in files.sizes if file.startswith("model") and file.endswith(".safetensors")]
    weights = [file for file in weights if (file == ADAPTER_WEIGHTS_NAME) == (found.base is not None)]
    if not weights:
        yield f"There is no {expected_file}."
    keys: set[str] = set()
    branches: dict[str, tuple[dict[str, Any], bytes]] = {}
    for file_name in weights:
        with files.open(file_name) as file:
            length, size = int.from_bytes(file.read(8), "little"), files.sizes[file_name]
            try:
                header = json.loads(file.read(length)) if length < size else None
                ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
            except (AttributeError, KeyError, TypeError, ValueError):
                yield f"{file_name} is not a safetensors file."
                continue
            expected_size = 8 + length + max(ends, default=0)
            if expected_size != size:
                yield f"{file_name} is damaged: it has {size:,} bytes, and its header describes {expected_size:,}."
                continue
            keys |= header.keys()
            for key, tensor in header.items():
                if ".pvm_block." in key:
                    start, end = tensor["data_offsets"]
                    file.seek(8 + length + start)
                    branches[key] = tensor, file.read(end - start)

    digest = hashlib.sha256()
    for key, (tensor, content) in sorted(branches.items()):
        digest.update(f"{key} {tensor['dtype']} {tensor['shape']}".encode())
        digest.update(content)
        if tensor["dtype"] not in DTYPES:
            yield f"{key} has the dtype {tensor['dtype']}."
            continue
        values = torch.frombuffer(bytearray(content), dtype=DTYPES[tensor["dtype"]])
        if not key.endswith("gate_alpha"):
            if not values.isfinite().all():
                yield f"{key} is not finite."
        elif values.numel() == 1:
            gate = found.gates[int(key.split(".layers.")[1].split(".")[0])] = values.item()
            if not abs(gate) <= MAX_GATE:
                yield f"{key} is {gate}; trained gates are below 1, and none may exceed {MAX_GATE:g}."
    shapes = {key: tuple(tensor["shape"]) for key, (tensor, _) in branches.items()}
    found.branches = {
        "parameters": sum(map(prod, shapes.values())),
        "dtypes": sorted({tensor["dtype"] for tensor, _ in branches.values()}),
        "sha256": digest.hexdigest() if branches else None,
    }
    found.gates = dict(sorted(found.gates.items()))
    if found.trained and found.gates and not any(found.gates.values()):
        yield "All gates are exactly 0, although the config says that the branches were trained."

    with torch.device("meta"):
        model = Qwen3VLPVMForConditionalGeneration(config)
    expected = {key: tuple(weight.shape) for key, weight in model.state_dict().items() if ".pvm_block." in key}
    if found.base is None:
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        missing = sorted(model.state_dict().keys() - expected.keys() - keys - tied)
        if missing:
            yield f"{len(missing)} weights of the backbone are missing, e.g. {missing[0]}."
    for key in sorted(expected.keys() | shapes.keys()):
        if key not in shapes:
            yield f"{key} is missing."
        elif shapes[key] != expected.get(key):
            yield f"{key} has the shape {shapes[key]}, and the config expects {expected.get(key)}."


def _base_problems(found: Inspection, files: Files, config: Qwen3VLPVMConfig) -> Iterator[str]:
    """A base that others do not have, or a LoRA adapter that is not there."""
    if found.base is not None and Path(found.base).is_absolute():
        if not Path(found.base).is_dir():
            yield f"The base is the folder {found.base}, which does not exist."
        elif not files.local:
            yield f"The base is the folder {found.base}."
    if config.peft_adapter is not None:
        for file in (f"{config.peft_adapter}/{name}" for name in (PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME)):
            if file not in files.sizes:
                yield f"There is no {file}."


def _code_problems(name: str, revision: str, files: Files, auto_map: dict[str, str]) -> Iterator[str]:
    """What keeps `trust_remote_code` from running the checkpoint's own code: all modules that it names or imports."""
    for auto_class in ("AutoConfig", "AutoModelForImageTextToText"):
        if auto_class not in auto_map:
            yield f"The config.json has no `auto_map` for {auto_class}: trust_remote_code cannot load it."
    for reference in sorted(set(auto_map.values())):
        if "--" in reference:
            yield f"The code is that of another repository: {reference}."
    modules = sorted({reference.partition(".")[0] for reference in auto_map.values() if "--" not in reference})
    for module in modules:  # more are added on the way
        if f"{module}.py" in files.sizes:
            file = cached_file(name, f"{module}.py", revision=revision)
            modules += sorted(set(get_relative_imports(file)) - set(modules))
        else:
            yield f"There is no {module}.py: trust_remote_code cannot load the checkpoint."


def show(found: Inspection, console: Console) -> None:
    """Print an inspection as tables."""
    trained = None
    if found.trained is not None:
        trained = ", ".join(f"{key} {value}" for key, value in found.trained.items() if value is not None)
    elif found.layers:
        trained = "not recorded" if any(found.gates.values()) else "not recorded; all gates are 0"
    facts = {
        "kind": found.kind,
        "base": found.base,
        "revision of the base": found.base_revision,
        "kind of branch": found.block,
        "layers with a branch": ", ".join(map(str, found.layers)) or None,
        "width of a branch": found.width,
        "text attends to": None if found.causal is None else "the images before it" if found.causal else "all images",
        "parameters of the branches": f"{found.branches['parameters']:,}" if found.branches else None,
        "their dtype": ", ".join(found.branches.get("dtypes", [])) or None,
        "their SHA-256": found.branches.get("sha256"),
        "gates": ", ".join(f"layer {layer}: {gate:+.4f}" for layer, gate in found.gates.items()) or None,
        "training": trained,
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
        show(found, Console())
    if found.problems:
        sys.exit(1)
