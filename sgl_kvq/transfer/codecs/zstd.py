"""Zstandard frames."""

from __future__ import annotations

from typing_extensions import override

from sgl_kvq.memory_pool.page_io.span import Buffer
from sgl_kvq.transfer.codecs.base import Codec


class Zstd(Codec):
    """Zstandard at level 1; a frame carries its size."""

    id, name = 2, "zstd"
    module, package = "zstandard", "zstandard"

    @override
    def encode(self, payload: Buffer) -> Buffer:
        import zstandard

        return zstandard.ZstdCompressor(level=1).compress(payload)

    @override
    def decode(self, data: Buffer, raw_bytes: int) -> Buffer:
        import zstandard

        if (size := zstandard.frame_content_size(data)) != raw_bytes:
            raise ValueError(f"a frame of {size} bytes")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=raw_bytes)
