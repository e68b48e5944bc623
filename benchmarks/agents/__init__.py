"""Agents that share long prefixes."""
