"""The order of the packages: who may import whom, and that only `sgl_kvq/host` knows SGLang."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sgl_kvq"

# What stands in `sgl_kvq/`, from bottom to top, and what it may import besides itself.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "formats": {"errors"},
    "config": {"errors", "formats"},
    "memory_pool": {"errors", "formats", "config"},
    "kernels": {"errors", "formats", "config", "memory_pool"},
    "attention": {"errors", "formats", "config", "memory_pool", "kernels"},
    "transfer": {"errors", "formats", "config", "memory_pool"},
    "fidelity": {"errors", "formats"},
}
ALLOWED["host"] = set(ALLOWED)
ALLOWED["commands"] = set(ALLOWED)
ALLOWED["__main__"] = {"errors", "commands"}

WITHOUT_SGLANG = tuple(ALLOWED["host"])
MAX_ROOMS = 12


@dataclass(frozen=True)
class Import:
    """One import statement of a module, `target` being a module of this package."""

    source: str
    target: str
    line: int
    for_types: bool  # under `if TYPE_CHECKING`

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(node: ast.AST) -> Iterator[str]:
    """Absolute names an import statement may load, the longest of each first."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: expected an absolute import"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(module: str) -> Iterator[Import]:
    """Imports of this package's modules, those inside functions and for type checkers included."""
    tree = ast.parse(MODULES[module].read_text())
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        for name in imported_names(node):
            target = name if name in MODULES else name.rpartition(".")[0]
            if target in MODULES and target != module:
                yield Import(module, target, node.lineno, node in guarded)


IMPORTS = [found for module in MODULES for found in dict.fromkeys(imports_of(module))]


def room_of(module: str) -> str:
    """Entry of `sgl_kvq/` that a module belongs to; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def child_of(package: str, module: str) -> str | None:
    """Module or sub-package directly in `package` that a module is or belongs to."""
    if not module.startswith(f"{package}."):
        return None
    return module[len(package) + 1 :].split(".")[0]


def cycles_in(package: str) -> Iterator[str]:
    """Every cycle among the modules and sub-packages directly in a package.

    Imports inside functions count; those for type checkers do not, since they never run.
    """
    graph: dict[str, dict[str, Import]] = defaultdict(dict)
    for found in IMPORTS:
        source, target = (child_of(package, name) for name in (found.source, found.target))
        if source and target and source != target and not found.for_types:
            graph[source].setdefault(target, found)
    while True:
        try:
            TopologicalSorter({node: set(edges) for node, edges in graph.items()}).prepare()
        except CycleError as error:
            # Each node of the cycle is imported by the next one.
            pairs = list(zip(error.args[1][1:], error.args[1], strict=False))
            yield f"{package}: " + "; ".join(str(graph[a][b]) for a, b in pairs)
            last_source, last_target = pairs[-1]
            del graph[last_source][last_target]
        else:
            return


def refuse(violations: list[str]) -> None:
    """Fail with the whole list."""
    if violations:
        pytest.fail("\n".join([f"{len(violations)} violations", *violations]), pytrace=False)


def test_imports_point_down() -> None:
    violations = [
        str(found)
        for found in IMPORTS
        if (room := room_of(found.source)) != room_of(found.target)
        and room_of(found.target)
        and room_of(found.target) not in ALLOWED.get(room, set())
    ]
    refuse(violations)


def test_no_cycles() -> None:
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    violations = [cycle for package in sorted(packages) for cycle in cycles_in(package)]
    refuse(violations)


def test_every_room_is_known() -> None:
    rooms = {room_of(module) for module in MODULES} - {""}
    assert rooms == set(ALLOWED)
    assert len(rooms) <= MAX_ROOMS


def test_only_the_host_names_sglang() -> None:
    violations = [
        f"{path.relative_to(PACKAGE.parent)}:{number} {line.strip()}"
        for module, path in MODULES.items()
        if room_of(module) != "host"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "sglang" in line or "sgl_kernel" in line
    ]
    refuse(violations)


def test_layers_below_the_host_load_without_sglang() -> None:
    """Each module is imported in a process where SGLang cannot be."""
    modules = [module for module in MODULES if room_of(module) in WITHOUT_SGLANG]
    script = f"""
        import importlib, sys
        sys.modules["sglang"] = sys.modules["sgl_kernel"] = None
        failed = 0
        for module in {modules!r}:
            try:
                importlib.import_module(module)
            except Exception as error:
                failed += 1
                print(f"{{module}}: {{error!r}}")
        host = [name for name in sys.modules if name.startswith("sgl_kvq.host")]
        if host:
            print("loaded beside them:", host)
        sys.exit(bool(failed or host))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
