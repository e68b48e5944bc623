"""What one step reads and writes, worked out once and used by every layer."""
