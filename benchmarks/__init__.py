"""The cost of PVM compared to the stock model of the same shape, measured in the same run."""

import pvm  # noqa: F401  (first: it makes torchvision importable where its compiled operators are missing)
