"""Kernels of our own, for what PyTorch does slowly."""
