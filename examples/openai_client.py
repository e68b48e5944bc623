"""Serve a model with 4-bit KV pages and ask it a question through the OpenAI client.

    python examples/openai_client.py [MODEL]

`--kv-quant` is the only option that a stock `sglang.launch_server` command does not have.
"""

from __future__ import annotations

import sys

from serving import MODEL, QUESTION, ask, free_port, running


def main(model: str) -> None:
    """Start the server, print one answer, stop it."""
    flags = ["--model-path", model, "--kv-quant", "hack4", "--kv-quant-memory-gb", "0.1"]
    with running("sglang.launch_server", free_port(), *flags) as url:
        print(ask(url, QUESTION))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else MODEL)
