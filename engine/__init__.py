"""Training: data, optimisation, checkpoints, and the command line."""
