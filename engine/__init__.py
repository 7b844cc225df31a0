"""Training: data, optimisation, checkpoints, and the command line."""

from engine import packages

packages.come_first()
