"""
Whether GRPO improves a model by reward alone, on the embedded default: a first stage on few answers, then GRPO on
questions whose answers only the reward knows, for PVM and LoRA; and, to refute it, with the rewards shuffled.

    python -m benchmarks.second_stage --output_dir runs/second_stage

The task: to list up to six cells of a board of handwritten digits, after some text; correct if all are. Accuracy is
greedy, on boards of unseen digits. Run it again to continue. Writes second_stage.png and prints the table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure

from benchmarks.common import print_table
from pvm.style import COLOURS
from pvm.worlds import conversations
from pvm.worlds.data import FEATURES, some_cells
from pvm.worlds.digits import Digits


ROWS = {"few": 240, "questions": 400, "test": 160}
FILLER, CELLS = (96, 160), 8
METHODS = {
    "PVM": {
        "sft": ["--method", "pvm", "--pvm_hidden_size", "64"],
        "rates": ["--learning_rate", "2e-3", "--gate_learning_rate", "1e-2"],
        "trains": "branches",
    },
    "LoRA": {
        "sft": ["--method", "lora", "--lora_rank", "23", "--lora_alpha", "46"],
        "rates": ["--learning_rate", "1e-3"],
        "trains": "lora",
    },
}
SHUFFLED = Path(__file__).with_name("shuffled_reward.py")
REWARDS = {"reward": ["accuracy_reward"], "shuffled reward": [f"{SHUFFLED}:shuffled_accuracy"]}


def write_rows(folder: Path) -> None:
    """Boards of the training digits for both stages, of unseen ones for the test."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, number) in enumerate(ROWS.items()):
        digits = Digits.load("test" if name == "test" else "train")
        rng = np.random.default_rng([18, seed])
        rows = [
            conversations.list_row(digits, int(rng.integers(*FILLER)), *some_cells(CELLS, rng), rng)
            for _ in range(number)
        ]
        Dataset.from_list(rows, features=FEATURES).to_parquet(folder / f"{name}.parquet")


def command(log: Path, *words: str | Path) -> None:
    """Run a command of this repository, its output in `log`."""
    with open(log, "a") as file:
        subprocess.run([sys.executable, *map(str, words)], stdout=file, stderr=file, check=True)


def run(args: argparse.Namespace, method: str, reward: str, seed: int) -> list[dict]:
    """
    Both stages of one method, and its accuracy after every checkpoint.

    Returns:
        `step`, `accuracy`, `reward` and `length` of each checkpoint, the first stage's first.
    """
    root, options = args.output_dir, METHODS[method]
    name = f"{method}-{seed}"
    first, second = root / f"{name}-sft", root / f"{name}-{reward.replace(' ', '-')}"
    common = ["--use_cpu", "true", "--disable_tqdm", "true", "--seed", str(seed)]
    if not (first / "config.json").is_file() and not (first / "adapter_config.json").is_file():
        words = ["train.py", "--model_name_or_path", args.base, "--dataset_name", root / "few.parquet"]
        words += ["--per_device_train_batch_size", "12", "--max_steps", args.sft_steps, "--output_dir", first]
        command(root / "log.txt", *words, *options["sft"], *options["rates"], *common, "--save_strategy", "no")
    if not (second / "training.json").is_file():
        resume = ["--resume_from_checkpoint", "last"] if list(second.glob("checkpoint-*")) else []
        words = ["grpo.py", "--model_name_or_path", first, "--dataset_name", root / "questions.parquet"]
        words += ["--trains", options["trains"], "--output_dir", second, "--max_steps", args.steps]
        words += ["--per_device_train_batch_size", "32", "--max_completion_length", "20", "--learning_rate", "1e-3"]
        words += ["--reward_functions", *REWARDS[reward], "--reward_weights", "1", "--logging_steps", "1"]
        command(root / "log.txt", *words, "--save_steps", args.every, *common, *resume)
    steps = range(args.every, args.steps + 1, args.every)
    models = [first, *(second / f"checkpoint-{step}" for step in steps)]
    report = root / f"{second.name}-eval" / "report.json"
    if not report.is_file():
        words = ["eval.py", "--model", *models, "--names", *map(str, [0, *steps]), "--output_dir", report.parent]
        words += ["--dataset_name", root / "test.parquet", "--dataset_split", "train", "--batch_size", "32"]
        command(root / "log.txt", *words, "--diagnostic_rows", "0")
    overall = json.loads(report.read_text())["overall"]
    log = json.loads((second / f"checkpoint-{args.steps}" / "trainer_state.json").read_text())["log_history"]
    curve = []
    for step in (0, *steps):
        window = [entry for entry in log if step - args.every < entry["step"] <= step] or log[:1]
        curve.append(
            {
                "step": step,
                "accuracy": overall[str(step)]["accuracy"],
                "reward": np.mean([entry["reward"] for entry in window]),
                "length": np.mean([entry["completions/mean_length"] for entry in window]),
            }
        )
    return curve


def draw(curves: dict[tuple[str, str], list[list[dict]]], path: Path) -> None:
    """Reward, length and accuracy by step: the mean of the seeds, and each of them."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = {"reward": "reward of samples", "length": "tokens of samples", "accuracy": "accuracy, unseen digits"}
    for (method, reward), runs in curves.items():
        style = {"color": COLOURS[list(METHODS).index(method)], "linestyle": "-" if reward == "reward" else ":"}
        for axis, (key, title) in zip(axes, titles.items()):
            values = np.array([[point[key] for point in curve] for curve in runs])
            steps = [point["step"] for point in runs[0]]
            axis.plot(steps, values.T, alpha=0.25, **style)
            axis.plot(steps, values.mean(axis=0), label=f"{method}, {reward}", linewidth=2, **style)
            axis.set(title=title, xlabel="GRPO step")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=len(curves))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--base", default="assets/digits-backbone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sft_steps", type=int, default=20)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    args = parser.parse_args()
    if not (args.output_dir / "test.parquet").is_file():
        write_rows(args.output_dir)
    kinds = [("PVM", "reward"), ("LoRA", "reward"), ("PVM", "shuffled reward")]
    curves = {kind: [] for kind in kinds}
    for seed in args.seeds:
        for kind in kinds:
            curves[kind].append(run(args, *kind, seed))
            print(f"seed {seed}, {', '.join(kind)}: {[round(point['accuracy'], 3) for point in curves[kind][-1]]}")
    rows = []
    for (method, reward), runs in curves.items():
        before, after = ([curve[end]["accuracy"] for curve in runs] for end in (0, -1))
        texts = (f"{np.mean(end):.1%} ({', '.join(f'{value:.1%}' for value in end)})" for end in (before, after))
        rows.append([f"{method}, {reward}", *texts])
    print_table("Accuracy on unseen digits", ["", "first stage", f"after {args.steps} GRPO steps"], rows)
    draw(curves, args.output_dir / "second_stage.png")


if __name__ == "__main__":
    main()
