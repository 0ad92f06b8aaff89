"""Kernels in C for the processor, compiled once for it: what PyTorch leaves slow on short sequences."""
