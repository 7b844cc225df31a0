"""Files of a run: checkpoints, metrics, plots, exported weights; and resuming from them."""
