"""The training loop, the losses, and the trainer that algorithms use."""
