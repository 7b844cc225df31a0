"""Ops of GPT-2, each as a reference, in PyTorch and in Triton; kernels.dispatch chooses."""
