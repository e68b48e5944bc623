"""Entry point `sglang.srt.platforms`: offer a CPU platform where no accelerator is present."""

from __future__ import annotations

import os


def activate() -> str | None:
    """Decide whether SGLang should run on our CPU platform.

    Returns:
        The qualified name of the platform class on a machine without an accelerator; None when
        one is there, or when `SGLANG_USE_CPU_ENGINE=1` asks for SGLang's own CPU engine.
    """
    import torch

    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if torch.accelerator.is_available():
        return None
    # Threads of PyTorch's operators spin while they wait for each other. A server's other processes
    # want the same cores, and then spinning makes it about ten times slower (2-core Xeon). The
    # scheduler process inherits this.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return "sgl_kvq.host.cpu_platform.platform:CpuEnginePlatform"
