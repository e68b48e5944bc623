"""A pytest plugin that makes `import sglang` fail, as where SGLang is not installed.

Usage: python -m pytest -p tests.support.no_sglang tests/transfer
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _NoSGLang(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] == "sglang":
            raise ModuleNotFoundError(f"{fullname}: hidden by {__name__}", name=fullname)
        return None


if "sglang" in sys.modules:
    raise RuntimeError("sglang is imported already: name this plugin with -p")
sys.meta_path.insert(0, _NoSGLang())
