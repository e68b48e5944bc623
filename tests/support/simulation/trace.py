"""Messages in a line of the trace."""

from __future__ import annotations

from sgl_kvq.errors import KvqError
from sgl_kvq.transfer.protocol.header import HEADER_BYTES, parse_header
from sgl_kvq.transfer.protocol.messages import parse_message


def describe(frames: list[bytes]) -> str:
    """Type and main fields of a message, or of its blocks."""
    try:
        if frames[0] == b"C":
            return _message(frames[1])
        return "blocks " + "; ".join(
            _block(frames[1][start : start + HEADER_BYTES])
            for start in range(0, len(frames[1]), HEADER_BYTES)
        )
    except KvqError as error:
        return f"damaged ({error})"


def _message(data: bytes) -> str:
    message = parse_message(data)
    fields = {
        name: value
        for name, value in vars(message).items()
        if name in ("room", "seqs", "have", "reason", "instance", "num_pages", "first_head")
    }
    rooms = getattr(message, "rooms", None)
    if rooms is not None:
        fields["rooms"] = [room for room, _ in rooms] if len(rooms) < 9 else len(rooms)
    return f"{type(message).__name__} " + " ".join(f"{k}={v}" for k, v in fields.items())


def _block(data: bytes) -> str:
    header = parse_header(data)
    return f"{header.room}/{header.seq} {header.kind.name.lower()} {header.wire_bytes}"
