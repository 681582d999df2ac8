"""What can be trained, and the Trainer that does it."""
