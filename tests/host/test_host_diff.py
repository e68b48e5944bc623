"""`scripts/host_diff.py` on two small releases."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from scripts import host_diff

OLD = {
    "sglang/srt/pool.py": '''
class Base:
    def copy(self, rows): ...
class Pool(Base):
    """A pool."""
    def __init__(self, size: int): ...
def gone(): ...
def same(a): return a + 1  # one more
def body(a): return a
''',
    "sglang/srt/moved.py": "def moved(x): ...",
    "sglang/srt/server_args.py": (
        "class ServerArgs:\n    model: str\n    size: int = 1\n    old: int = 2"
    ),
    "sglang-1.dist-info/METADATA": "Requires-Dist: torch==2.1\nRequires-Dist: numpy\n",
}
NEW = {
    "sglang/srt/pool.py": '''
from .moved_to import *
class Base:
    def copy(self, rows, columns=None): ...
class Pool(Base):
    """Another docstring."""
    def __init__(self, size: "int", *, device): ...
def same(a):
    return a + 1
def body(a): return a + 0
''',
    "sglang/srt/moved.py": "from sglang.srt.moved_to import moved",
    "sglang/srt/moved_to.py": "def moved(x): ...",
    "sglang/srt/arg_groups/fields/model.py": (
        "class Model:\n    model: str\n    size: int = 3\n    new: bool = False"
    ),
    "sglang-2.dist-info/METADATA": "Requires-Dist: torch==2.2\nRequires-Dist: numpy\n",
}
TARGETS = ("pool.Pool", "pool.Pool.copy", "pool.gone", "pool.same", "pool.body", "moved.moved")


def wheel(version: str, files: dict[str, str], folder: Path) -> host_diff.Wheel:
    with zipfile.ZipFile(folder / f"sglang-{version}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return host_diff.Wheel(version, folder)


def test_what_changed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [f"sglang.srt.{target}" for target in TARGETS]
    monkeypatch.setattr(host_diff, "used_targets", lambda: targets)
    old, new = wheel("1", OLD, tmp_path), wheel("2", NEW, tmp_path)
    groups = host_diff.compare(old, new, show_diff=False)
    assert groups["gone"] == ["sglang.srt.pool.gone"]
    assert groups["moved"] == ["sglang.srt.moved.moved: sglang.srt.moved -> sglang.srt.moved_to"]
    assert groups["unchanged"] == ["sglang.srt.pool.same"]
    assert groups["source"] == ["sglang.srt.pool.body"]
    constructor, copy = groups["signature"]
    assert constructor.splitlines()[1:] == ["    - (self, size)", "    + (self, size, *, device)"]
    assert copy.startswith("sglang.srt.pool.Pool.copy")
    text = host_diff.report(old, new, show_diff=True)
    for line in ("    +    return a + 0", "  + new False", "  - old", "  size: 1 -> 3"):
        assert line in text.splitlines()
    assert "  torch: torch==2.1 -> torch==2.2" in text


def test_the_names_in_use_are_found() -> None:
    targets = host_diff.used_targets()
    for name in (
        "server_args.ServerArgs",
        "mem_cache.memory_pool.KVCache.get_cpu_copy",
        "mem_cache.allocation.alloc_paged_token_slots_extend",
        "disaggregation.common.conn.CommonKVSender._prepare_send_indices",
    ):
        assert f"sglang.srt.{name}" in targets
