"""Control messages: small msgpack maps, checked field by field before anything looks at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import msgpack  # type: ignore[import-untyped]

from sgl_kvq.errors import WireError
from sgl_kvq.transfer.protocol.header import WIRE_VERSION

MAX_MESSAGE_BYTES = 96 * 2**10
MAX_LIST = 16384
MAX_TEXT = 4096
ALIVE_ROOMS = 1024
"""Pairs in one Alive: 20 bytes each at most."""

Check = Callable[[Any], bool]
Fingerprint = dict[str, str | int]


def _unsigned(bits: int) -> Check:
    return lambda value: type(value) is int and 0 <= value < 2**bits


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= MAX_TEXT


def _is_list_of(check: Check) -> Check:
    return lambda value: (
        type(value) is list and len(value) <= MAX_LIST and all(check(item) for item in value)
    )


def _is_fingerprint(value: Any) -> bool:
    return (
        type(value) is dict
        and len(value) <= 64
        and all(_is_text(key) for key in value)
        and all(_is_text(item) or _unsigned(64)(item) for item in value.values())
    )


def _is_pair(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and all(map(_unsigned(64), value))


U16 = Annotated[int, _unsigned(16)]
U32 = Annotated[int, _unsigned(32)]
U64 = Annotated[int, _unsigned(64)]
Text = Annotated[str, _is_text]
Names = Annotated[list[str], _is_list_of(_is_text)]
Seqs = Annotated[list[int], _is_list_of(_unsigned(32))]


@dataclass(frozen=True)
class Hello:
    """Decode to prefill, first on a connection: who is there, and what must be equal.

    `instance` is random per process, so that a restart is noticed. `codecs` names the codecs that
    this side can undo.
    """

    wire_version: U16
    instance: U64
    fingerprint: Annotated[Fingerprint, _is_fingerprint]
    codecs: Names


@dataclass(frozen=True)
class Welcome:
    """Prefill's answer: accepted, and which KV heads this rank holds."""

    wire_version: U16
    instance: U64
    first_head: U16
    num_heads: U16


@dataclass(frozen=True)
class Refuse:
    """Prefill's other answer, with both sides' values in the reason."""

    reason: Text


@dataclass(frozen=True)
class Request:
    """Decode has pages ready and wants a transfer; sent again after a lost connection.

    `prefix_pages` leading pages are already there. `peers` decode ranks send this prefill rank a
    request for the room. `num_tokens` and `token_digest` are those of the whole prompt, `weights`
    is the version of those that serve it (`Prompt`).
    `have` lists blocks that need not be sent again.
    """

    room: U64
    nonce: U64
    prefix_pages: U32
    num_pages: U32
    first_head: U16
    num_heads: U16
    peers: U16
    num_tokens: U32
    token_digest: U64
    weights: Text
    have: Seqs


@dataclass(frozen=True)
class Ack:
    """These blocks are verified and in the pool."""

    room: U64
    nonce: U64
    seqs: Seqs


@dataclass(frozen=True)
class Nack:
    """These blocks arrived damaged; send them again."""

    room: U64
    nonce: U64
    seqs: Seqs


@dataclass(frozen=True)
class Done:
    """All blocks of this transfer are verified and in the pool."""

    room: U64
    nonce: U64


@dataclass(frozen=True)
class Abort:
    """The sender of this message has given the transfer up."""

    room: U64
    nonce: U64
    reason: Text


@dataclass(frozen=True)
class Alive:
    """Sent every second: (room, nonce) pairs that its sender still works on.

    Further messages name further pairs; a pair that none names is not over.
    """

    rooms: Annotated[list[list[int]], _is_list_of(_is_pair)]


@dataclass(frozen=True)
class OtherVersion:
    """A Hello or Welcome of another wire version: nothing else of it can be read."""

    wire_version: U16


Message = Hello | Welcome | Refuse | Request | Ack | Nack | Done | Abort | Alive
_TYPES: dict[str, type[Any]] = {
    cls.__name__.lower(): cls
    for cls in (Hello, Welcome, Refuse, Request, Ack, Nack, Done, Abort, Alive)
}
_CHECKS: dict[type[Any], dict[str, Check]] = {
    cls: {
        name: hint.__metadata__[0]
        for name, hint in get_type_hints(cls, include_extras=True).items()
    }
    for cls in _TYPES.values()
}


def alive_messages(rooms: list[list[int]]) -> list[Alive]:
    """All (room, nonce) pairs in as many messages as they need; an empty one for none."""
    return [
        Alive(rooms[first : first + ALIVE_ROOMS])
        for first in range(0, max(1, len(rooms)), ALIVE_ROOMS)
    ]


def pack_message(message: Message) -> bytes:
    """Encode a message.

    Raises:
        WireError: a field is out of range, so the other side would refuse it.
    """
    cls = type(message)
    fields = {name: getattr(message, name) for name in _CHECKS[cls]}
    _check_fields(cls, fields)
    return bytes(msgpack.packb({"type": cls.__name__.lower(), **fields}))


def parse_message(data: bytes | memoryview) -> Message | OtherVersion:
    """Decode a message from untrusted bytes.

    Raises:
        WireError: too long, not msgpack, an unknown type, or a field missing, unknown or out of
            range.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"message: expected at most {MAX_MESSAGE_BYTES} bytes, got {len(data)}")
    try:
        fields = msgpack.unpackb(data, raw=False, strict_map_key=True, use_list=True)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise WireError(f"message: expected msgpack, got {type(error).__name__}") from None
    if type(fields) is not dict:
        raise WireError(f"message: expected a map, got {type(fields).__name__}")
    name = fields.pop("type", None)
    cls = _TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise WireError(f"message: expected a type of {', '.join(_TYPES)}, got {str(name)[:40]!r}")
    version = fields.get("wire_version", WIRE_VERSION)
    if cls in (Hello, Welcome) and version != WIRE_VERSION and _unsigned(16)(version):
        return OtherVersion(version)
    _check_fields(cls, fields)
    message: Message = cls(**fields)
    return message


def _check_fields(cls: type[Any], fields: dict[Any, Any]) -> None:
    checks = _CHECKS[cls]
    if set(fields) != set(checks):
        raise WireError(
            f"{cls.__name__}: expected fields {', '.join(checks)}, got "
            f"{', '.join(sorted(str(name)[:40] for name in fields)[:16])}"
        )
    for name, check in checks.items():
        if not check(fields[name]):
            raise WireError(f"{cls.__name__}.{name}: {str(fields[name])[:80]!r} is out of range")
