"""Exceptions of this package. Caller mistakes in an API are `ValueError` or `TypeError`."""

from __future__ import annotations


class KvqError(RuntimeError):
    """Base of every run-time error that sgl_kvq raises."""


class ConfigError(KvqError, ValueError):
    """An option, model or memory size the user can change; shown as one line at start."""


class HostError(KvqError):
    """SGLang is not what the hooks expect: a name moved, or a hook is not live."""


class PoolExhaustedError(KvqError):
    """No open slot is free although admission should have kept one."""


class SlotNotHeldError(KvqError):
    """16-bit rows of a page were asked for, and the page holds no slot (any more)."""


class SpanError(KvqError, ValueError):
    """Bytes do not have the size of the pages or rows they are written to."""


class TransferError(KvqError):
    """A PD transfer cannot start or go on."""


class WireError(TransferError):
    """Bytes from a peer do not follow the wire format."""


class CodecError(WireError):
    """A payload cannot be decoded; sending it again cannot help."""


class ChecksumError(WireError):
    """A block arrived with other bytes than were sent; sending it again can help."""
