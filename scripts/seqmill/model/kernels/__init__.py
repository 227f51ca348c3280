"""Kernels in C and Triton, and where each can be used."""
