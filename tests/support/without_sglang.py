"""Pytest plugin (`-p tests.support.without_sglang`): run as if SGLang were not installed."""

from __future__ import annotations

import sys

# An entry of None makes `import` raise ModuleNotFoundError.
sys.modules["sglang"] = sys.modules["sgl_kernel"] = None  # type: ignore[assignment]
