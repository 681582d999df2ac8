"""docs/variants.md, word by word: another kind of branch is a class and a line, and everything takes it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset

from pvm.worlds.data import FEATURES, adapt_row
from pvm.worlds.digits import Digits


ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "variants.md").read_text()
SHORTER = {
    "train.py": ["--max_steps", "2", "--logging_steps", "1", "--warmup_steps", "0", "--disable_tqdm", "true"],
    "eval.py": ["--overwrite", "true", "--diagnostic_rows", "1"],
    "pvm": [],
}
# Runs the page's commands in one process, because each would import everything anew; then loads what was trained as
# a machine without the checkout does.
DRIVER = """
import json, runpy, sys
sys.path.insert(0, "")
import pvm

for command in json.loads(sys.argv[1]):
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")

from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained("runs/tanh_gate", trust_remote_code=True)
blocks = [module for name, module in model.named_modules() if name.endswith("pvm_block")]
print("loaded:", {(type(block).__name__, type(block).__module__.split(".")[0]) for block in blocks}, len(blocks))
"""


def test_the_page(tmp_path):
    for name in ("train.py", "eval.py", *(file.name for file in ROOT.glob("*_qwen3vl_pvm.py"))):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("pvm", "recipes", "assets"):
        os.symlink(ROOT / name, tmp_path / name)
    digits, rng = Digits.load("train"), np.random.default_rng(0)
    rows = Dataset.from_list([adapt_row(digits, rng) for _ in range(12)], features=FEATURES)
    (tmp_path / "data/digits").mkdir(parents=True)
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"data/digits/{split}.parquet")

    definition, entry = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(definition.splitlines()) <= 10
    room = tmp_path / "variants_qwen3vl_pvm.py"
    before, table, after = room.read_text().partition("BLOCKS = {")
    room.write_text(f"{before}{definition}\n\n{table}{after}\n{entry}")

    (lines,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    commands = []
    for line in lines.replace("\\\n", " ").strip().splitlines():
        python, *words = line.split()
        assert python == "python"
        commands.append([*words, *SHORTER[words[1] if words[0] == "-m" else words[0]]])
    assert len(commands) == 3
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "loaded: {('TanhGateBlock', 'transformers_modules')} 3" in result.stdout
    assert re.search(r"kind of branch.*tanh_gate", result.stdout), "inspect"
    config = json.loads((tmp_path / "runs/tanh_gate/config.json").read_text())
    assert config["text_config"]["pvm_block"] == "tanh_gate"
    assert "PVM with a gate between -1 and 1" in (tmp_path / "runs/tanh_gate/README.md").read_text()
    assert "tanh_gate" in (tmp_path / "runs/tanh_gate_eval/report.md").read_text()
