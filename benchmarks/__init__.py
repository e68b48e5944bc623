"""Command line benchmarks of sgl_kvq; each module's docstring says how to run it."""
