"""The paper's data sets from a Hub: from a server of this machine that speaks its API, with the unmodified client."""

import json
import subprocess
import sys
from pathlib import Path

import published
from hub_server import serve


ROOT = Path(__file__).parents[1]
SETS = {
    "org/sft": published.openmmreasoner_sft,
    "org/rl": published.openmmreasoner_rl,
    "org/virl": published.virl39k,
    "org/mmk": published.mmk12,
    "org/thinklite": published.thinklite,
    "org/wemath": published.wemath_pro,
}
LOAD = """
import json, sys
import pvm
import train
from pvm.data.sources import DataArguments, load_conversations
from pvm.data.streams import load_streams
from pvm.errors import UserError

folder = sys.argv[1]

def problem(*args):
    try:
        load_conversations(*args)
    except UserError as error:
        return str(error)

found = {}
for name, config, split in (
    ("org/sft", "llava_cot", "train"), ("org/rl", "virl39k", "train"), ("org/rl", "validation", "val"),
    ("org/virl", None, "train"), ("org/mmk", None, "test"), ("org/thinklite", None, "train[:3]"),
    ("org/wemath", None, "pro"),
):
    rows = load_conversations(name, split, config, folder)
    (stream,) = load_streams(DataArguments(
        [name], dataset_config=config and [config], dataset_split=[split.partition("[")[0]], image_root=[folder],
        streaming=True,
    ))
    found[f"{name} {config}"] = [len(rows), sum(record["problem"] is None for record in stream)]
print(json.dumps([
    found,
    problem("org/sft", "train"),
    problem("org/wemath", "train"),
    problem("org/none", "train"),
]))
train.main([
    "--model_name_or_path", "assets/digits-backbone", "--pvm_hidden_size", "32", "--use_cpu", "true", "--max_steps",
    "1", "--output_dir", f"{folder}/run", "--disable_tqdm", "true", "--dataset_name", "org/virl", "--image_root",
    f"{folder}/org/virl/images.zip",
])
"""


def test_published_sets_are_loaded_from_a_hub(tmp_path):
    """ViRL39K, too, whose zip file beside the rows `datasets` would read as Parquet."""
    with serve() as hub:
        for name, build in SETS.items():
            hub.add(name, build(tmp_path / name))
        process = subprocess.run(
            [sys.executable, "-c", LOAD, tmp_path], env=hub.environment(tmp_path / "home"), cwd=ROOT,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found, no_config, no_split, no_set = json.loads(process.stdout.splitlines()[0])
    assert found == {
        "org/sft llava_cot": [6, 6],
        "org/rl virl39k": [6, 6],
        "org/rl validation": [6, 6],
        "org/virl None": [6, 6],
        "org/mmk None": [4, 4],
        "org/thinklite None": [3, 4],
        "org/wemath None": [20, 12],
    }
    assert "Config name is missing" in no_config and "llava_cot" in no_config
    assert "Cannot load split `train` of the data set `org/wemath`" in no_split and "pro" in no_split
    assert "Cannot load split `train` of the data set `org/none`" in no_set
    assert not any("images.zip" in request for request in hub.requests if request.startswith("GET"))
    assert (tmp_path / "run" / "model.pvm.safetensors").exists()
