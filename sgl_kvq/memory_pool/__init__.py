"""Bytes at rest: storage of all layers, who holds which 16-bit rows, and how many fit."""
