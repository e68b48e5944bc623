"""Reads spans of a pool's pages and 16-bit rows, and writes them."""
