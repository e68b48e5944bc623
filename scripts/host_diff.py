"""Print what a release of SGLang changed among the names that sgl_kvq uses.

Downloads two wheels without their dependencies and compares their sources; nothing of them runs.

Usage: python scripts/host_diff.py NEW [--old VERSION] [--diff] [--wheels FOLDER]
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import email
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sgl_kvq.host import names
from sgl_kvq.host.versions.calls import CALLED
from sgl_kvq.host.versions.supported import SUPPORTED

HOST = Path(__file__).parent.parent / "sgl_kvq" / "host"
PINS = ("torch", "triton", "sglang-kernel", "flashinfer-python", "transformers", "xgrammar")
FIELD_FILES = re.compile(r"sglang/srt/(server_args|arg_groups/fields/\w+)\.py")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Definition(NamedTuple):
    """A function, class or variable of a wheel."""

    module: str
    node: ast.AST

    def signature(self) -> str:
        """Arguments of a function, or of a class's constructor, without annotations."""
        node: ast.AST | None = self.node
        if isinstance(node, ast.ClassDef):
            node = next((n for n in node.body if getattr(n, "name", None) == "__init__"), None)
        if not isinstance(node, FUNCTIONS):
            return ""
        arguments = copy.deepcopy(node.args)
        for argument in ast.walk(arguments):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        return ast.unparse(arguments)

    def source(self) -> str:
        """The code without comments and docstrings."""
        tree = copy.deepcopy(self.node)
        for node in ast.walk(tree):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        return ast.unparse(tree)


class Wheel:
    """The sources of one release.

    Args:
        version: The release.
        folder: Where wheels are kept; downloaded into it if absent.
    """

    def __init__(self, version: str, folder: Path) -> None:
        self.version = version
        if not (found := list(folder.glob(f"sglang-{version}-*.whl"))):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run(
                [*command, "--only-binary=:all:", "--dest", folder, f"sglang=={version}"],
                check=True,
            )
            found = list(folder.glob(f"sglang-{version}-*.whl"))
        self._zip = zipfile.ZipFile(found[0])
        self.files = set(self._zip.namelist())
        self._trees: dict[str, ast.Module] = {}

    def tree(self, path: str) -> ast.Module:
        """Syntax of a file."""
        if path not in self._trees:
            self._trees[path] = ast.parse(self._zip.read(path))
        return self._trees[path]

    def path(self, module: str) -> str | None:
        """File of a module, None if there is none."""
        base = module.replace(".", "/")
        return next((p for p in (f"{base}.py", f"{base}/__init__.py") if p in self.files), None)

    def find(self, target: str) -> Definition | None:
        """Look a qualified name up; imports and base classes are followed."""
        parts = target.replace(":", ".").split(".")
        for length in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:length])
            if self.path(module) is not None:
                found = self._global(module, parts[length])
                for name in parts[length + 1 :]:
                    found = found and self.member(found, name)
                return found
        return None

    def _global(self, module: str, name: str) -> Definition | None:
        path = self.path(module)
        if path is None:
            return None
        imports: list[tuple[str, str]] = []
        for node in _top_level(self.tree(path).body):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name == name:
                return Definition(module, node)
            if isinstance(node, ast.ImportFrom):
                source = _absolute(node, module, path)
                imports += [
                    (source, name if alias.name == "*" else alias.name)
                    for alias in node.names
                    if alias.name == "*" or (alias.asname or alias.name) == name
                ]
        found = (self._global(source, imported) for source, imported in imports)
        definition = next((d for d in found if d is not None), None)
        if definition is None:
            for node in _top_level(self.tree(path).body):
                targets = getattr(node, "targets", [getattr(node, "target", None)])
                if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                    return Definition(module, node)
        return definition

    def member(self, owner: Definition, name: str) -> Definition | None:
        """Method or attribute of a class, its own or inherited."""
        if not isinstance(owner.node, ast.ClassDef):
            return None
        for node in owner.node.body:
            if getattr(node, "name", None) == name:
                return Definition(owner.module, node)
        bases = (base.id for base in owner.node.bases if isinstance(base, ast.Name))
        parents = (self._global(owner.module, base) for base in bases)
        inherited = (self.member(parent, name) for parent in parents if parent is not None)
        return next((found for found in inherited if found is not None), None)

    def server_options(self) -> dict[str, str]:
        """Fields of `ServerArgs` and their defaults."""
        options = {}
        for path in sorted(filter(FIELD_FILES.fullmatch, self.files)):
            for owner in self.tree(path).body:
                if isinstance(owner, ast.ClassDef) and owner.name != "PortArgs":
                    for node in owner.body:
                        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                            default = "" if node.value is None else ast.unparse(node.value)
                            options[node.target.id] = default
        return options

    def pins(self) -> dict[str, str]:
        """Requirements of the packages that our kernels and tests depend on."""
        metadata = next(name for name in self.files if name.endswith(".dist-info/METADATA"))
        message = email.message_from_bytes(self._zip.read(metadata))
        found = {}
        for line in message.get_all("Requires-Dist", []):
            package = re.split(r"[^\w-]", line, maxsplit=1)[0].replace("_", "-").lower()
            if package in PINS and "extra ==" not in line:
                found[package] = line
        return found


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under `if` and `try` included."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try):
                yield from _top_level(getattr(node, part, []))


