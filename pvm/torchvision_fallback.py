"""Makes torchvision importable where its compiled operators cannot be loaded.

Some torchvision wheels do not match a CPU-only torch: their extension fails to load, and `import torchvision` stops
with "operator torchvision::nms does not exist". transformers needs only torchvision's Python code (image transforms),
so declaring the operators is enough. It is done only after the plain import has failed in exactly this way.
"""

import importlib
import sys

import torch


# The declarations live as long as this object does, so the module keeps it.
_library: torch.library.Library | None = None


def import_torchvision() -> bool:
    """Imports torchvision, with declared operators where the compiled ones are missing.

    Returns:
        `bool`: whether the fallback was needed.
    """
    global _library
    try:
        importlib.import_module("torchvision")
        return False
    except ModuleNotFoundError:
        return False  # not installed: transformers then says itself what needs it
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
    return True
