"""The receiving side: a decode instance."""
