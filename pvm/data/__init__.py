"""From files and the Hub to batches: rows, conversations, tensors, and the validation before training."""
