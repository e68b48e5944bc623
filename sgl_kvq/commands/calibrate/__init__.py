"""`python -m sgl_kvq calibrate`."""
