"""The `--kv-quant-transfer-*` options of SGLang's `ServerArgs`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Optional  # SGLang's parser reads these annotations at run time

from sgl_kvq.errors import ConfigError
from sgl_kvq.host.names import NS, Arg
from sgl_kvq.transfer.codecs.registry import codec_names
from sgl_kvq.transfer.options import FLAG, TransferConfig


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
        raise ConfigError(f"{FLAG}advertise: expected HOST or HOST:PORT, got {text!r}")
    return host.strip("[]"), int(port)
