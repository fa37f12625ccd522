"""The training loop, its losses, and the trainer that algorithms are given."""
