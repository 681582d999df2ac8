"""Checkpoints: what they are, loading, the training record, the model card, pushing, conversion."""
