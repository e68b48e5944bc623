"""Payloads as they are."""

from __future__ import annotations

from typing_extensions import override

from sgl_kvq.memory_pool.page_io.span import Buffer
from sgl_kvq.transfer.codecs.base import Codec


class Identity(Codec):
    """No compression and no copy."""

    id, name = 0, "identity"

    @override
    def encode(self, payload: Buffer) -> Buffer:
        return payload

    @override
    def decode(self, data: Buffer, raw_bytes: int) -> Buffer:
        return data
