"""The wire decoder and the control messages take any bytes without a crash or a wrong result."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_kvq.errors import ChecksumError, WireError
from sgl_kvq.transfer.protocol import messages
from sgl_kvq.transfer.protocol.header import (
    HEADER_BYTES,
    MAX_BLOCK_BYTES,
    WIRE_VERSION,
    BlockHeader,
    BlockKind,
    check_payload,
    pack_header,
    parse_header,
    payload_checksum,
)
from sgl_kvq.transfer.protocol.messages import (
    Ack,
    Message,
    OtherVersion,
    pack_message,
    parse_message,
)

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


def unsigned(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, 2**bits - 1)


HEADERS = st.builds(
    BlockHeader,
    kind=st.sampled_from(BlockKind),
    codec=unsigned(8),
    room=unsigned(64),
    nonce=unsigned(64),
    fingerprint=unsigned(64),
    seq=unsigned(32),
    first_page=unsigned(32),
    num_pages=unsigned(16),
    first_layer=unsigned(16),
    num_layers=unsigned(16),
    first_head=unsigned(16),
    num_heads=unsigned(16),
    num_rows=unsigned(16),
    raw_bytes=st.integers(0, MAX_BLOCK_BYTES),
    wire_bytes=st.integers(0, MAX_BLOCK_BYTES),
    checksum=unsigned(64),
)
PAIRS = st.lists(unsigned(64), min_size=2, max_size=2)
SEQS = st.lists(unsigned(32), max_size=20)
FINGERPRINTS = st.dictionaries(st.text(max_size=9), st.text(max_size=9) | unsigned(64), max_size=9)
NAMES = st.lists(st.text(max_size=9), max_size=9)
VERSION = st.just(WIRE_VERSION)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(messages.Hello, VERSION, unsigned(64), FINGERPRINTS, NAMES),
    st.builds(messages.Welcome, VERSION, unsigned(64), unsigned(16), unsigned(16)),
    st.builds(messages.Refuse, st.text(max_size=99)),
    st.builds(
        messages.Request,
        *(unsigned(bits) for bits in (64, 64, 32, 32, 16, 16, 16, 32, 64)),
        st.text(max_size=9),
        SEQS,
    ),
    st.builds(messages.Ack, unsigned(64), unsigned(64), SEQS),
    st.builds(messages.Nack, unsigned(64), unsigned(64), SEQS),
    st.builds(messages.Done, unsigned(64), unsigned(64)),
    st.builds(messages.Abort, unsigned(64), unsigned(64), st.text(max_size=99)),
    st.builds(messages.Alive, st.lists(PAIRS, max_size=9)),
)


@given(HEADERS)
def test_header_round_trip(header: BlockHeader) -> None:
    data = pack_header(header)
    assert len(data) == HEADER_BYTES == 80
    assert parse_header(data) == header


@given(HEADERS, st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_of_a_header_is_noticed(header: BlockHeader, bit: int) -> None:
    data = bytearray(pack_header(header))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        parse_header(data)


@given(st.binary(max_size=200))
def test_random_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(WireError):
        parse_header(data)


@given(HEADERS, st.just(WIRE_VERSION) | unsigned(16), st.sampled_from(BlockKind) | unsigned(8))
def test_other_versions_and_kinds_are_refused(header: BlockHeader, version: int, kind: int) -> None:
    import struct

    import xxhash

    body = bytearray(pack_header(header)[:-8])
    struct.pack_into("<HB", body, 4, version, kind)
    data = bytes(body) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(body)))
    if version == WIRE_VERSION and kind <= max(BlockKind):
        assert parse_header(data).kind == kind
        return
    with pytest.raises(WireError, match=r"version|kind"):
        parse_header(data)


def test_oversized_blocks_are_refused() -> None:
    fields = dict.fromkeys(BlockHeader._fields, 0)
    for name in ("raw_bytes", "wire_bytes"):
        too_large = fields | {"kind": BlockKind.PAGES, name: MAX_BLOCK_BYTES + 1}
        with pytest.raises(WireError, match="at most"):
            parse_header(pack_header(BlockHeader(**too_large)))
    with pytest.raises(WireError, match="widths"):
        pack_header(BlockHeader(**(fields | {"kind": BlockKind.PAGES, "room": 2**64})))


@given(st.binary(min_size=1, max_size=300), st.data())
def test_payloads_are_checked(payload: bytes, data: st.DataObject) -> None:
    fields = dict.fromkeys(BlockHeader._fields, 0)
    fields |= {"kind": BlockKind.PAGES, "checksum": payload_checksum([payload])}
    header = BlockHeader(**(fields | {"wire_bytes": len(payload)}))
    check_payload(header, payload)
    cut = data.draw(st.integers(0, len(payload)))
    assert payload_checksum([payload[:cut], payload[cut:]]) == header.checksum
    with pytest.raises(WireError, match="payload bytes"):
        check_payload(header, payload[:-1])
    flipped = bytearray(payload)
    flipped[cut % len(payload)] ^= 1
    with pytest.raises(ChecksumError):
        check_payload(header, flipped)


@given(MESSAGES)
def test_message_round_trip(message: Message) -> None:
    assert parse_message(pack_message(message)) == message


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_random_bytes_are_no_message(data: bytes) -> None:
    with pytest.raises(WireError):
        parse_message(data)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=5)
    | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
)


@settings(max_examples=300)
@given(MESSAGES, st.data())
def test_damaged_messages_are_refused_or_valid(message: Message, data: st.DataObject) -> None:
    """Whatever a field is replaced by, the result is refused or a message in range."""
    fields = msgpack.unpackb(pack_message(message))
    name = data.draw(st.sampled_from(sorted(fields)))
    fields[name] = data.draw(ANYTHING)
    try:
        parsed = parse_message(msgpack.packb(fields))
    except WireError:
        return
    if isinstance(parsed, OtherVersion):
        assert name == "wire_version"
        return
    assert parse_message(pack_message(parsed)) == parsed


@given(MESSAGES, st.data())
def test_truncated_messages_are_refused(message: Message, data: st.DataObject) -> None:
    packed = pack_message(message)
    with pytest.raises(WireError):
        parse_message(packed[: data.draw(st.integers(0, len(packed) - 1))])


def test_long_messages_and_lists_are_refused() -> None:
    with pytest.raises(WireError, match="at most"):
        parse_message(b"\0" * (messages.MAX_MESSAGE_BYTES + 1))
    with pytest.raises(WireError, match=r"Ack\.seqs"):
        pack_message(Ack(1, 1, [0] * (messages.MAX_LIST + 1)))
