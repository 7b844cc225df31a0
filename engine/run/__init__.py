"""A run on the disk: checkpoints, metrics, pictures, and finding the way back into them."""
