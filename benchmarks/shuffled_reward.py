"""The reward of second_stage.py, given to other completions: as large and as varied, and knowing nothing."""

import numpy as np

from pvm.rl.rewards import accuracy_function


def shuffled_accuracy(completions, answer, trainer_state=None, **kwargs):
    """Rewards for exact answers, in random order."""
    rewards = accuracy_function("exact")(completions=completions, answer=answer)
    step = 0 if trainer_state is None else trainer_state.global_step
    return np.random.default_rng(step).permutation(rewards).tolist()
