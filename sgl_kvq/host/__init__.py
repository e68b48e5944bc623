"""The only package that knows SGLang: names, hooks, options, pool, allocator, PD endpoints."""
