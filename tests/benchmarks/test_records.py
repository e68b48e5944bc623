"""The commands that results files name can be run."""

from __future__ import annotations

import ast
import importlib.util

from benchmarks.common.records import command_line
from tests.support import ROOT


def test_every_named_module_exists() -> None:
    named = set()
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "command_line":
                named |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    assert len(named) > 5
    for name in named:
        module = command_line(name, []).split()[-1]
        assert importlib.util.find_spec(module) is not None, module
