"""Reads the `--kv-quant-transfer-*` options of SGLang's `ServerArgs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgl_kvq.errors import ConfigError
from sgl_kvq.transfer.options import FLAG, TransferConfig


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
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise ConfigError(
            f"{FLAG}advertise: expected HOST or HOST:PORT, a port up to 65535, got {text!r}"
        )
    return host.strip("[]"), int(port)
