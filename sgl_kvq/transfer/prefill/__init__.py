"""The sending side: a prefill instance."""
