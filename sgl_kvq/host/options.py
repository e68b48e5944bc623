"""The options that `--kv-quant` adds to SGLang's `ServerArgs`.

This is imported by every SGLang process, with the option on or off. So it imports nothing of what
the options are about; values are checked when SGLang resolves its arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sgl_kvq.host.names import NS, Arg
from sgl_kvq.host.versions.records import Option, options_of

if TYPE_CHECKING:
    from sgl_kvq.config import KVQuantConfig

PREFIX = "kv_quant_"


def _metavar(name: str) -> dict[str, object]:
    """How the argument of a text option is called in `--help`."""
    return {"action": "store", "action_kwargs": {"metavar": name}}


class QuantOptions:
    """How KV is stored."""

    kv_quant: Annotated[
        str | None,
        Arg(
            help="Store the KV cache in closed 64-token pages of this format (sgl_kvq plugin); "
            "`python -m sgl_kvq formats` lists them. kvq2 and kvq4 answer near bf16 in 2.9 and "
            "4.6 bits, best with --kv-quant-config; hack2 is the smallest; bf16 keeps pages "
            "unquantized.",
            **_metavar("FORMAT"),
        ),
        NS("memory"),
    ] = None
    kv_quant_prefill: Annotated[
        str,
        Arg(
            help="With --kv-quant. exact: fresh tokens attend to each other in 16 bits and to the "
            "cached prefix in codes. quantized: a token attends to every closed page in codes, so "
            "that the result depends on the token sequence alone (not on chunking, batching or "
            "cache hits).",
            **_metavar("{exact,quantized}"),
        ),
        NS("memory"),
    ] = "exact"
    kv_quant_sink_tokens: Annotated[
        int,
        "With --kv-quant: leading tokens of a sequence kept in 16 bits, 0 to 16.",
        NS("memory"),
    ] = 4
    kv_quant_hadamard_block: Annotated[
        int,
        "With --kv-quant: order of the Hadamard blocks of rotated formats, a power of two that "
        "divides head_dim. 0 takes the largest one up to 128.",
        NS("memory"),
    ] = 0
    kv_quant_config: Annotated[
        str | None,
        "With a calibrated format as --kv-quant: file of `python -m sgl_kvq calibrate`.",
        NS("memory"),
    ] = None
    kv_quant_memory_gb: Annotated[
        float | None,
        "With --kv-quant: GiB of KV memory per GPU, open pages and sink rows included, instead of "
        "what --mem-fraction-static leaves.",
        NS("memory"),
    ] = None
    kv_quant_accept_loss: Annotated[
        bool,
        "With --kv-quant: start whatever the format loses on this model, without measuring it.",
        NS("memory"),
    ] = False


class TransferOptions:
    """PD transfer with `--disaggregation-transfer-backend kvq-zmq`."""

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
        str | None,
        "With kvq-zmq, prefill instance: HOST or HOST:PORT that decode instances connect to, "
        "when it is not where this one listens (NAT, containers). PORT is that of tensor-parallel "
        "rank 0; rank r's is the r-th port after it.",
        NS("disagg"),
    ] = None
    kv_quant_transfer_keys: Annotated[
        str | None,
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
            help="With kvq-zmq, prefill instance: lossless codec on top of the page format, such "
            "as lz4 or zstd.",
            **_metavar("CODEC"),
        ),
        NS("disagg"),
    ] = "identity"


OPTIONS: list[Option] = [*options_of(QuantOptions), *options_of(TransferOptions)]


def flag_of(name: str) -> str:
    """Command line flag of a field of `ServerArgs`."""
    return "--" + name.replace("_", "-")


def quant_config(args: Any) -> KVQuantConfig | None:
    """Read the options of the KV cache.

    Args:
        args: `ServerArgs`, ours or SGLang's own.

    Returns:
        None when `--kv-quant` is off.

    Raises:
        ConfigError: a value is out of range.
    """
    name = getattr(args, "kv_quant", None)
    if name is None:
        return None
    from sgl_kvq.config import KVQuantConfig

    return KVQuantConfig(
        format=name,
        prefill=args.kv_quant_prefill,
        sink_tokens=args.kv_quant_sink_tokens,
        hadamard_block=args.kv_quant_hadamard_block,
        memory_gb=args.kv_quant_memory_gb,
        config_file=args.kv_quant_config,
    )
