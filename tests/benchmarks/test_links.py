"""The slow links of the PD benchmarks are as slow as they say."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from benchmarks.pd.bench import ADDRESSES, Link, shaped
from benchmarks.pd.relay import measure_gbit_s

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists() or shutil.which("ip") is None,
    reason="needs root, /dev/net/tun and iproute2",
)


def test_relay_keeps_the_speed() -> None:
    assert 0.15 < measure_gbit_s(0.2, 20_000_000) <= 0.202


@needs_root
def test_tun_link_delays_every_packet() -> None:
    with shaped(Link("", 100, 20.0)):
        began = time.monotonic()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((ADDRESSES[0], 1), timeout=5)
        assert 0.04 <= time.monotonic() - began < 1.0
