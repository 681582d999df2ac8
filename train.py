"""`python train.py` in a clone is `pvm train`, which `--help` explains."""

import sys

from pvm.__main__ import main as pvm
from pvm.train import main


__all__ = ["main"]

if __name__ == "__main__":
    pvm(["train", *sys.argv[1:]])
