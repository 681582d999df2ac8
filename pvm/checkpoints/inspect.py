"""
Show what a checkpoint is, in a folder or on the Hub, without loading a model or its base:

    python -m pvm inspect runs/digits_pvm
    python -m pvm inspect YOUR_NAME/qwen3-vl-8b-pvm --revision main --json

Prints its kind, base, layers, gates, training, the code that trust_remote_code runs, files with their SHA-256, and
problems. The exit status is 1 if it has problems.
"""

import hashlib
import json
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from rich.table import Table
from tqdm import tqdm
from transformers.utils import CONFIG_NAME

from adapter_qwen3vl_pvm import ADAPTER_WEIGHTS_NAME, MAX_GATE
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from pvm.checkpoints.code import check_code
from pvm.checkpoints.names import base_of, checkpoint_kind, describe_block, pvm_config, weight_pickles
from pvm.checkpoints.record import RECORD
from pvm.checkpoints.stored import CHUNK, DTYPES, Files, Tensor, list_files, read_header
from pvm.errors import UserError, reason
from pvm.terminal import Terminal
from variants_qwen3vl_pvm import BLOCKS


KINDS = {"stock": "stock Qwen3-VL", "pvm": "PVM", "peft": "PEFT adapter"}
MOST_LAYERS = 1000  # no model has more, and to build one takes time
MOST_PROBLEMS = 20  # of one kind
GATE = re.compile(r".*\.layers\.(\d{1,9})\.pvm_block\.gate_alpha")


@dataclass
class Inspection:
    """
    What is printed; `branches` and `gates` come from the weights, `code` says where each Python file that would run is
    from, `problems` are sentences.
    """

    name: str
    kind: str = "unknown"
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
    code: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def part(self, subject: str) -> Iterator[None]:
        """What goes wrong in a part of the inspection is a problem; the other parts go on."""
        try:
            yield
        except Exception as error:  # libraries raise anything for files that are damaged
            problem = str(error) if isinstance(error, UserError) else f"{subject}: {reason(error)}"
            self.problems += [problem] if problem not in self.problems else []

    def report(self, problems: list[str]) -> None:
        """Add problems of one kind, without drowning the others."""
        self.problems += problems[:MOST_PROBLEMS]
        if len(problems) > MOST_PROBLEMS:
            self.problems.append(f"... and {len(problems) - MOST_PROBLEMS:,} more of these.")


def inspect(name: str, revision: str = "main") -> Inspection:
    """
    Look at a checkpoint. Of its weights only the headers and the branches are read.

    Raises:
        UserError: if there is none.
    """
    files, found, kind = list_files(name, revision), Inspection(name), None
    odd = [path.name for path in sorted(Path(name).glob("*")) if not (path.is_file() or path.is_dir())]
    found.report([f"{file} is neither a file nor a folder, and is not read." for file in odd if files.local])
    with found.part(RECORD):
        found.record = files.json(RECORD)
    with found.part(CONFIG_NAME):
        kind = checkpoint_kind(name, revision)
        found.kind = KINDS[kind]
    if kind == "peft":
        with found.part(PEFT_CONFIG_NAME):
            found.base, found.base_revision = base_of(name, revision)
        if PEFT_WEIGHTS_NAME not in files.sizes:
            found.problems.append(f"There is no {PEFT_WEIGHTS_NAME}.")
    elif kind == "stock":
        if ADAPTER_WEIGHTS_NAME in files.sizes:
            found.problems.append(f"{ADAPTER_WEIGHTS_NAME} is not loaded: this is a stock model. Move it away.")
    else:
        config = None
        with found.part(CONFIG_NAME):
            config = pvm_config(name, revision)
            _describe(found, files, config)
        with found.part("The weights"):
            tensors = _read_weights(found, files, config)
            if config is not None and tensors:
                _check_names(found, config, tensors)
    with found.part("The code"):
        problems = [problem for problem in check_code(files, revision, found.code) if problem not in found.problems]
        found.report(problems)
    pickles = weight_pickles(files.sizes)
    found.report([f"{file} is a pickle, which is never loaded: only safetensors are." for file in pickles])
    for file in tqdm(files.sizes, desc="hashing", unit="file", leave=False, disable=not files.local):
        found.files[file] = {"size": files.sizes[file], "sha256": files.hashes.get(file)}
        if files.local:
            with found.part(file):
                found.files[file]["sha256"] = files.sha256(file)
    return found


