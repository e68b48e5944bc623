"""Every Python that the package supports, as far as a bare interpreter goes: one without packages.

The full tests run under one of them; `CONTRIBUTING.md` says how to run them under another.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SUPPORTED = [
    version
    for version in (f"3.{minor}" for minor in range(30))
    if version in SpecifierSet(PROJECT["requires-python"])
]

IMPORT_ALL = """
import importlib, pathlib, sys

loaded = []
for path in sorted(pathlib.Path("sgl_kvq").rglob("*.py")):
    compile(path.read_text(), path, "exec")
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # of a package that a bare Python lacks
        assert not error.name.startswith("sgl_kvq"), error
    else:
        loaded.append(name)
print(*loaded)
"""
WRITE_RECORD = """
import pickle, sys
from tests.support.options_record import OptionsRecord

sys.stdout.buffer.write(pickle.dumps(OptionsRecord("model", kv_quant="hack2")))
"""
READ_RECORD = """
import pickle, sys

record = pickle.load(sys.stdin.buffer)
print(type(record).__name__, record.model_path, record.kv_quant, record.page_size)
"""


@pytest.fixture(params=SUPPORTED)
def python(request: pytest.FixtureRequest) -> str:
    """An interpreter of each supported version."""
    version: str = request.param
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    on_path = shutil.which(f"python{version}")
    in_pyenv = (Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python")
    for found in (*([on_path] if on_path else []), *map(str, in_pyenv)):
        # pyenv's `python3.12` on PATH fails unless that version is selected.
        if subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    pytest.skip(f"needs Python {version} on PATH or in ~/.pyenv/versions")


def run(python: str, code: str, stdin: bytes = b"") -> bytes:
    """Run code without site-packages, warnings being errors; its output."""
    command = [python, "-S", "-E", "-W", "error", "-c", f"import sys; sys.path[0] = ''\n{code}"]
    done = subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_modules_compile_and_import(python: str) -> None:
    loaded = run(python, IMPORT_ALL).split()
    assert b"sgl_kvq.host.versions.records" in loaded
    assert loaded == run(sys.executable, IMPORT_ALL).split()


def test_a_record_of_options_reaches_another_process(python: str) -> None:
    """SGLang sends it to processes that it spawns, which have imported nothing yet."""
    there = run(python, READ_RECORD, run(python, WRITE_RECORD)).decode()
    assert there.split() == ["OptionsRecord", "model", "hack2", "64"]
