"""
`eval.py --tasks`: public benchmarks through lmms-eval, for several checkpoints.

lmms-eval provides the tasks: data, prompts and scoring. A run is one model's answers to one task with one seed;
finished runs are kept in the output folder and not repeated.
"""

import difflib
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvm.checkpoints.names import checkpoint_state, public_name
from pvm.errors import REFUSALS, UserError
from pvm.evaluation.report import checkpoint_lines
from pvm.evaluation.run import versions
from pvm.files import write_atomically
from pvm.lmms.report import compare, markdown_report, results_table, runs_table
from pvm.terminal import Terminal


if TYPE_CHECKING:  # an extra, and slow to import
    from lmms_eval.api.task import Task

    from pvm.lmms.model import Qwen3VLPVM


INSTALL = "pip install -r requirements-lmms.txt"

# The paper's eight benchmarks, and for each the same or the closest task of lmms-eval 0.7.3.
PAPER = {
    "MMMU dev": "mmmu_val",
    "MMBench-CN lite": "mmbench_cn_dev_lite",
    "MMBench-EN lite": "mmbench_en_dev_lite",
    "MMStar": "mmstar",
    "MMT emotion": "mmt_val",
    "MathVerse vision-only": "mathverse_testmini_vision_only",
    "MathVision mini": "mathvision_testmini",
    "AI2D lite": "ai2d_lite",
}
STAND_INS = {
    "mmmu_val": "MMMU's validation set instead of its dev set, which lmms-eval lacks",
    "mmt_val": "all of MMT-Bench's validation set instead of its emotion questions, for which lmms-eval has no task",
}
# Tasks whose answers lmms-eval has judged by an OpenAI model: all of MathVerse's, and those of MMBench that it cannot
# parse. Without a key it silently counts them as wrong (MathVerse) or guesses at random (MMBench).
JUDGED = ("mmbench_cn_dev_lite", "mmbench_en_dev_lite", "mathverse_testmini_vision_only")

PACKAGES = ("torch", "transformers", "peft", "datasets", "lmms-eval", "qwen-vl-utils")  # the numbers depend on them
PROMPTS = "qwen3_vl"  # some tasks have prompts by model: all models get those of the stock one
TOP_P, TOP_K = 0.8, 20  # from the generation config of Qwen3-VL's instruct checkpoints
# How differences between runs are called that are too long to print.
STATES = {"model_state": "another state of this checkpoint", "task_files": "other files in --task_path"}
# What lmms-eval's command line removes from answers before scoring.
REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'


@dataclass
class BenchmarkArguments:
    """Benchmarks through lmms-eval, instead of a data set."""

    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Benchmarks by their names in lmms-eval (an extra, see docs/benchmarks.md): `--tasks "
            "mmstar,mathvision_testmini`. `paper`: the paper's eight. Instead of --dataset_name."
        },
    )
    task_path: str | None = field(default=None, metadata={"help": "Folder with YAML files of your own tasks."})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy. The paper samples at 0.7."})
    top_p: float | None = field(default=None, metadata={"help": f"For sampling; {TOP_P} by default."})
    top_k: int | None = field(default=None, metadata={"help": f"For sampling; {TOP_K} by default."})
    runs: int = field(default=1, metadata={"help": "How often each task is answered, with successive seeds."})
    seed: int = field(default=0, metadata={"help": "Seed of the first run."})


@dataclass
class Settings:
    """What all runs of a report have in common."""

    dtype: str
    batch_size: int
    max_samples: int | None
    max_new_tokens: int | None
    temperature: float
    top_p: float | None
    top_k: int | None

    @property
    def generation(self) -> str:
        """In lmms-eval's format. Overrides the tasks: MathVerse's `top_p: 0` would make sampling greedy."""
        values = {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens}
        if self.temperature > 0:
            values |= {"do_sample": True, "top_p": self.top_p, "top_k": self.top_k}
        else:
            values["do_sample"] = False
        return ",".join(f"{key}={value}" for key, value in values.items() if value is not None)


def task_names(flags: BenchmarkArguments) -> list[str]:
    """The names in --tasks, which commas or spaces separate, without duplicates; `paper` is expanded."""
    words = [word for argument in flags.tasks for word in argument.split(",") if word]
    names = [name for word in words for name in (PAPER.values() if word == "paper" else [word])]
    return list(dict.fromkeys(names))


