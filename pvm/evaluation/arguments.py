"""The command line of eval.py, and what can be wrong with it before anything is loaded."""

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path

from pvm.errors import UserError
from pvm.evaluation.ablations import ABLATIONS, IN_TWO_PARTS, OF_BRANCHES, ablations_of, check_ablations
from pvm.evaluation.matching import MATCHES


# The flags that --tasks accepts; the others are about a data set.
WITH_TASKS = ("model", "names", "output_dir", "max_samples", "batch_size", "max_new_tokens", "dtype", "overwrite")
WITH_TASKS += ("backend",)
DIAGNOSTIC_ROWS = 8


@dataclass(kw_only=True)
class EvalArguments:
    """What is evaluated, and on what."""

    model: list[str] = field(
        metadata={"help": "Checkpoints: folders or Hub names. The others are compared with the first."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A .json, .jsonl or .parquet file, a folder of those, or a Hub name. docs/data.md shows the forms "
            "that rows may have."
        },
    )
    output_dir: str = field(metadata={"help": "Where the report is written."})
    names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the checkpoints in the report; by default the last part of their paths. Checkpoints "
            "with the same name are runs of one method (seeds) and are reported together (but not with --tasks)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="test", metadata={"help": "E.g. `test` or `test[:1000]`."})
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder or zip file that relative paths of images and videos start from, by default the folder of "
            "the data file."
        },
    )
    allow_image_urls: bool = field(
        default=False,
        metadata={
            "help": "Fetch images that rows name by http(s) URLs. Only for data that you trust: it could make this "
            "machine call any address it can reach."
        },
    )
    max_samples: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate on this many rows, spread evenly over the data set; with --tasks on the first ones."
        },
    )
    group_by: str | None = field(
        default=None, metadata={"help": "Column, e.g. of task names, whose values are reported separately."}
    )
    ablations: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What to remove from each model, one at a time, to see what its answers depend on: "
            + "; ".join(f"`{kind}`, {what}" for kind, what in ABLATIONS.items())
            + ".",
            "choices": tuple(ABLATIONS),
        },
    )
    image_kv_cache: str = field(
        default="keep",
        metadata={
            "help": "What self-attention sees of images in models whose branches read them: `keep`, all; `evict`, "
            "images leave the KV cache after the prompt; `skip`, they never enter the decoder. Other models see all.",
            "choices": ("keep", "evict", "skip"),
        },
    )
    match: str = field(
        default="exact",
        metadata={
            "help": "When an answer is correct: it is the reference's text, ignoring case and spaces (`exact`), "
            "chooses the same option (`choice`: B, (B), The answer is B), gives the same number (`number`), or is the "
            "same mathematical object in LaTeX or plain text (`math`, needs math-verify). An answer that commits to "
            "several things is ambiguous, and counts as wrong.",
            "choices": tuple(MATCHES),
        },
    )
    scored_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression for the pieces of an answer that are scored by depth. By default every word "
            "with `--match exact`, otherwise none."
        },
    )
    diagnostic_rows: int | None = field(
        default=None,
        metadata={
            "help": "Rows of each group on which the first run of each model is inspected: where attention goes, at "
            f"which layer the prediction is made, what branches add. 0: none. {DIAGNOSTIC_ROWS} by default, none with "
            "`--backend vllm`."
        },
    )
    backend: str = field(
        default="transformers",
        metadata={
            "help": "What answers: `transformers`, which can do all that is here, or `vllm`, for many questions or "
            "long answers (docs/serving.md).",
            "choices": ("transformers", "vllm"),
        },
    )
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows that are answered together; 32 by default, 1 with --tasks. With `--backend vllm` the most; "
            "by default it chooses, and 256 with --tasks."
        },
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest answer in tokens. By default the next power of two that leaves 8 tokens more than the "
            "reference answer has: too few for a model that reasons before a short answer."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the models; `auto` is the checkpoint's.",
            "choices": ("auto", "float32", "bfloat16", "float16"),
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace a report in output_dir, or an interrupted evaluation with other arguments."},
    )

    def __post_init__(self):
        if self.diagnostic_rows is None:
            self.diagnostic_rows = 0 if self.backend == "vllm" else DIAGNOSTIC_ROWS
        # With other rules a correct answer may have other words than the reference.
        if self.scored_pattern is None and self.match == "exact":
            self.scored_pattern = r"\S+"


