"""Matrices that take heads to the basis pages are stored in, and back."""
