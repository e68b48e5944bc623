"""The extend operation."""
