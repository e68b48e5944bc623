"""The decode operation."""
