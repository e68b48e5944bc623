"""The append operation."""
