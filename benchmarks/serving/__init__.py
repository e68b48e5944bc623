"""Serving throughput: stock SGLang against `--kv-quant`, by SGLang's own `bench_serving`."""
