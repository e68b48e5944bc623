"""Reads spans of a pool's pages and rows and writes them."""
