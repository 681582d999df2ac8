"""Placeholders of images in prompts. Imports nothing of vLLM: trainers need it, too."""

from collections.abc import Sequence
from itertools import groupby


def collapsed(ids: Sequence[int], placeholder: int) -> list[int]:
    """A prompt with one placeholder per image, which vLLM expands, in place of one per visual token."""
    return [id_ for id_, run in groupby(ids) for _ in ((id_,) if id_ == placeholder else run)]
