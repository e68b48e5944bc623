"""All codecs by name and by id.

A package of a third party registers its codecs by an entry point of the group `sgl_kvq.codecs`
that names a `Codec` class; both instances need it.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from sgl_kvq.errors import CodecError, ConfigError
from sgl_kvq.memory_pool.page_io.span import Buffer
from sgl_kvq.transfer.codecs.base import Codec
from sgl_kvq.transfer.codecs.identity import Identity
from sgl_kvq.transfer.codecs.lz4 import Lz4
from sgl_kvq.transfer.codecs.zstd import Zstd

ENTRY_POINTS = "sgl_kvq.codecs"
_BY_ID: dict[int, Codec] = {}


def register(codec: Codec) -> None:
    """Add a codec, on both sides of the wire under the same id and name.

    Raises:
        ValueError: the id is out of range, or id or name are taken.
    """
    if not 0 <= codec.id < 256:
        raise ValueError(f"codec {codec.name!r}: expected an id of 0 to 255, got {codec.id}")
    for other in _BY_ID.values():
        if codec.id == other.id or codec.name == other.name:
            raise ValueError(
                f"codec {codec.name!r} ({codec.id}): {other.name!r} ({other.id}) is registered"
            )
    _BY_ID[codec.id] = codec


for _codec in (Identity(), Lz4(), Zstd()):
    register(_codec)


@cache
def _load_entry_points() -> None:
    for entry_point in entry_points(group=ENTRY_POINTS):
        register(entry_point.load()())


def all_codecs() -> list[Codec]:
    """All codecs, installed or not."""
    _load_entry_points()
    return list(_BY_ID.values())


def codec_names() -> list[str]:
    """Names of all codecs."""
    return [codec.name for codec in all_codecs()]


def decodable() -> list[str]:
    """Names of the codecs that this process can undo."""
    return [codec.name for codec in all_codecs() if codec.is_installed]


def get_codec(name: str) -> Codec:
    """Look a codec up and make sure that its library is there.

    Raises:
        ConfigError: no codec has this name, or its library is missing.
    """
    codec = next((codec for codec in all_codecs() if codec.name == name), None)
    if codec is None:
        raise ConfigError(
            f"--kv-quant-transfer-codec: expected one of {', '.join(codec_names())}, got {name!r}"
        )
    if not codec.is_installed:
        raise ConfigError(
            f"--kv-quant-transfer-codec {name}: expected package {codec.package}, which is not "
            f"installed; run: pip install {codec.package}"
        )
    return codec


def decode_payload(codec_id: int, payload: Buffer, raw_bytes: int) -> Buffer:
    """Undo a codec; the size is known before, so a small payload cannot fill the memory.

    Args:
        codec_id: From the header.
        payload: As received, checksum verified.
        raw_bytes: Size that the header announces.

    Raises:
        CodecError: unknown codec, library missing, damaged data, or another size.
    """
    codec = _BY_ID.get(codec_id)
    if codec is None:
        raise CodecError(f"codec: expected an id of {sorted(_BY_ID)}, got {codec_id}")
    try:
        raw = codec.decode(payload, raw_bytes)
    except Exception as error:
        raise CodecError(f"codec {codec.name}: payload cannot be decoded ({error})") from error
    if len(raw) != raw_bytes:
        raise CodecError(f"codec {codec.name}: expected {raw_bytes} bytes, got {len(raw)}")
    return raw