def _describe(found: Inspection, files: Files, config: Qwen3VLPVMConfig) -> None:
    """What the config says, and a base or a LoRA adapter that is not there."""
    text, is_ours = config.text_config, files.json(CONFIG_NAME).get("model_type") == Qwen3VLPVMConfig.model_type
    found.base, found.base_revision = config.base_model_name_or_path, config.base_model_revision
    found.kind = f"PVM, {'adapter' if found.base else 'whole'} checkpoint"
    found.kind += " with LoRA" if config.peft_adapter else ""
    found.kind += "" if is_ours else " of the authors' implementation"
    found.layers, found.width = list(text.pvm_layers), text.pvm_hidden_size
    found.causal, found.trained = text.pvm_causal, text.pvm_training
    if text.pvm_block in BLOCKS:
        found.block = describe_block(text.pvm_block)
    else:
        found.problems.append(f"This installation does not know branches of the kind {text.pvm_block!r}.")
    if found.base is not None and Path(found.base).is_absolute():
        if not Path(found.base).is_dir():
            found.problems.append(f"The base is the folder {found.base}, which does not exist.")
        elif not files.local:
            found.problems.append(f"The base is the folder {found.base}.")
    if is_ours:
        auto_map = files.json(CONFIG_NAME).get("auto_map") or {}
        for name in ("AutoConfig", "AutoModelForImageTextToText"):
            if name not in auto_map:
                found.problems.append(f"config.json has no `auto_map` for {name}: trust_remote_code cannot load it.")
    if config.peft_adapter is not None:
        for file in (f"{config.peft_adapter}/{name}" for name in (PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME)):
            if file not in files.sizes:
                found.problems.append(f"There is no {file}.")


def _read_weights(found: Inspection, files: Files, config: Qwen3VLPVMConfig | None) -> dict[str, Tensor]:
    """Read the branches into `found`. Returns all tensors by name, and none if a file of them is damaged."""
    weights = [file for file in files.sizes if re.fullmatch(r"model.*\.safetensors", file)]
    if config is not None:
        loaded = [file for file in weights if (file == ADAPTER_WEIGHTS_NAME) == (found.base is not None)]
        why = f"the config names {'a' if found.base else 'no'} base"
        found.report([f"{file} is not loaded: {why}. Move it away." for file in weights if file not in loaded])
        weights = loaded
    if not weights:
        found.problems.append(f"There is no {ADAPTER_WEIGHTS_NAME if found.base else 'model.safetensors'}.")
    tensors: dict[str, tuple[Tensor, BinaryIO]] = {}
    problems, digest, dtypes, parameters = [], hashlib.sha256(), set(), 0
    with ExitStack() as stack:
        for file_name in weights:
            file = stack.enter_context(files.open(file_name))
            try:
                tensors |= {key: (tensor, file) for key, tensor in read_header(file, files.sizes[file_name]).items()}
            except Exception as error:  # a header may hold anything
                problems.append(f"{file_name} is damaged: {reason(error)}. Get it again.")
        is_complete = not problems
        branches = {key: tensors[key] for key in sorted(tensors) if ".pvm_block." in key}
        if found.base is not None:
            foreign = sorted(tensors.keys() - branches.keys())
            problems += [f"{key} is not a weight of a branch, and would replace the base's." for key in foreign]
        for key, (tensor, file) in branches.items():
            if tensor.dtype not in DTYPES:
                problems.append(f"{key} has the dtype {tensor.dtype}.")
                continue
            digest.update(f"{key} {tensor.dtype} {tensor.shape}".encode())
            dtypes.add(tensor.dtype)
            parameters += prod(tensor.shape)
            finite, first = _read(file, tensor, digest)
            gate = GATE.fullmatch(key)
            if gate and first is not None:
                found.gates[int(gate[1])] = first
                if not abs(first) <= MAX_GATE:
                    problems.append(f"{key} is {first}; trained gates are below 1, and none may exceed {MAX_GATE:g}.")
            elif not finite:
                problems.append(f"{key} is not finite.")
    found.report(problems)
    sha256 = digest.hexdigest() if branches else None
    found.branches = {"parameters": parameters, "dtypes": sorted(dtypes), "sha256": sha256}
    found.gates = dict(sorted(found.gates.items()))
    if found.trained and found.gates and not any(found.gates.values()):
        found.problems.append("All gates are exactly 0, although the config says that the branches were trained.")
    return {key: tensor for key, (tensor, _) in tensors.items()} if is_complete else {}