@dataclass
class Model:
    """
    One of the checkpoints.

    name (`str`): in the report; the runs of a method share it.
    run (`int`): which of these runs.
    label (`str`): unique.
    path (`str`): folder or Hub name.
    """

    name: str
    run: int
    label: str
    path: str


def name_models(paths: list[str], names: list[str] | None) -> list[Model]:
    """
    The models under their names in the report. Models with the same name are the runs of one method.

    Raises:
        UserError: if there are not as many names as models, a name cannot be a file name, names are ambiguous, or a
            path is given twice.
    """
    if names is None:
        names = [Path(path).resolve().name if Path(path).is_dir() else path.rpartition("/")[2] for path in paths]
        if len(set(names)) != len(names):
            raise UserError(f"Two models would have the same name: {', '.join(names)}. Choose others with --names.")
    if len(names) != len(paths):
        raise UserError(f"--names has {len(names)} names for {len(paths)} models. Give each model one.")
    if len({Path(path).resolve() if Path(path).is_dir() else path for path in paths}) < len(names):
        raise UserError("--model names a checkpoint twice. Name each once.")
    models = []
    for name, path in zip(names, paths):
        if not re.fullmatch(r"[\w.+ -]{1,80}", name, re.ASCII) or " - " in name:
            raise UserError(
                f"{name!r} cannot be the report's name for {path}. With --names, choose up to 80 ASCII letters, "
                "digits, spaces and . _ + -, without a dash between spaces: it becomes a file name, and such a dash "
                "marks ablations."
            )
        run = sum(model.name == name for model in models)
        models.append(Model(name, run, name if names.count(name) == 1 else f"{name} run {run + 1}", path))
    labels = [model.label for model in models]
    if len(set(labels)) != len(labels):
        raise UserError(f"--names: two models would have the same label: {', '.join(labels)}.")
    return models


def check_arguments(arguments: EvalArguments) -> list[Model]:
    """
    Refuse what is wrong with the command line before any time is spent.

    Returns:
        `list[Model]`: the models.

    Raises:
        UserError: for anything that is wrong.
    """
    models = name_models(arguments.model, arguments.names)
    for flag, least in (("max_samples", 1), ("batch_size", 1), ("max_new_tokens", 1), ("diagnostic_rows", 0)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}.")
    if arguments.backend == "vllm":
        check_vllm(arguments)
    if arguments.image_kv_cache != "keep":
        flag = f"--image_kv_cache {arguments.image_kv_cache}"
        if not any(ablations_of(path, ["skip"])[1:] for path in arguments.model):
            raise UserError(f"{flag}: none of the models has PVM branches that read the image.")
        if others := [kind for kind in arguments.ablations if kind in (*IN_TWO_PARTS, "evict", "skip")]:
            raise UserError(f"{flag} cannot be combined with --ablations {others[0]}.")
    if arguments.scored_pattern is not None:
        try:
            re.compile(arguments.scored_pattern)
        except re.error as error:
            raise UserError(
                f"--scored_pattern {arguments.scored_pattern} is not a regular expression: {error}."
            ) from error
        if re.match(arguments.scored_pattern, ""):
            raise UserError(f"--scored_pattern {arguments.scored_pattern!r} matches the empty text, too.")
    check_ablations(arguments.ablations, arguments.model)
    return models


def check_vllm(arguments: EvalArguments) -> None:
    """
    Raises:
        UserError: for what vLLM cannot do, or if it is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("--backend vllm needs vLLM, in an environment of its own (docs/serving.md).")
    impossible = {"image_kv_cache": arguments.image_kv_cache if arguments.image_kv_cache != "keep" else None}
    impossible["ablations"] = next(
        (kind for kind in arguments.ablations if kind in (*IN_TWO_PARTS, *OF_BRANCHES)), None
    )
    impossible["diagnostic_rows"] = arguments.diagnostic_rows or None
    for flag, value in impossible.items():
        if value is not None:
            raise UserError(
                f"--{flag} {value}: vLLM cannot do that, because it has no access to what happens inside of a model. "
                "Leave it out, or make it a run of its own with --backend transformers."
            )
