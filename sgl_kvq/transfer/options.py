"""The options of `--disaggregation-transfer-backend kvq-zmq`, validated once."""

from __future__ import annotations

import dataclasses
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Optional  # SGLang's parser reads these annotations at run time

from sgl_kvq.errors import ConfigError
from sgl_kvq.host.names import NS, Arg
from sgl_kvq.transfer.codecs import codec_names, get_codec
from sgl_kvq.transfer.protocol.header import MAX_BLOCK_BYTES
from sgl_kvq.transfer.runtime.workers import default_helpers

TRANSFER_BACKEND = "kvq-zmq"
_FLAG = "--kv-quant-transfer-"


@dataclasses.dataclass
class TransferArgs:
    """Fields that `KvqServerArgs` adds to SGLang's options for PD transfer."""

    kv_quant_transfer_host: Annotated[
        str,
        "With kvq-zmq, prefill instance: address to listen on. Anything but loopback needs "
        "--kv-quant-transfer-keys.",
        NS("disagg"),
    ] = "127.0.0.1"
    kv_quant_transfer_port: Annotated[
        int,
        "With kvq-zmq, prefill instance: port of tensor-parallel rank 0; rank r listens on the "
        "r-th port after it. 0 takes any free one.",
        NS("disagg"),
    ] = 0
    kv_quant_transfer_advertise: Annotated[
        Optional[str],  # noqa: UP045
        "With kvq-zmq, prefill instance: HOST or HOST:PORT that decode instances connect to, "
        "when it is not where this one listens (NAT, containers).",
        NS("disagg"),
    ] = None
    kv_quant_transfer_keys: Annotated[
        Optional[str],  # noqa: UP045
        "With kvq-zmq: folder with CURVE keys, made by `python -m sgl_kvq keys`.",
        NS("disagg"),
    ] = None
    kv_quant_transfer_deadline_s: Annotated[
        float,
        "With kvq-zmq: a transfer whose other side gives no sign of life for so many seconds "
        "fails.",
        NS("disagg"),
    ] = 30.0
    kv_quant_transfer_window_mb: Annotated[
        float,
        "With kvq-zmq, prefill instance: MiB on the way to one decode instance at a time.",
        NS("disagg"),
    ] = 32.0
    kv_quant_transfer_block_kb: Annotated[
        int,
        "With kvq-zmq, prefill instance: KiB a block is filled up to.",
        NS("disagg"),
    ] = 4096
    kv_quant_transfer_codec: Annotated[
        str,
        Arg(
            help="With kvq-zmq, prefill instance: lossless codec on top of the page format.",
            choices=codec_names(),
        ),
        NS("disagg"),
    ] = "identity"


@dataclass(frozen=True)
class TransferConfig:
    """What the user asked for; see `TransferArgs`.

    Args:
        host: Address the prefill instance listens on.
        port: Its port, 0 for any.
        advertise: (host, port) told to decode instances; None and 0 mean what was bound.
        keys: Folder of CURVE keys, None for connections without.
        deadline_s: Longest silence about a transfer.
        window_bytes: Unacknowledged bytes for one decode instance.
        block_bytes: Size a block is filled up to.
        codec: Name of a wire codec.
        helpers: Threads beside the transfer thread that copy and hash; a GPU's pool takes none.

    Raises:
        ConfigError: a value is out of range, or an open address has no keys.
    """

    host: str = "127.0.0.1"
    port: int = 0
    advertise: tuple[str | None, int] = (None, 0)
    keys: Path | None = None
    deadline_s: float = 30.0
    window_bytes: int = 32 * 2**20
    block_bytes: int = 4 * 2**20
    codec: str = "identity"
    helpers: int = field(default_factory=default_helpers)

    def __post_init__(self) -> None:
        get_codec(self.codec)
        if not 1.0 <= self.deadline_s <= 3600:
            raise ConfigError(
                f"{_FLAG}deadline-s: expected 1 to 3600 seconds, got {self.deadline_s}"
            )
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"{_FLAG}port: expected 0 to 65535, got {self.port}")
        if not 4096 <= self.block_bytes <= MAX_BLOCK_BYTES // 2:
            raise ConfigError(
                f"{_FLAG}block-kb: expected 4 to {MAX_BLOCK_BYTES // 2048}, "
                f"got {self.block_bytes / 1024:g}"
            )
        if self.window_bytes < self.block_bytes:
            raise ConfigError(
                f"{_FLAG}window-mb: expected at least one block ({self.block_bytes / 2**20:g}), "
                f"got {self.window_bytes / 2**20:g}"
            )
        if self.keys is None and not is_loopback(self.host):
            raise ConfigError(
                f"{_FLAG}host {self.host}: expected loopback, or {_FLAG}keys beside it; make keys "
                f"with: python -m sgl_kvq keys FOLDER"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def transfer_config(args: Any) -> TransferConfig:
    """Read the options.

    Args:
        args: `KvqServerArgs`.

    Raises:
        ConfigError: a value is out of range.
    """
    return TransferConfig(
        host=args.kv_quant_transfer_host,
        port=args.kv_quant_transfer_port,
        advertise=_parse_address(args.kv_quant_transfer_advertise),
        keys=Path(args.kv_quant_transfer_keys) if args.kv_quant_transfer_keys else None,
        deadline_s=args.kv_quant_transfer_deadline_s,
        window_bytes=int(args.kv_quant_transfer_window_mb * 2**20),
        block_bytes=args.kv_quant_transfer_block_kb * 1024,
        codec=args.kv_quant_transfer_codec,
    )


def _parse_address(text: str | None) -> tuple[str | None, int]:
    if text is None:
        return None, 0
    host, _, port = text.rpartition(":") if ":" in text else (text, "", "0")
    if not host or not port.isdigit():
        raise ConfigError(f"{_FLAG}advertise: expected HOST or HOST:PORT, got {text!r}")
    return host.strip("[]"), int(port)
