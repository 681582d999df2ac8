"""What train.py and eval.py share."""

from .torchvision_fallback import import_torchvision


import_torchvision()
