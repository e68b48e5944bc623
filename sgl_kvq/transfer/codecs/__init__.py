"""Lossless codecs of payloads: one file a codec, looked up by name and by id in `registry`."""
