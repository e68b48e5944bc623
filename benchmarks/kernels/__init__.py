"""Attention, append and extend kernels alone."""