def _check_names(found: Inspection, config: Qwen3VLPVMConfig, tensors: dict[str, Tensor]) -> None:
    """Compare names and shapes with what the config expects."""
    text, vision = config.text_config, config.vision_config
    if text.pvm_block not in BLOCKS:
        return
    with torch.device("meta"):
        block = BLOCKS[text.pvm_block](text, 0).state_dict()
    layer = "model.language_model.layers.{}.pvm_block."
    expected = {layer.format(k) + name: tuple(block[name].shape) for k in text.pvm_layers for name in block}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items() if ".pvm_block." in key}
    found.report([f"{key} is missing." for key in sorted(expected.keys() - shapes.keys())])
    wrong = {key: shape for key, shape in shapes.items() if shape != expected.get(key)}
    found.report(
        [f"{key} has the shape {wrong[key]}, and the config expects {expected.get(key)}." for key in sorted(wrong)]
    )
    if found.base is None:
        layers = text.num_hidden_layers + vision.depth + len(vision.deepstack_visual_indexes)
        if layers > MOST_LAYERS:
            raise UserError(f"config.json describes {layers:,} layers, which no model has. Get it again.")
        with torch.device("meta"):
            model = Qwen3VLPVMForConditionalGeneration(config).state_dict()
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        missing = sorted(model.keys() - expected.keys() - tensors.keys() - tied)
        if missing:
            found.problems.append(f"{len(missing)} weights of the backbone are missing, e.g. {missing[0]}.")


def _read(file: BinaryIO, tensor: Tensor, digest: Any) -> tuple[bool, float | None]:
    """Add a tensor's bytes to a hash, a part at a time. Returns whether all values are finite, and the first."""
    file.seek(tensor.start)
    finite, first, left = True, None, tensor.end - tensor.start
    while chunk := file.read(min(left, CHUNK)):
        left -= len(chunk)
        digest.update(chunk)
        values = torch.frombuffer(bytearray(chunk), dtype=DTYPES[tensor.dtype])
        finite = finite and bool(values.isfinite().all())
        first = values[0].item() if first is None else first
    return finite, first


def show(found: Inspection, console: Terminal) -> None:
    """Print an inspection as tables."""
    trained = None
    if found.trained is not None:
        trained = ", ".join(f"{key} {value}" for key, value in found.trained.items() if value is not None)
    elif found.layers:
        trained = "not recorded" if any(found.gates.values()) else "not recorded; all gates are 0"
    origins = sorted(set(found.code.values()))
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
        **{
            f"code of {origin}" if " " in origin else f"code, {origin}": ", ".join(
                file for file, where in found.code.items() if where == origin
            )
            for origin in origins
        },
    }
    console.print(found.name, style="bold")
    console.print(_table(facts))
    stages = [found.record] if found.record else []
    while isinstance(stages[-1:] and stages[-1].get("previous"), dict):
        stages.append(stages[-1]["previous"])
    for record in reversed(stages):
        console.print(RECORD)
        console.print(_table({**record, "previous": None}))
    table = Table()
    for heading in ("file", "bytes", "SHA-256"):
        table.add_column(heading, justify="right" if heading == "bytes" else "left", overflow="fold")
    for name, facts in found.files.items():
        table.add_row(name, f"{facts['size']:,}", (facts["sha256"] or "")[:16])
    console.print(table)
    for problem in found.problems:
        console.print(f"Problem: {problem}", style="red")


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
    found, console = inspect(args.checkpoint, args.revision), Terminal()
    if args.json:
        console.print(json.dumps(asdict(found), indent=2))
    else:
        show(found, console)
    if found.problems:
        sys.exit(1)
