"""`python eval.py` in a clone is `pvm eval`, which `--help` explains."""

import sys

from pvm.__main__ import main as pvm
from pvm.eval import main


__all__ = ["main"]

if __name__ == "__main__":
    pvm(["eval", *sys.argv[1:]])
