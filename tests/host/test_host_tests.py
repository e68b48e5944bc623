"""`scripts/host_tests.py` tells tests that pass, fail, hang and are refused apart."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from scripts import host_tests

MODULE = """
import time
import unittest

from sglang.test.test_utils import DEFAULT_SMALL_MODEL_NAME_FOR_TEST as MODEL


class TestServed(unittest.TestCase):
    def test_model(self):
        self.assertEqual(MODEL, "{model}")

    def test_wrong(self):
        self.assertEqual(1, 2)


class TestRefused(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        print("error: --page-size: expected 64, got 16", flush=True)
        raise RuntimeError("server exited")

    def test_first(self): ...

    def test_second(self): ...


class TestZ(unittest.TestCase):
    def test_hangs(self):
        time.sleep(600)
"""


def test_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "test" / "registered" / "core"
    folder.mkdir(parents=True)
    (tmp_path / "test" / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(MODULE.replace("{model}", str(tmp_path)))
    args = argparse.Namespace(output=tmp_path, model=tmp_path, timeout=75.0)
    names = ("TestServed::test_model", "TestServed::test_wrong")
    names += ("TestRefused::test_first", "TestRefused::test_second", "TestZ::test_hangs")
    tests = [f"registered/core/test_it.py::{name}" for name in names]
    results = host_tests.run_tests("core/test_it.py", tests, "hack4", tmp_path, args)
    found = {test.partition("::")[2]: result for test, result in results.items()}
    refusal = "--page-size: expected 64, got 16"
    assert found == {
        "TestServed::test_model": ("passed", ""),
        "TestServed::test_wrong": ("failed", "AssertionError: 1 != 2"),
        "TestRefused::test_first": ("refused", refusal),
        "TestRefused::test_second": ("refused", refusal),
        "TestZ::test_hangs": ("timeout", "not ended after 75 s"),
    }
    monkeypatch.setitem(host_tests.CANNOT_HOLD, "TestServed::test_wrong", "1 is not 2")
    assert host_tests.judge("x::TestServed::test_wrong", "failed", "?") == (
        "cannot hold",
        "1 is not 2",
    )
