"""Conversations: their forms, where they come from, how they become tensors, and what is wrong with them."""
