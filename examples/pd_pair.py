"""A prefill and a decode instance with SGLang's router in front; pages travel in 4 bits.

    python examples/pd_pair.py [MODEL]

Needs the packages of `pip install "sgl_kvq[pd]"`.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

from serving import MODEL, QUESTION, ask, free_port, running


def main(model: str) -> None:
    """Start both instances and the router, print one answer, stop them."""
    bootstrap = str(free_port())
    flags = ["--model-path", model, "--kv-quant", "hack4", "--kv-quant-memory-gb", "0.1"]
    flags += ["--disaggregation-transfer-backend", "kvq-zmq"]
    flags += ["--disaggregation-bootstrap-port", bootstrap, "--disaggregation-mode"]
    with ExitStack() as stack:
        prefill, decode = (
            stack.enter_context(running("sglang.launch_server", free_port(), *flags, mode))
            for mode in ("prefill", "decode")
        )
        pair = ["--pd-disaggregation", "--prefill", prefill, bootstrap, "--decode", decode]
        pair += ["--prometheus-port", str(free_port())]
        router = running("sglang_router.launch_router", free_port(), *pair, ready="/readiness")
        print(ask(stack.enter_context(router), QUESTION))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else MODEL)
