"""What train.py and eval.py share."""

from pvm.torchvision_fallback import import_torchvision


import_torchvision()
