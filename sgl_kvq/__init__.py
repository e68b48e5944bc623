"""Quantized radix-tree KV cache for SGLang.

Importing this package patches nothing and needs no GPU. SGLang finds the plugin through its entry
points and `--kv-quant FORMAT` switches it on.
"""

from __future__ import annotations

__version__ = "0.1.0"
