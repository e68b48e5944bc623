"""A platform that lets SGLang serve on a CPU without its own CPU kernels."""
