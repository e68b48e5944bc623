"""A wire codec whose library the decode side may lack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sgl_kvq.memory_pool.page_io.span import Buffer
from sgl_kvq.transfer.codecs import registry
from sgl_kvq.transfer.codecs.base import Codec

_SUFFIX = b"wrapped"


class Wrapped(Codec):
    """Adds a few bytes.

    Attributes:
        installed: What the handshake is told.
        broken: Whether nothing can be undone.
    """

    id, name = 250, "wrapped"
    installed, broken = True, False

    @property
    def is_installed(self) -> bool:
        return self.installed

    def encode(self, payload: Buffer) -> Buffer:
        return bytes(payload) + _SUFFIX

    def decode(self, data: Buffer, raw_bytes: int) -> Buffer:
        if self.broken:
            raise ImportError("no module named wrapped")
        return memoryview(data)[: -len(_SUFFIX)]


@contextmanager
def registered(broken: bool) -> Iterator[Wrapped]:
    """Make the codec known for one seed."""
    codec = registry._BY_ID[Wrapped.id] = Wrapped()
    codec.broken = broken
    try:
        yield codec
    finally:
        del registry._BY_ID[Wrapped.id]
