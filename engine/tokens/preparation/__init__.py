"""Documents to shards: options, tokens, writing, the journal, progress and the summary of `gpt2 prepare`."""
