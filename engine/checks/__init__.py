"""Checks before the first update: the kernels, the compiler, and the compiled code that a run keeps."""
