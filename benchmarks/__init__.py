"""What PVM costs, beside the stock model of the same shape, measured in one run."""

import pvm  # noqa: F401  (first: it makes torchvision importable where its compiled operators are missing)
