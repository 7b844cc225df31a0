"""The ops of GPT-2: each with its definition, PyTorch's best, a kernel, and the one place that chooses."""
