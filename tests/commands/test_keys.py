"""`python -m sgl_kvq keys`."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from sgl_kvq.__main__ import main


def test_keys_are_made_once_and_for_their_owner_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "keys"
    assert main(["keys", str(folder), "--decode", "east", "west"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{name}.{kind}" for name in ("east", "prefill", "west") for kind in ("key", "key_secret")
    ]
    for path in folder.glob("*.key_secret"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "decode instance east: east.key_secret prefill.key" in capsys.readouterr().out
    assert main(["keys", str(folder)]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["keys", str(tmp_path / "b"), "--decode", "../up"]) == 1