def check(flags: BenchmarkArguments) -> None:
    """
    Refuse wrong flags before anything is imported or loaded.

    Raises:
        UserError: for anything that is wrong.
    """
    for package in ("lmms_eval", "decord"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--tasks needs {package.replace('_', '-')}, which is not installed: {INSTALL}")
    if flags.temperature < 0:
        raise UserError(f"--temperature {flags.temperature}: must be 0 (greedy) or more.")
    if flags.runs < 1:
        raise UserError(f"--runs {flags.runs}: must be at least 1.")
    if flags.seed < 0:
        raise UserError(f"--seed {flags.seed}: must be at least 0.")
    if flags.temperature == 0:
        if flags.runs > 1:
            raise UserError(f"--runs {flags.runs} gives the same answers each time at --temperature 0. Leave it out.")
        for name in ("top_p", "top_k"):
            if vars(flags)[name] is not None:
                raise UserError(f"--{name} does nothing at --temperature 0, where nothing is sampled. Leave it out.")
    if flags.top_p is not None and not 0 < flags.top_p <= 1:
        raise UserError(f"--top_p {flags.top_p}: must be above 0 and at most 1.")
    if flags.top_k is not None and flags.top_k < 1:
        raise UserError(f"--top_k {flags.top_k}: must be at least 1.")
    if flags.task_path is not None and not list(Path(flags.task_path).glob("**/*.yaml")):
        raise UserError(f"--task_path {flags.task_path}: this is not a folder with .yaml files.")
    key = "AZURE_API_KEY" if os.environ.get("API_TYPE") == "azure" else "OPENAI_API_KEY"
    judged = [name for name in task_names(flags) if name in JUDGED]
    if judged and not os.environ.get(key):
        raise UserError(
            f"{', '.join(judged)}: lmms-eval has these answers judged by an OpenAI model; without a key it would "
            f"count them as wrong or guess. Set {key} (see docs/benchmarks.md), or leave these tasks out."
        )


def load_tasks(flags: BenchmarkArguments) -> dict[str, "Task"]:
    """
    The tasks with their data, by name. A group is expanded to its tasks.

    Raises:
        UserError: if a task does not exist or its data could not be loaded.
    """
    import lmms_eval.models  # noqa: F401  (before the tasks: it limits the library's logger to warnings)
    from lmms_eval.evaluator_utils import get_task_list
    from lmms_eval.tasks import TaskManager, get_task_dict
    from tenacity import RetryError

    names, managers = task_names(flags), {}
    if flags.task_path is not None:
        # In one index, lmms-eval's own tasks would win over those of the folder with the same name.
        local = TaskManager("WARNING", include_path=flags.task_path, include_defaults=False, model_name=PROMPTS)
        managers = {name: local for name in names if name in local.all_subtasks}
    if len(managers) < len(names):
        everything = TaskManager("WARNING", include_path=flags.task_path, model_name=PROMPTS)
        managers = {name: managers.get(name, everything) for name in names}
        for name in names:
            if name not in managers[name].all_tasks:
                close = difflib.get_close_matches(name, everything.all_tasks, n=4)
                hint = f"Did you mean {' or '.join(close)}?" if close else "`lmms-eval tasks list` lists all."
                raise UserError(f"--tasks {name}: lmms-eval {version('lmms-eval')} has no such task. {hint}")
    tasks = {}
    for name, manager in managers.items():
        try:
            found = get_task_list(get_task_dict([name], manager, "chat"))
        except RetryError as error:  # lmms-eval tries several times to load data
            reason = error.last_attempt.exception()
            raise UserError(
                f"--tasks {name}: its data could not be loaded: {' '.join(str(reason).split())}"
            ) from reason
        except (OSError, AttributeError, LookupError, *REFUSALS) as error:
            raise UserError(f"--tasks {name}: it could not be loaded: {' '.join(str(error).split())}") from error
        tasks |= {output.task_name: output.task for output in found if output.task is not None}
    for name, task in tasks.items():
        check_task(name, task)
    return tasks


def check_task(name: str, task: "Task") -> None:
    """
    Raises:
        UserError: if a task does not generate text or fails to score it, before hours are spent on answers.
    """
    from tenacity import RetryError

    if task.config.output_type != "generate_until":
        raise UserError(f"--tasks {name}: its type is {task.config.output_type}; only generated text is supported.")
    if name in JUDGED:
        return  # scoring costs money
    try:
        task.process_results(task.eval_docs[0], ["A"])
    except RetryError as error:  # lmms-eval tries five times to score
        reason = error.last_attempt.exception()
        raise UserError(
            f"--tasks {name}: it cannot score answers here ({type(reason).__name__}: {reason}). Some tasks need "
            f"specific versions of packages: {INSTALL}, in an environment without requirements-dev.txt."
        ) from reason


def task_fingerprint(folder: str | None) -> str | None:
    """SHA-256 of the YAML and Python files of a folder of tasks; `None` without one."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*")):
        if file.suffix in (".yaml", ".py"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def kept_run(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """
    A run that an earlier command finished; `None` if there is none.

    Raises:
        UserError: if it was made with another `key`.
    """
    if not file.exists():
        return None
    run = json.loads(file.read_text(encoding="utf-8"))
    for name, value in key.items():
        if run["key"][name] != value:
            difference = STATES.get(name, f"{name} {run['key'][name]}, and not {value}")
            raise UserError(
                f"{file} was made with {difference}. To avoid mixing results, choose another --output_dir, or give "
                "--overwrite true to repeat all runs."
            )
    return run


def evaluate(model: "Qwen3VLPVM", task: "Task", settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """
    One run.

    Returns:
        `dict`: `metrics` (`{"name,filter": number}`), `questions` (one `dict` each, with the answer and the values of
        the metrics), and the task's `task_version`.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    # The options of lmms-eval's command line that tasks use: they write submission files to output_path.
    options = Namespace(
        output_path=str(folder), process_with_media=True, reasoning_tags=REASONING_TAGS, agentic_trace_mode="basic"
    )
    results = simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=TaskManager("WARNING", include_defaults=False),  # the task is given: none is looked up
        batch_size=settings.batch_size,
        limit=settings.max_samples,
        gen_kwargs=f"{settings.generation},seed={seed}",  # vLLM takes no other
        bootstrap_iters=0,  # intervals are computed here, for all models and runs together
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        cli_args=options,
        process_docs_parallel=1,  # some tasks guess at random if an answer chooses nothing: keep the order
    )
    name = task.config.task
    metrics = {
        metric: float(value)
        for metric, value in results["results"][name].items()
        if isinstance(value, (int, float)) and "," in metric and "_stderr" not in metric
    }
    if not metrics:
        raise UserError(f"--tasks {name}: none of its metrics is a number, so there is nothing to compare.")
    return {"metrics": metrics, "questions": results["samples"][name], "task_version": results["versions"][name]}


