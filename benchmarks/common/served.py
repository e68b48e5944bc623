"""How a running server computes, for the columns of a results file."""

from __future__ import annotations

import re

from testbed.servers import Server

PREFILL_GRAPH = re.compile(r"Capture target prefill CUDA graph begin\. backend=(\w+)")


def backend_columns(server: Server) -> dict[str, str]:
    """Return what a server chose for this device.

    Returns:
        `attention_backend`, that of prefill and that of decode if they differ; `prefill_graph`,
        how prefill is captured, or "off".
    """
    info = server.info()
    backends = (info["prefill_attention_backend"], info["decode_attention_backend"])
    names = [name or info["attention_backend"] for name in backends]
    graph = PREFILL_GRAPH.search(server.log_path.read_text(errors="replace"))
    return {
        "attention_backend": "+".join(dict.fromkeys(names)),
        "prefill_graph": graph[1] if graph else "off",
    }
