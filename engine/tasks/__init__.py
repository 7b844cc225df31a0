"""Evaluation on text and on question sets: HellaSwag, LAMBADA, and the loss on a text file."""
