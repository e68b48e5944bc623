"""How much a KV format changes a model's answers: python -m benchmarks.fidelity."""
