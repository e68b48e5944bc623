"""Everything that reads bytes from a peer, as targets of a fuzzer.

An input is one byte that chooses a target, then the target's bytes. Only `WireError` may come out
(and `SpanError`, of a payload that does not fill its place); a block may change the transfer's own
pages and slots and nothing else.
"""

from __future__ import annotations

import torch

from sgl_kvq.errors import SpanError, WireError
from sgl_kvq.memory_pool.page_io.factory import open_pool
from sgl_kvq.memory_pool.page_io.span import HeadRange
from sgl_kvq.transfer.codecs import registry
from sgl_kvq.transfer.decode import assembly
from sgl_kvq.transfer.decode.sources import Source
from sgl_kvq.transfer.protocol import header as wire
from sgl_kvq.transfer.protocol import messages
from sgl_kvq.transfer.protocol.prompt import Prompt
from sgl_kvq.transfer.runtime.request_state import RequestState
from tests.support.sink_rows import give_sink_rows
from tests.support.transfer_pair import make_pool

FINGERPRINT, NONCE, ROOM = 11, 12, 13
NAMES = wire.BlockHeader._fields
LAYERS = 3
POOL = make_pool(num_pages=12)
ACCESS = open_pool(POOL, HeadRange(0, 4))
PAGES = torch.tensor([3, 5, 7])
POOL.open_slots.acquire(PAGES[-1:])
SINK_ROW = give_sink_rows(POOL, PAGES[:1])


def part() -> assembly.IncomingPart:
    """A fresh transfer of three pages, the last one open."""
    transfer = assembly.IncomingTransfer(
        ROOM,
        NONCE,
        RequestState(lambda reason: None),
        0,
        PAGES.numpy(),
        [],
        Prompt(150, 7, "default"),
        lambda data: None,
    )
    fresh = assembly.IncomingPart(transfer, ACCESS, FINGERPRINT, 1, now=0.0)
    fresh.set_source(Source("tcp://127.0.0.1:1", 1, HeadRange(0, 4)))
    return fresh


def outside() -> list[torch.Tensor]:
    """Everything in the pool that the transfer must not touch."""
    pages = torch.ones(POOL.plan.num_rows + 1, dtype=torch.bool)
    pages[[*PAGES[:-1].tolist(), SINK_ROW]] = False
    parts = []
    for layer in POOL.layers:
        parts.append(layer.pages[pages])
        free = POOL.open_slots._owner <= 0
        parts.append(layer.open_rows[free].view(torch.uint8))
    return parts


UNTOUCHED = [tensor.clone() for tensor in outside()]


def fuzz_blocks(data: bytes) -> None:
    """Blocks whose header is well-formed and checksummed, with fields and payloads from the input.

    A block takes a byte a field, two for the size of its payload, then the payload.
    """
    target = part()
    for _ in range(4):
        values = data[: len(NAMES)].ljust(len(NAMES), b"\0")
        size = int.from_bytes(data[len(NAMES) : len(NAMES) + 2], "little")
        payload, data = data[len(NAMES) + 2 :][:size], data[len(NAMES) + 2 + size :]
        fields = {name: value % 16 for name, value in zip(NAMES, values, strict=True)}
        fields |= {"kind": wire.BlockKind(fields["kind"] % 4), "fingerprint": FINGERPRINT}
        fields |= {"wire_bytes": len(payload), "checksum": wire.payload_checksum([payload])}
        fields |= {"raw_bytes": len(payload)} if fields["codec"] == 0 else {}
        header = wire.parse_header(wire.pack_header(wire.BlockHeader(**fields)))
        try:
            block = target.claim(header, payload)
            if block is None:
                continue
            if not block.done:
                block.run()
            target.record(block)
        except (WireError, SpanError):
            continue
    for now, before in zip(outside(), UNTOUCHED, strict=True):
        assert torch.equal(now, before), "a block was written outside its transfer"


def one_input(data: bytes) -> None:
    """Feed one input to the target its first byte chooses."""
    choice, rest = (data[0] % 4, data[1:]) if data else (0, b"")
    try:
        if choice == 0:
            wire.pack_header(wire.parse_header(rest))
        elif choice == 1:
            message = messages.parse_message(rest)
            if not isinstance(message, messages.OtherVersion):
                messages.pack_message(message)
        elif choice == 2:
            registry.decode_payload(rest[0] % 4 if rest else 0, rest[1:], len(rest))
        else:
            fuzz_blocks(rest)
    except WireError:
        pass


def seeds() -> list[bytes]:
    """A valid header, every message, a payload of every codec, and blocks for the transfer."""
    names = dict.fromkeys(NAMES, 1) | {"kind": wire.BlockKind.PAGES}
    found = [b"\x00" + wire.pack_header(wire.BlockHeader(**names))]
    for message in (
        messages.Hello(wire.WIRE_VERSION, 2, {"format": "hack2", "layers": 3}, ["identity"]),
        messages.Welcome(wire.WIRE_VERSION, 2, 0, 4),
        messages.Refuse("other weights"),
        messages.Request(ROOM, NONCE, 0, 3, 0, 4, 1, 150, 7, "default", [0, 5]),
        messages.Ack(ROOM, NONCE, [1, 2]),
        messages.Nack(ROOM, NONCE, [3]),
        messages.Done(ROOM, NONCE),
        messages.Abort(ROOM, NONCE, "user left"),
        messages.Alive([[ROOM, NONCE]]),
    ):
        found.append(b"\x01" + messages.pack_message(message))
    for codec in registry.all_codecs():
        found.append(bytes([2, codec.id]) + bytes(codec.encode(bytes(100))))
    return [*found, b"\x03" + b"".join(map(block_input, range(LAYERS)))]


def block_input(layer: int) -> bytes:
    """A block of the first page and one layer, as `fuzz_blocks` reads it."""
    fields = dict.fromkeys(NAMES, 0) | {"room": ROOM, "nonce": NONCE, "seq": layer}
    fields |= {"num_pages": 1, "first_layer": layer, "num_layers": 1, "num_heads": 4}
    payload = bytes(POOL.layout.page_bytes)
    return bytes(fields.values()) + len(payload).to_bytes(2, "little") + payload
