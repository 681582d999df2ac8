"""`python grpo.py` in a clone is `pvm grpo`, which `--help` explains."""

import sys

from pvm.__main__ import main as pvm
from pvm.grpo import main


__all__ = ["main"]

if __name__ == "__main__":
    pvm(["grpo", *sys.argv[1:]])
