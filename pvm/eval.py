"""
Evaluate one or several checkpoints on the same questions: accuracy, what answers depend on, what happens inside.

The embedded default, after `pvm train` has made the two checkpoints (no GPU, no network):

    pvm eval --config recipes/digits_eval.yaml

Your own conversations (a file, a folder or a Hub name; docs/data.md shows the forms of rows):

    pvm eval --model Qwen/Qwen3-VL-8B-Instruct runs/qwen3-vl-8b-pvm --names base PVM \\
        --dataset_name my_data --dataset_split test --output_dir runs/my_eval \\
        --ablations branch_off another_memory hidden_image blind

A checkpoint is a stock Qwen3-VL, a PVM model (of this project or the authors') or a PEFT adapter. The last assistant
turn of a row is the reference answer. Results: report.html (self-contained), report.md with its pictures, report.json,
and predictions/ (every answer). The same command resumes an interrupted evaluation.

Public benchmarks, through lmms-eval (docs/benchmarks.md):

    pvm eval --model Qwen/Qwen3-VL-8B-Instruct runs/qwen3-vl-8b-pvm --names base PVM \\
        --tasks mmstar,mathvision_testmini --temperature 0.7 --runs 3 --output_dir runs/my_benchmarks
"""

from pathlib import Path

from pvm.arguments import parse_arguments, refuse_flags
from pvm.errors import UserError
from pvm.evaluation.arguments import WITH_TASKS, EvalArguments, check_arguments
from pvm.evaluation.conclusions import conclusions
from pvm.evaluation.report import checkpoint_lines, remarks, rich_tables
from pvm.evaluation.run import evaluate
from pvm.files import locked
from pvm.lmms.run import BenchmarkArguments, run_benchmarks
from pvm.terminal import Terminal


def main(arguments: list[str] | None = None) -> None:
    args, benchmarks = parse_arguments((EvalArguments, BenchmarkArguments), __doc__, arguments, "pvm eval")
    models = check_arguments(args)
    if benchmarks.tasks:
        refuse_flags(args, WITH_TASKS, "is about a data set, and does nothing with --tasks")
        names = ("backend", "dtype", "max_samples", "max_new_tokens", "overwrite")
        shared = {name: vars(args)[name] for name in names}
        shared["batch_size"] = args.batch_size or (256 if args.backend == "vllm" else 1)
        paths = {model.label: model.path for model in models}
        with locked(Path(args.output_dir)):
            run_benchmarks(paths, benchmarks, Path(args.output_dir), **shared)
        return
    refuse_flags(benchmarks, (), "does nothing without --tasks")
    if args.dataset_name is None:
        raise UserError("There is nothing to evaluate on: give --dataset_name or --tasks.")
    with locked(Path(args.output_dir)):
        report = evaluate(args, models)

    console = Terminal()
    for line in [*checkpoint_lines(report), *remarks(report)]:
        console.print(line)
    for table in rich_tables(report):
        console.print(table)
    console.print()
    for sentence in conclusions(report):
        console.print(f"- {sentence}")
    console.print(f"\nWritten: {args.output_dir}/report.html (self-contained), report.md, report.json, predictions/")
