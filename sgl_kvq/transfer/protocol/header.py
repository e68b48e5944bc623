"""The block header: 80 bytes for every payload (`docs/wire_format.md`)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import xxhash

from sgl_kvq.errors import ChecksumError, WireError
from sgl_kvq.memory_pool.page_io.span import Buffer, SpanKind

MAGIC = b"KVQB"
WIRE_VERSION = 5
MAX_BLOCK_BYTES = 16 * 2**20
"""Largest payload, before and after the codec; sockets drop a peer that sends more."""

_BODY = struct.Struct("<4sHBBQQQIIHHHHHHIIQ4x")
_CHECKSUM = struct.Struct("<Q")
_HEADER = struct.Struct(_BODY.format + "Q")
HEADER_BYTES = _HEADER.size
MAX_BLOCKS = 32
"""Most blocks in a message."""


class BlockKind(IntEnum):
    """What a payload holds: a kind of span, or SGLang's record of the first token.

    METADATA is the last block of a transfer, so its seq + 1 is their number.
    """

    PAGES = SpanKind.PAGES
    OPEN_ROWS = SpanKind.OPEN_ROWS
    SINK_ROWS = SpanKind.SINK_ROWS
    METADATA = 3


_KINDS = tuple(BlockKind)


class BlockHeader(NamedTuple):
    """What a payload is, where it belongs, and its checksum.

    Args:
        kind: What the payload holds.
        codec: Id of the lossless codec the payload went through.
        room: SGLang's `bootstrap_room`, uint64.
        nonce: Drawn by the decode instance for this transfer, uint64.
        fingerprint: Digest of what both instances agreed on, uint64.
        seq: Number of the block in its transfer, uint32.
        first_page: Position of the first page in the sequence, uint32.
        num_pages: Pages, uint16.
        first_layer: First layer, uint16.
        num_layers: Layers, uint16.
        first_head: First KV head, counted over all ranks, uint16.
        num_heads: KV heads, uint16.
        num_rows: Rows of OPEN_ROWS and SINK_ROWS, uint16.
        raw_bytes: Payload before the codec, uint32.
        wire_bytes: Payload as sent, uint32.
        checksum: xxh3-64 of the payload as sent.
    """

    kind: BlockKind
    codec: int
    room: int
    nonce: int
    fingerprint: int
    seq: int
    first_page: int
    num_pages: int
    first_layer: int
    num_layers: int
    first_head: int
    num_heads: int
    num_rows: int
    raw_bytes: int
    wire_bytes: int
    checksum: int


def pack_header(header: BlockHeader) -> bytes:
    """Lay a header out as `HEADER_BYTES` bytes.

    Raises:
        WireError: a field does not fit its width.
    """
    try:
        body = _BODY.pack(MAGIC, WIRE_VERSION, *header)
    except struct.error as error:
        raise WireError(f"block header: expected fields within their widths, got {error}") from None
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def parse_header(data: Buffer) -> BlockHeader:
    """Read a header from untrusted bytes.

    Raises:
        WireError: wrong length, magic, version, kind or size.
        ChecksumError: a bit of the header flipped on the way.
    """
    if len(data) != HEADER_BYTES:
        raise WireError(f"block header: expected {HEADER_BYTES} bytes, got {len(data)}")
    magic, version, kind, *rest, checksum = _HEADER.unpack(data)
    if magic != MAGIC:
        raise WireError(f"block header: expected magic {MAGIC!r}, got {magic!r}")
    if checksum != xxhash.xxh3_64_intdigest(memoryview(data)[: _BODY.size]):
        raise ChecksumError("block header: checksum does not hold; the block must be sent again")
    if version != WIRE_VERSION:
        raise WireError(
            f"block header: expected wire version {WIRE_VERSION}, got {version}; install the same "
            f"sgl_kvq on both instances"
        )
    if kind >= len(_KINDS):
        raise WireError(f"block header: expected kind 0 to {len(_KINDS) - 1}, got {kind}")
    header = BlockHeader(_KINDS[kind], *rest)
    if header.raw_bytes > MAX_BLOCK_BYTES or header.wire_bytes > MAX_BLOCK_BYTES:
        raise WireError(
            f"block header: expected at most {MAX_BLOCK_BYTES} payload bytes, got "
            f"{header.wire_bytes} sent, {header.raw_bytes} decoded"
        )
    return header


def payload_checksum(frames: Sequence[Buffer]) -> int:
    """xxh3-64 of the frames of a payload, one after the other."""
    if len(frames) == 1:
        return xxhash.xxh3_64_intdigest(frames[0])
    state = xxhash.xxh3_64()
    for frame in frames:
        state.update(frame)
    return state.intdigest()


def check_payload(header: BlockHeader, payload: Buffer) -> None:
    """Make sure that a payload is the one its header announces.

    Raises:
        WireError: another length.
        ChecksumError: other bytes.
    """
    if len(payload) != header.wire_bytes:
        raise WireError(
            f"block {header.seq}: expected {header.wire_bytes} payload bytes, got {len(payload)}"
        )
    if xxhash.xxh3_64_intdigest(payload) != header.checksum:
        raise ChecksumError(f"block {header.seq}: checksum of {len(payload)} bytes does not hold")
