"""The options of `--disaggregation-transfer-backend kvq-zmq`, validated once."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from sgl_kvq.errors import ConfigError
from sgl_kvq.transfer.codecs.registry import get_codec
from sgl_kvq.transfer.protocol.header import MAX_BLOCK_BYTES

MIN_DEADLINE_S = 4.0
"""A rank says every second what it works on; a connection that is silent is opened again before
the deadline, more than once."""
FLAG = "--kv-quant-transfer-"
"""What the names of the options begin with."""


def default_workers() -> int:
    """Three on a machine with cores to spare: ZeroMQ's and the transfer thread need two."""
    return max(0, min(3, len(os.sched_getaffinity(0)) - 2))


@dataclass(frozen=True)
class TransferConfig:
    """How a rank sends or receives.

    Args:
        host: Address the prefill instance listens on.
        port: Its port, 0 for any.
        advertise: (host, port) told to decode instances; None and 0 mean what was bound.
        keys: Folder of CURVE keys, None for connections without.
        deadline_s: Longest time without a message about a transfer.
        window_bytes: Unacknowledged bytes for one decode instance.
        block_bytes: Size a block is filled up to.
        codec: Name of a wire codec.
        workers: Threads beside the transfer thread that copy and hash; unused with a GPU's pool.

    Raises:
        ConfigError: a value is out of range, or an open address has no keys.
    """

    host: str = "127.0.0.1"
    port: int = 0
    advertise: tuple[str | None, int] = (None, 0)
    keys: Path | None = None
    deadline_s: float = 30.0
    window_bytes: int = 32 * 2**20
    block_bytes: int = 4 * 2**20
    codec: str = "identity"
    workers: int = field(default_factory=default_workers)

    def __post_init__(self) -> None:
        get_codec(self.codec)
        if not MIN_DEADLINE_S <= self.deadline_s <= 3600:
            raise ConfigError(
                f"{FLAG}deadline-s: expected {MIN_DEADLINE_S:g} to 3600 seconds, got "
                f"{self.deadline_s}"
            )
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"{FLAG}port: expected 0 to 65535, got {self.port}")
        if not 4096 <= self.block_bytes <= MAX_BLOCK_BYTES // 2:
            raise ConfigError(
                f"{FLAG}block-kb: expected 4 to {MAX_BLOCK_BYTES // 2048}, "
                f"got {self.block_bytes / 1024:g}"
            )
        if self.window_bytes < self.block_bytes:
            raise ConfigError(
                f"{FLAG}window-mb: expected at least one block ({self.block_bytes / 2**20:g}), "
                f"got {self.window_bytes / 2**20:g}"
            )
        if self.keys is None and not is_loopback(self.host):
            raise ConfigError(
                f"{FLAG}host {self.host}: expected loopback, or {FLAG}keys beside it; make keys "
                f"with: python -m sgl_kvq keys FOLDER"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
