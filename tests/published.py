"""
The paper's data sets, as their publishers lay them out: the same files, columns and types, with rows of this project's
making. Pictures are 32 x 32, 16 tokens of the digits backbone.
"""

import io
import zipfile
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture


TEXT = Value("string")
SYSTEM = "Think in <think></think>, then answer in <answer></answer>."


def png(index: int) -> bytes:
    content = io.BytesIO()
    Picture.new("RGB", (32, 32), (40 * index, 100, 50)).save(content, "PNG")
    return content.getvalue()


def parquet(file: Path, rows: list[dict], features: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(features)).to_parquet(file)
    return file


def with_configs(folder: Path, **splits: str) -> Path:
    """Name the configs in the card, each with its only split."""
    files = (
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}/*.parquet\n"
        for name, split in splits.items()
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(files)}---\n")
    return folder


def openmmreasoner_sft(folder: Path) -> Path:
    """OpenMMReasoner/OpenMMReasoner-SFT-874K: a folder for each config, images in another; one has none."""
    part = {"type": TEXT, "text": TEXT, "image_url": {"url": TEXT}}
    features = {"id": TEXT, "messages": List({"role": TEXT, "content": List(part)})}

    def text(value: str) -> dict:
        return {"type": "text", "text": value, "image_url": None}

    def row(id: str, path: str | None, answer: str) -> dict:
        image = [] if path is None else [{"type": "image_url", "text": None, "image_url": {"url": path}}]
        return {
            "id": id,
            "messages": [
                {"role": "system", "content": [text(SYSTEM)]},
                {"role": "user", "content": [*image, text("Which?")]},
                {"role": "assistant", "content": [text(f"<think>Hm.</think><answer>{answer}</answer>")]},
            ],
        }

    for index in range(3):
        image = folder / "sft_image" / "llava_cot" / f"{index}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(png(index))
    rows = [row(str(index // 2), f"llava_cot/{index // 2}.png", str(index)) for index in range(6)]  # two of each id
    parquet(folder / "llava_cot" / "train-00000-of-00001.parquet", rows, features)
    rows = [row(str(index), None, str(index)) for index in range(3)]
    parquet(folder / "m1_sft" / "train-00000-of-00001.parquet", rows, features)
    return with_configs(folder, llava_cot="train", m1_sft="train")


def openmmreasoner_rl(folder: Path) -> Path:
    """OpenMMReasoner/OpenMMReasoner-RL-74K: `validation` has no `avg_reward`."""
    features = {
        "prompt": List({"role": TEXT, "content": TEXT}),
        "images": List(Image()),
        "reward_model": {"ground_truth": TEXT, "style": TEXT},
        "avg_reward": Value("float64"),
    }
    rows = [
        {
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": "<image>" * (index % 3) + "How many?"},
            ],
            "images": [{"bytes": png(index), "path": None}] * (index % 3),
            "reward_model": {"ground_truth": str(index), "style": "rule"},
            "avg_reward": 0.5,
        }
        for index in range(6)
    ]
    parquet(folder / "virl39k" / "train-00000-of-00001.parquet", rows, features)
    del features["avg_reward"]
    rows = [{key: row[key] for key in features} for row in rows]
    parquet(folder / "validation" / "val-00000-of-00001.parquet", rows, features)
    return with_configs(folder, virl39k="train", validation="val")


def virl39k(folder: Path) -> Path:
    """TIGER-Lab/ViRL39K: the rows, and their images in a zip file beside."""
    features = {
        **dict.fromkeys(("answer", "category", "qid", "question", "source"), TEXT),
        "PassRate_32BTrained": Value("float64"),
        "image": List(TEXT),
    }
    rows = [
        {
            "question": "<image>\nWhich option?" if index % 2 else "<image> or <image>?",
            "answer": r"\boxed{A}",
            "category": "Math",
            "source": "made",
            "qid": f"qid-{index}",
            "PassRate_32BTrained": 0.5,
            "image": [f"images/{index}-{k}.png" for k in range(1 if index % 2 else 2)],
        }
        for index in range(6)
    ]
    parquet(folder / "39Krelease.parquet", rows, features)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for row in rows:
            for path in row["image"]:
                archive.writestr(path, png(int(row["qid"][-1])))
    return folder


def mmk12(folder: Path) -> Path:
    """FanqingM/MMK12: splits train and test, embedded images."""
    features = {**dict.fromkeys(("id", "question", "answer", "subject"), TEXT), "image": Image()}
    rows = [
        {
            "id": str(index),
            "question": "As shown in the figure <image>, how many?",
            "answer": "A",
            "subject": "math",
            "image": {"bytes": png(index), "path": f"{index}.png"},
        }
        for index in range(4)
    ]
    for split in ("train", "test"):
        parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows, features)
    return folder


def thinklite(folder: Path) -> Path:
    """russwang/ThinkLite-VL-hard-11k: `image` is the raw content of a file."""
    features = {**dict.fromkeys(("id", "problem", "answer"), TEXT), "image": Value("binary")}
    rows = [
        {"id": str(index), "problem": "<image>How many?", "answer": str(index), "image": png(index)}
        for index in range(4)
    ]
    parquet(folder / "data" / "train-00000-of-00001.parquet", rows, features)
    return folder


def wemath_pro(folder: Path) -> Path:
    """We-Math/We-Math2.0-Pro: split `pro`; eight rows have an empty question or answer."""
    features = {
        **dict.fromkeys(("question_id", "question", "difficulty", "answer"), TEXT),
        "image": Image(),
    }
    rows = [
        {"question_id": str(index), "question": "How many?", "difficulty": "1", "answer": "B",
         "image": {"bytes": png(index % 6), "path": None}}
        for index in range(20)
    ]  # fmt: skip
    for index in range(8):
        rows[2 * index]["question" if index % 2 else "answer"] = (None, "", " ", "\n")[index // 2]
    parquet(folder / "data" / "pro-00000-of-00001.parquet", rows, features)
    return folder
