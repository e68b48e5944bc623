"""Lossless codecs of payloads. A codec is one entry here; the header says which one was used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sgl_kvq.errors import ConfigError, WireError
from sgl_kvq.transfer.protocol.header import Buffer


@dataclass(frozen=True)
class WireCodec:
    """A lossless codec.

    Args:
        id: Number in the block header, 0 to 255.
        name: Value of `--kv-quant-transfer-codec`.
        encode: Payload to bytes as sent.
        decode: Bytes as sent and the expected size to the payload; raises on damage or excess.
        package: Distribution it needs, None for the standard installation.
    """

    id: int
    name: str
    encode: Callable[[Buffer], Buffer]
    decode: Callable[[Buffer, int], Buffer]
    package: str | None = None


def _library(module: str) -> Any:
    return importlib.import_module(module)


def _decode_lz4(data: Buffer, size: int) -> Buffer:
    return _library("lz4.block").decompress(data, uncompressed_size=size)


def _encode_lz4(data: Buffer) -> Buffer:
    return _library("lz4.block").compress(data, store_size=False)


def _encode_zstd(data: Buffer) -> Buffer:
    return _library("zstandard").ZstdCompressor(level=1).compress(data)


def _decode_zstd(data: Buffer, size: int) -> Buffer:
    library = _library("zstandard")
    if library.frame_content_size(data) != size:
        raise ValueError("another size")
    return library.ZstdDecompressor().decompress(data, max_output_size=size)


CODECS = (
    WireCodec(0, "identity", lambda data: data, lambda data, size: data),
    WireCodec(1, "lz4", _encode_lz4, _decode_lz4, "lz4"),
    WireCodec(2, "zstd", _encode_zstd, _decode_zstd, "zstandard"),
)
_BY_ID = {codec.id: codec for codec in CODECS}
_BY_NAME = {codec.name: codec for codec in CODECS}


def codec_names() -> list[str]:
    """Names of all codecs."""
    return list(_BY_NAME)


def get_codec(name: str) -> WireCodec:
    """Look a codec up and make sure that its library is there.

    Raises:
        ConfigError: no codec has this name, or its library is missing.
    """
    codec = _BY_NAME.get(name)
    if codec is None:
        raise ConfigError(
            f"--kv-quant-transfer-codec: expected one of {', '.join(_BY_NAME)}, got {name!r}"
        )
    if codec.package is not None:
        try:
            codec.encode(b"")
        except ImportError:
            raise ConfigError(
                f"--kv-quant-transfer-codec {name}: expected package {codec.package}, which is not "
                f"installed; run: pip install {codec.package}"
            ) from None
    return codec


def decode_payload(codec_id: int, payload: Buffer, raw_bytes: int) -> Buffer:
    """Undo a codec; the size is known before, so a small payload cannot fill the memory.

    Args:
        codec_id: From the header.
        payload: As received, checksum verified.
        raw_bytes: Size the header announces.

    Raises:
        WireError: unknown codec, library missing, damaged data, or another size.
    """
    codec = _BY_ID.get(codec_id)
    if codec is None:
        raise WireError(f"codec: expected id 0 to {len(CODECS) - 1}, got {codec_id}")
    try:
        raw = codec.decode(payload, raw_bytes)
    except Exception as error:
        raise WireError(f"codec {codec.name}: payload cannot be decoded ({error})") from error
    if len(raw) != raw_bytes:
        raise WireError(f"codec {codec.name}: expected {raw_bytes} bytes, got {len(raw)}")
    return raw
