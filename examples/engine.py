"""Generate with `sgl.Engine` and 2-bit KV pages, without a server.

    python examples/engine.py [MODEL]

The second prompt begins as the first does, so that its first page comes out of the radix tree.
"""

from __future__ import annotations

import sys

import sglang as sgl
from serving import MODEL

SHARED = "The capital of France is Paris. The capital of Italy is Rome. " * 6


def main(model: str) -> None:
    """Print two continuations, and how many of their prompt tokens were cached."""
    engine = sgl.Engine(model_path=model, kv_quant="hack2", kv_quant_memory_gb=0.1)
    try:
        for end in ("The capital of Spain is", "The capital of Germany is"):
            answer = engine.generate(SHARED + end, {"max_new_tokens": 8, "temperature": 0})
            info = answer["meta_info"]
            print(
                f"{end}{answer['text']!r}: {info['cached_tokens']} of {info['prompt_tokens']} "
                f"prompt tokens cached"
            )
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else MODEL)
