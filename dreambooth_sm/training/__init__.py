"""The training step and what it is made of: losses, optimizers, EMA, checkpoints, the loop."""
