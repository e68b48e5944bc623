"""LZ4 blocks, without a frame: the header of the wire holds the size."""

from __future__ import annotations

from typing_extensions import override

from sgl_kvq.memory_pool.page_io.span import Buffer
from sgl_kvq.transfer.codecs.base import Codec


class Lz4(Codec):
    """LZ4 block format at the default level."""

    id, name = 1, "lz4"
    module, package = "lz4", "lz4"

    @override
    def encode(self, payload: Buffer) -> Buffer:
        import lz4.block  # type: ignore[import-untyped]

        data: bytes = lz4.block.compress(payload, store_size=False)
        return data

    @override
    def decode(self, data: Buffer, raw_bytes: int) -> Buffer:
        import lz4.block

        payload: bytes = lz4.block.decompress(data, uncompressed_size=raw_bytes)
        return payload
