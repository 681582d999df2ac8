"""
The second stage: GRPO, which grpo.py runs on trl's trainer.

- policy.py: what is trained, and from which checkpoint; prompts.py: rows as trl reads them.
- rewards.py: what an answer is worth; rollouts.py: sampling with log-probabilities; trainer.py: a step.
"""
