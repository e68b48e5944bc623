"""`python -m sgl_kvq keys`, addresses, and the digest of a model's weights."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest

from sgl_kvq.__main__ import main
from sgl_kvq.transfer.options import is_loopback
from sgl_kvq.transfer.protocol.handshake import weights_digest


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


def test_loopback_addresses() -> None:
    local = ("127.0.0.1", "::1", "localhost")
    assert all(is_loopback(host) for host in local)
    assert not is_loopback("10.0.0.1")


def write_safetensors(path: Path, values: np.ndarray) -> None:
    """Two tensors of the same values, in the layout of the safetensors format."""
    half = values.nbytes // 2
    tensors = {
        name: {"dtype": "F32", "shape": [half // 4], "data_offsets": [begin, begin + half]}
        for name, begin in (("first", 0), ("second", half))
    }
    header = json.dumps(tensors).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())


@pytest.mark.parametrize("place", [0, 2000, 3999], ids=["first", "between", "last"])
def test_other_weights_have_another_digest(tmp_path: Path, place: int) -> None:
    """One value of one tensor changed; the sizes stay."""
    values = np.arange(4000, dtype=np.float32)
    digests = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", values)
        digests.add(weights_digest(str(folder)))
    assert len(digests) == 1
    values[place] += 1
    write_safetensors(tmp_path / "a" / "model.safetensors", values)
    assert weights_digest(str(tmp_path / "a")) not in digests
