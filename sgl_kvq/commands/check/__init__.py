"""`python -m sgl_kvq check`."""
