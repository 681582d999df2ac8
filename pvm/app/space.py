"""The page as a Hugging Face Space: a folder with all it needs, that also runs here (`python app.py`)."""

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import configuration_qwen3vl_pvm
from pvm.checkpoints.convert import load_merged
from pvm.checkpoints.loading import load_processor
from pvm.checkpoints.names import base_of, checkpoint_kind, public_name
from pvm.checkpoints.push import checkpoint_files
from pvm.errors import UserError
from pvm.shipped import shipped
from pvm.terminal import Terminal


README = """\
---
title: Persistent Visual Memory
emoji: 👁️
colorFrom: blue
colorTo: yellow
sdk: docker
app_port: 7860
license: apache-2.0
short_description: What a vision-language model still sees as it writes
models: {models}
---

An answer token by token, with and without the branches of Persistent Visual Memory
([arXiv 2605.00814](https://arxiv.org/abs/2605.00814)): where they look, and what share of self-attention the image
still gets.

`python app.py` shows the same page on your machine, after `pip install -r requirements.txt`.
"""
APP = """\
\"\"\"The page: http://localhost:7860\"\"\"

import os

from pvm.__main__ import main


os.chdir(os.path.dirname(os.path.abspath(__file__)))
main(["app", {models}, "--host", "0.0.0.0", "--port", os.environ.get("PORT", "7860")])
"""
DOCKERFILE = """\
FROM python:{python}-slim
RUN useradd --create-home --uid 1000 user
USER user
WORKDIR /home/user/app
COPY --chown=user requirements.txt .
RUN pip install --no-cache-dir --user -r requirements.txt
COPY --chown=user . .
CMD ["python", "app.py"]
"""
# What the page imports, directly or through other modules of the package.
PACKAGES = """
    accelerate datasets filelock huggingface_hub numpy peft pillow pyarrow PyYAML rich safetensors scikit-learn
    starlette tokenizers torch torchvision tqdm transformers uvicorn
""".split()


def write_space(models: list[str], folder: Path) -> None:
    """
    Args:
        models (`list[str]`): Hub names stay names; checkpoints in folders are copied, those on a base in a folder as
            whole checkpoints.
        folder (`Path`): created.

    Raises:
        UserError: if the folder exists, or a checkpoint cannot be copied.
    """
    if folder.exists():
        raise UserError(f"{folder} exists and is left as it is. Name a new folder.")
    for model in models:
        checkpoint_kind(model)  # says what is wrong with a name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
        space = Path(temporary, "space")
        package = Path(__file__).parent.parent
        shutil.copytree(package, space / "pvm", ignore=shutil.ignore_patterns("__pycache__", "recipes", "assets"))
        backbone = "digits-backbone"
        shutil.copytree(shipped("assets") / backbone, space / "pvm" / "assets" / backbone)
        for file in Path(configuration_qwen3vl_pvm.__file__).parent.glob("*_qwen3vl_pvm.py"):
            shutil.copy(file, space)
        names = [_copied(model, space) if Path(model).is_dir() else model for model in models]
        on_hub = [name for name, model in zip(names, models) if public_name(model)["on_hub"]]
        versions = [f"{package}=={version(package).partition('+')[0]}\n" for package in PACKAGES]
        texts = {
            "README.md": README.format(models=on_hub),
            "app.py": APP.format(models=json.dumps(names)[1:-1]),
            "Dockerfile": DOCKERFILE.format(python=".".join(platform.python_version_tuple()[:2])),
            "requirements.txt": "".join(versions),
        }
        for name, text in texts.items():
            (space / name).write_text(text, encoding="utf-8")
        space.rename(folder)
    Terminal().print(f"Written: {folder}. Push it: hf upload YOUR_NAME/SPACE {folder} . --repo-type space")


def _copied(model: str, space: Path) -> str:
    """Copy a checkpoint; its name in the Space."""
    source, base = Path(model).resolve(), base_of(model)
    name = f"checkpoints/{source.name}"
    if (space / name).exists():
        raise UserError(f"Two checkpoints are called {source.name}. Rename one of the folders.")
    if base is not None and Path(base[0]).is_dir():
        if checkpoint_kind(model) == "peft":
            raise UserError(f"{model} is a PEFT adapter for {base[0]}, which is not on the Hub. Merge it first.")
        load_merged(model, "main").save_pretrained(space / name)
        load_processor(model).save_pretrained(space / name)
        return name
    (space / name).mkdir(parents=True)
    for file in checkpoint_files(source):
        (space / name / file).parent.mkdir(exist_ok=True)
        shutil.copy(source / file, space / name / file)
    return name
