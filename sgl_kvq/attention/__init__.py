"""The attention backend `kvq`."""
