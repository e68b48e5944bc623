"""Commands of `python -m sgl_kvq`, one module each: `add_arguments(parser)` and `run(args)`."""