def write_json(file: Path, content: Any) -> None:
    """With lmms-eval's conversion of types that JSON does not have."""
    from lmms_eval.utils import handle_non_serializable

    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False, default=handle_non_serializable)
    write_atomically(file, text + "\n")


def run_all(
    models: dict[str, str],
    tasks: dict[str, "Task"],
    settings: Settings,
    flags: BenchmarkArguments,
    output_dir: Path,
    backend: str,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """
    All runs of all tasks by all models. Finished ones are read, the others made.

    Returns:
        `dict`: by task and model, the runs in the order of their seeds.
    """
    if backend == "vllm":
        from pvm.lmms.vllm import Qwen3VLPVMInVLLM as model_class
    else:
        from pvm.lmms.model import Qwen3VLPVM as model_class

    common = {
        **asdict(settings),
        "versions": versions(backend, PACKAGES),
        "task_files": task_fingerprint(flags.task_path),
    }
    seeds = range(flags.seed, flags.seed + flags.runs)
    states = {name: checkpoint_state(path) for name, path in models.items()}
    files, keys = {}, {}
    for name, path in models.items():
        for task in tasks:
            for seed in seeds:
                files[name, task, seed] = output_dir / "lmms_runs" / name / task / f"seed_{seed}.json"
                keys[name, task, seed] = {
                    "model": path,
                    "model_state": states[name],
                    "task": task,
                    "seed": seed,
                    **common,
                }
    kept = {which: kept_run(files[which], key) for which, key in keys.items()}  # all are checked before any is made

    runs: dict[str, dict[str, list[dict[str, Any]]]] = {task: {name: [] for name in models} for task in tasks}
    for name, path in models.items():
        model = None
        with ExitStack() as stack:
            for task, seed in itertools.product(tasks, seeds):
                which = (name, task, seed)
                run = kept[which]
                if run is None:
                    if model is None:
                        model = model_class(path, settings.dtype, settings.batch_size)
                        stack.callback(model.close)
                    Terminal().print(f"{name}: {task}, seed {seed}")
                    made = evaluate(model, tasks[task], settings, seed, files[which].with_suffix(""))
                    description = model.checkpoint.description
                    base = description.base and public_name(description.base)["name"]  # reports are shown to others
                    description = {**asdict(description), "base": base, "gates_on": description.gates_on}
                    run = {"key": keys[which], "model": description, **made}
                    write_json(files[which], run)
                    run = json.loads(files[which].read_text(encoding="utf-8"))  # as when it is read later
                runs[task][name].append(run)
    return runs


def make_report(
    runs: dict[str, dict[str, list[dict[str, Any]]]],
    tasks: dict[str, "Task"],
    settings: Settings,
    flags: BenchmarkArguments,
    backend: str,
) -> dict[str, Any]:
    """The content of lmms.json, from which the tables are made."""
    models = {name: model_runs[0]["model"] for name, model_runs in next(iter(runs.values())).items()}
    results = {}
    for task, by_model in runs.items():
        first = next(iter(by_model.values()))[0]
        results[task] = {
            "version": first["task_version"],
            "metrics": {metric: compare(tasks[task], metric, by_model) for metric in first["metrics"]},
        }
    return {
        "settings": asdict(settings),
        "generation": settings.generation,
        "seeds": [flags.seed + k for k in range(flags.runs)],
        "versions": versions(backend, PACKAGES),
        "models": [
            {**description, "name": name, "label": name, "ablation": "none"} for name, description in models.items()
        ],
        "prompts": PROMPTS,
        "paper": {paper: task for paper, task in PAPER.items() if task in results},
        "stand_ins": [text for task, text in STAND_INS.items() if task in results],
        "tasks": results,
    }


def run_benchmarks(
    models: dict[str, str],
    flags: BenchmarkArguments,
    output_dir: Path,
    *,
    backend: str = "transformers",
    dtype: str = "auto",
    batch_size: int = 1,
    max_samples: int | None = None,
    max_new_tokens: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """
    Make the missing runs, and write lmms.json and lmms.md into `output_dir`.

    Args:
        models (`dict[str, str]`): folder or Hub name of each checkpoint by its name in the report.
        backend (`str`): what answers, "transformers" or "vllm".
        max_samples (`int`, *optional*): the number of questions of each task, from the first; all by default.
        max_new_tokens (`int`, *optional*): instead of the task's own.
        overwrite (`bool`): repeat finished runs.

    Returns:
        `dict`: the content of lmms.json.

    Raises:
        UserError: for contradicting flags, unknown tasks or models, and runs with other arguments in `output_dir`.
    """
    check(flags)
    sampled = flags.temperature > 0
    settings = Settings(
        dtype=dtype,
        batch_size=batch_size,
        max_samples=max_samples,
        max_new_tokens=max_new_tokens,
        temperature=flags.temperature,
        top_p=(flags.top_p or TOP_P) if sampled else None,
        top_k=(flags.top_k or TOP_K) if sampled else None,
    )
    tasks = load_tasks(flags)
    if overwrite:
        shutil.rmtree(output_dir / "lmms_runs", ignore_errors=True)
    runs = run_all(models, tasks, settings, flags, output_dir, backend)
    report = make_report(runs, tasks, settings, flags, backend)
    write_json(output_dir / "lmms.json", report)
    (output_dir / "lmms.md").write_text(markdown_report(report), encoding="utf-8")

    console = Terminal()
    for line in checkpoint_lines(report):
        console.print(line)
    for table in filter(None, (results_table(report), runs_table(report))):
        console.print(table.rich())
    console.print(f"\nWritten: {output_dir}/lmms.md, lmms.json, lmms_runs/")
    return report
