"""The wire imports neither SGLang nor PyTorch, so that importing it is quick."""

from __future__ import annotations

import subprocess
import sys

IMPORT_ALL = """
import importlib, pkgutil, sys
import sgl_kvq.transfer
for module in pkgutil.walk_packages(sgl_kvq.transfer.__path__, "sgl_kvq.transfer."):
    importlib.import_module(module.name)
print(sum(name.startswith("sgl_kvq.transfer.") for name in sys.modules))
print([name for name in ("torch", "sglang", "sgl_kvq.host", "transformers") if name in sys.modules])
"""


def test_transfer_imports_no_sglang_and_no_torch() -> None:
    command = [sys.executable, "-c", IMPORT_ALL]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    num_modules, found = answer.stdout.splitlines()
    assert int(num_modules) >= 20
    assert found == "[]"
