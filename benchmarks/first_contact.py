"""
A newcomer's whole way at the size of a released model, in one command: everything but real weights.

    python -m benchmarks.first_contact --shape tiny
    python -m benchmarks.first_contact --shape 8B --dtype bfloat16 --attn_implementation flash_attention_2

Makes a checkpoint of the released shape with random weights and Qwen's own processor, and a Hub on this machine that
has it under its name. Then, each in a process of its own: checks the data, trains branches for two steps and pushes
them, loads them by name in three lines and generates with them, without them and without the image in the cache,
evaluates, inspects, converts. Prints time, peak memory and new files of each step, and every line that may alarm. The
complete output is in OUTPUT_DIR/logs. Needs requirements-dev.txt; 3 times the size of the checkpoint on the disk.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks.common import print_table
from tests.hub_server import File, HubServer, serve
from tests.qwen3vl_real import SIZES, save, save_configs


ROOT = Path(__file__).parents[1]
PUSHED = "newcomer/first-contact"
ALARMING = re.compile(
    r"warn|error|report|unexpected|missing|deprecated|traceback|you need to|you should", re.IGNORECASE
)
# As in the README, in a process that cannot import this repository.
GENERATE = """
import runpy, sys, time
runpy.run_path({fallback!r})["import_torchvision"]()
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained({name!r}, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained({name!r}, trust_remote_code=True, {options})

content = [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(text=[prompt], images=[Image.open({image!r})], return_tensors="pt").to(model.device)
for options in ({{}}, {{"use_pvm": False}}, {{"image_kv_cache": "evict"}}, {{"image_kv_cache": "skip"}}):
    start = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    print(f"{{time.perf_counter() - start:.1f}} s, {{len(new)}} tokens", options, repr(processor.decode(new)))
assert not any(name.split(".")[0] in ("pvm", "modeling_qwen3vl_pvm") for name in sys.modules), "this repository"
"""


def make_base(folder: Path, shape: str, device: str) -> None:
    """Random weights, in shards of bfloat16 as published, beside all else that Qwen publishes."""
    save(folder, shape)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_pretrained(folder)).bfloat16()
    # One pass over the weights, where a constructor makes two.
    model.to_empty(device=device).tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.02)
            else:
                weight.fill_(float(name.endswith("weight")))  # norms are 1, biases 0
    model.save_pretrained(folder, max_shard_size="5GB")
    save_configs(folder, shape)  # as published, not as this version of transformers writes them


def write_data(folder: Path) -> Path:
    """Four conversations about two photographs."""
    folder.mkdir(parents=True)
    photographs = load_sample_images()
    for name, photograph in zip(("china", "flower"), photographs.images):
        Image.fromarray(photograph).save(folder / f"{name}.jpg")
    answers = {"china": ("A temple.", "Red and blue."), "flower": ("A flower.", "Pink.")}
    with open(folder / "conversations.jsonl", "w") as file:
        for name, texts in answers.items():
            for question, answer in zip(("What is this?", "Which colours do you see?"), texts):
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"images": [f"{name}.jpg"], "messages": messages}) + "\n")
    return folder / "conversations.jsonl"


def publish(hub: HubServer, name: str, folder: Path, home: Path) -> None:
    """Put a checkpoint on the Hub, and its files into the cache of the client, as if they were downloaded."""
    hub.branches[name] = {}
    # Weights are never downloaded, because the client has them.
    files = {
        file.name: File(b"", True) if file.suffix == ".safetensors" else File(file.read_bytes(), False)
        for file in folder.iterdir()
    }
    commit = hub.advance(name, "main", files, "Qwen's files, with random weights")
    cache = home / "hub" / f"models--{name.replace('/', '--')}"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit.sha)
    folder.rename(cache / "snapshots" / commit.sha)


class PeakOfGPU(threading.Thread):
    """Watches how much more of the GPU is in use than at the start, by all processes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.stopped, self.peak = threading.Event(), 0

    def run(self) -> None:
        at_start, _ = torch.cuda.mem_get_info()
        while not self.stopped.wait(0.1):
            self.peak = max(self.peak, at_start - torch.cuda.mem_get_info()[0])


def files_below(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()}


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"


class Journey:
    """Runs commands and keeps what each took."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True)
        self.rows: list[list[str]] = []

    def step(self, name: str, command: Sequence[str], cwd: Path = ROOT) -> str:
        """Run a command, exit if it fails, print what may alarm. Returns what it printed."""
        log = self.logs / f"{len(self.rows):02} {name}.txt"
        print(f"\n{name}: {shlex.join(map(str, command))}", flush=True)
        before, start = files_below(self.folder), time.perf_counter()
        watch = PeakOfGPU() if torch.cuda.is_available() else None
        if watch:
            watch.start()
        with open(log, "w") as file:
            process = subprocess.Popen(
                list(map(str, command)), cwd=cwd, env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if watch:
            watch.stopped.set()
        text = log.read_text(errors="replace").replace("\r", "\n")
        for line in dict.fromkeys(line.strip() for line in text.splitlines() if ALARMING.search(line)):
            print(f"  may alarm: {line[:300]}")
        if code := os.waitstatus_to_exitcode(status):
            sys.exit(f"{name} failed with status {code}:\n{text[-3000:]}")
        new = {file: size for file, size in files_below(self.folder).items() if before.get(file) != size}
        largest = max(new, key=new.get, default=None)
        gpu = gib(watch.peak) if watch else ""
        # The kernel counts kilobytes, and files that are mapped, such as a checkpoint's weights.
        memory = gib(usage.ru_maxrss * 1024)
        file = "" if largest is None else f"{largest.name[:24]} {megabytes(new[largest])}"
        self.rows.append([name, f"{seconds:.0f}", memory, gpu, megabytes(sum(new.values())), file])
        print(f"  {seconds:.0f} s, {memory} GiB" + (f", {gpu} GiB of the GPU" if watch else ""), flush=True)
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("tiny", *SIZES), default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    parser.add_argument("--attn_implementation", default="sdpa", help="sdpa, eager or flash_attention_2")
    parser.add_argument("--output_dir", type=Path, help="new; default runs/first_contact_SHAPE")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints, too, and not only the logs")
    args = parser.parse_args()
    folder = (args.output_dir or ROOT / "runs" / f"first_contact_{args.shape}").absolute()
    if folder.exists():
        parser.error(f"{folder} exists: remove it, or choose another --output_dir")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = f"Qwen/Qwen3-VL-{args.shape}-Instruct"
    home, trained, whole = folder / "hf_home", folder / "pvm", folder / "whole"
    python, attention = sys.executable, ("--attn_implementation", args.attn_implementation)
    start = time.perf_counter()
    with serve() as hub:
        environment = hub.environment(home)
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "OMP_NUM_THREADS"):  # which it sets for tests
            del environment[name]
            environment |= {name: os.environ[name]} if name in os.environ else {}
        journey = Journey(folder, environment)
        data = write_data(folder / "data")
        making = f"make_base(Path({str(folder / 'base')!r}), {args.shape!r}, {device!r})"
        journey.step("make a base", [python, "-c", f"from benchmarks.first_contact import Path, make_base; {making}"])
        publish(hub, base, folder / "base", home)

        train = [
            *(python, "train.py", "--model_name_or_path", base, "--dataset_name", data, "--output_dir", trained),
            *("--max_steps", "2", "--per_device_train_batch_size", "1", "--logging_steps", "1"),
            *("--dtype", args.dtype, *attention, "--push_to_hub", "true", "--hub_model_id", PUSHED),
            *(("--bf16", "true") if device == "cuda" else ()),
        ]
        journey.step("dry run", [*train, "--dry_run", "true"])
        journey.step("train and push", train)
        options = f"dtype={args.dtype!r}, attn_implementation={args.attn_implementation!r}"
        code = GENERATE.format(
            fallback=str(ROOT / "pvm" / "torchvision_fallback.py"),
            image=str(folder / "data" / "china.jpg"),
            name=PUSHED,
            options=options + (", device_map='auto'" if device == "cuda" else ""),
        )
        (folder / "generate.py").write_text(code)
        printed = journey.step("load and generate", [python, "generate.py"], cwd=folder)
        print("  " + "\n  ".join(line for line in printed.splitlines() if " tokens " in line))
        journey.step(
            "evaluate",
            [
                *(python, "eval.py", "--model", base, trained, "--names", "base", "PVM", "--dataset_name", data),
                *("--dataset_split", "train", "--output_dir", folder / "eval", "--dtype", args.dtype),
                *("--max_new_tokens", "8", "--ablations", "branch_off", "--diagnostic_rows", "1"),
            ],
        )
        journey.step("inspect", [python, "-m", "pvm", "inspect", PUSHED])
        journey.step("convert", [python, "-m", "pvm", "convert", trained, whole, "--to", "whole"])
    print(f"\n{device}, {args.dtype}, {args.attn_implementation}; {time.perf_counter() - start:.0f} s in all\n")
    headings = ["step", "seconds", "memory, GiB", "GPU, GiB", "new files, MB", "the largest"]
    print_table(f"First contact, {args.shape}", headings, journey.rows)
    if not args.keep:
        for checkpoint in (home, whole):
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
