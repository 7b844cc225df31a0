"""What token shards hold, for `gpt2 data` and `gpt2 verify`."""