def _absolute(node: ast.ImportFrom, module: str, path: str) -> str:
    """Module that a `from` statement names."""
    if node.level == 0:
        return node.module or ""
    package = module.split(".") if path.endswith("__init__.py") else module.split(".")[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *filter(None, [node.module])])


def used_targets() -> list[str]:
    """Qualified names of SGLang that `sgl_kvq.host` imports, hooks, calls or overrides."""
    hooks = [v for k, v in vars(names).items() if k.isupper() and str(v).startswith("sglang.")]
    return sorted(
        {t.replace(":", ".") for t in (*names.NAMES.values(), *hooks, *CALLED)}
        | set(_members_of_bases())
    )


def _members_of_bases() -> Iterator[str]:
    """Methods that our subclasses of SGLang's classes override, or reach through `super()`."""
    for path in sorted(HOST.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            methods = {n.name for n in node.body if isinstance(n, FUNCTIONS)}
            for base in (b.id for b in node.bases if isinstance(b, ast.Name)):
                if base in names.NAMES:
                    yield from (f"{names.NAMES[base].replace(':', '.')}.{m}" for m in methods)


def compare(old: Wheel, new: Wheel, show_diff: bool) -> dict[str, list[str]]:
    """Group the names by what happened to them.

    Args:
        old: Release that is supported.
        new: Release to follow.
        show_diff: Add the differences of the sources.
    """
    groups: dict[str, list[str]] = {
        kind: [] for kind in ("gone", "signature", "moved", "source", "unchanged")
    }
    for target in used_targets():
        before, after = old.find(target), new.find(target)
        if before is None:
            continue  # a method of ours that SGLang's class does not have
        if after is None:
            groups["gone"].append(target)
            continue
        changes = "" if not show_diff else _diff(before.source(), after.source())
        if before.signature() != after.signature():
            lines = f"\n    - ({before.signature()})\n    + ({after.signature()})"
            groups["signature"].append(target + lines + changes)
        elif before.source() != after.source():
            groups["source"].append(target + changes)
        elif before.module != after.module:
            groups["moved"].append(f"{target}: {before.module} -> {after.module}")
        else:
            groups["unchanged"].append(target)
    return groups


def _diff(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=2)
    return "".join(f"\n    {line}" for line in list(lines)[2:])


def report(old: Wheel, new: Wheel, show_diff: bool) -> str:
    """All differences as text."""
    titles = {
        "gone": "gone: find what replaced it, and let host/versions know both",
        "signature": "other arguments: compare with the calls in sgl_kvq/host",
        "moved": "moved: the old name still works",
        "source": "other code, same arguments: read what changed (--diff)",
    }
    groups = compare(old, new, show_diff)
    lines = [f"SGLang {old.version} -> {new.version}: {sum(map(len, groups.values()))} names"]
    lines += [f"  {len(found)} {kind}" for kind, found in groups.items()]
    for kind, title in titles.items():
        if groups[kind]:
            lines += ["", title, *(f"  {entry}" for entry in groups[kind])]
    for title, before, after in (
        ("requirements", old.pins(), new.pins()),
        ("options of ServerArgs", old.server_options(), new.server_options()),
    ):
        lines += ["", title, *_changes(before, after)]
    return "\n".join(lines)


def _changes(before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            yield f"  - {name}"
        elif name not in before:
            yield f"  + {name} {after[name]}".rstrip()
        elif before[name] != after[name]:
            yield f"  {name}: {before[name]} -> {after[name]}"


def main() -> None:
    """Compare two releases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("new", help="release to follow, such as 0.5.24")
    parser.add_argument("--old", default=SUPPORTED[-1], help="release that is supported")
    parser.add_argument("--diff", action="store_true", help="print differences of the sources")
    parser.add_argument("--wheels", type=Path, help="folder that keeps the downloaded wheels")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.wheels or Path(temporary)
        print(report(Wheel(args.old, folder), Wheel(args.new, folder), args.diff))


if __name__ == "__main__":
    main()
