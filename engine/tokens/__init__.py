"""Text to batches: sources, tokenizer, prepare, shards, batches."""
