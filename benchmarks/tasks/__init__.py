"""Tasks that a model is served for, each graded right or wrong, paired against 16-bit KV."""
