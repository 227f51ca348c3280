"""Kernels in C and Triton, and checks of where each can be used."""
