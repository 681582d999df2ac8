"""
A page in the browser: ask checkpoints about an image, and see for each token of the answer where the branches look,
what share of self-attention the image still gets, and what the model would have written without its branches.

    pvm app runs/my_pvm                        branches on and off, side by side
    pvm app runs/my_pvm Qwen/Qwen3-VL-8B-Instruct      two checkpoints
    pvm app                                    the demo's checkpoint, or its bare backbone, with examples

    pvm app runs/my_pvm --space FOLDER         writes the page as a Hugging Face Space instead; push it with
    hf upload YOUR_NAME/SPACE FOLDER . --repo-type space
"""

import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from PIL import Image

from pvm.app.space import write_space
from pvm.checkpoints.loading import load_checkpoint
from pvm.errors import UserError
from pvm.shipped import shipped
from pvm.terminal import Terminal


DEMO = Path("runs/digits_pvm")


def main(arguments: list[str] | None = None) -> None:
    """
    The command `pvm app`.

    Raises:
        UserError: if a checkpoint cannot be loaded, or the server's packages are not installed.
    """
    parser = ArgumentParser("pvm app", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders or Hub names of checkpoints of any kind")
    parser.add_argument("--dtype", default="auto", help="of the weights; auto: the checkpoint's own")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: other machines can ask, too (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="of the page (%(default)s)")
    parser.add_argument("--space", type=Path, metavar="FOLDER", help="write a Space into this new folder")
    args = parser.parse_args(arguments)
    models = args.models or [str(DEMO if DEMO.is_dir() else shipped("assets") / "digits-backbone")]
    try:
        import uvicorn

        from pvm.app.server import create_app
    except ImportError as error:
        raise UserError("The page needs packages that are not installed: pip install starlette uvicorn") from error
    if args.space is not None:
        write_space(models, args.space)
        return

    # An image that would fill the memory once it is unpacked is an error, not only a warning.
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    app = create_app([load_checkpoint(model, args.dtype) for model in models])
    address = "localhost" if args.host in ("0.0.0.0", "127.0.0.1") else args.host
    Terminal().print(f"Open http://{address}:{args.port} (Ctrl-C stops)")
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
