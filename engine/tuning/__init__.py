"""Tuning: finds the fastest right way to run a training step on this machine, and remembers it."""
