"""Sampling: the log-probabilities with which tokens are sampled."""

import torch
from transformers import LogitsProcessor


class SampledLogProbs(LogitsProcessor):
    """
    Keeps the model's log-probability of every token that `generate` samples: one number a step, where the scores of
    all steps would be gigabytes. It must come before processors that change the scores.

    Args:
        temperature (`float`): divides the logits, as in the trainer.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self._chosen: list[torch.Tensor] = []
        self._last: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._keep(input_ids)
        self._last = (scores.float() / self.temperature).log_softmax(dim=-1)
        return scores

    def finish(self, sequences: torch.LongTensor) -> torch.FloatTensor:
        """Of `generate`'s output `[batch, prompt + new]`, the log-probabilities `[batch, new]`."""
        self._keep(sequences)
        return torch.stack(self._chosen, dim=1)

    def _keep(self, input_ids: torch.LongTensor) -> None:
        if self._last is not None:
            self._chosen.append(self._last.gather(1, input_ids[:, -1:]).squeeze(1))
