"""SGLang's `ServerArgs` with the `--kv-quant` options."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any, Optional  # SGLang's parser reads these annotations at run time

from sgl_kvq.config import PREFILL_MODES, KVQuantConfig
from sgl_kvq.errors import ConfigError, KvqError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.registry import format_names, formats_help
from sgl_kvq.host.names import BACKEND, NS, TRANSFER_BACKEND, Arg, ServerArgs, check_version
from sgl_kvq.host.transfer_args import TransferArgs, transfer_config


@dataclasses.dataclass
class KvqServerArgs(TransferArgs, ServerArgs):
    """Server options; replaces `sglang.srt.server_args.ServerArgs` in the whole process."""

    kv_quant: Annotated[
        Optional[str],  # noqa: UP045
        Arg(
            help="Store the KV cache in closed 64-token pages of this format (sgl_kvq plugin). "
            f"{formats_help()} `python -m sgl_kvq formats` has their sizes.",
            choices=format_names(),
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
            choices=list(PREFILL_MODES),
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
        Optional[str],  # noqa: UP045
        "With a calibrated format as --kv-quant: file of `python -m sgl_kvq calibrate`.",
        NS("memory"),
    ] = None
    kv_quant_memory_gb: Annotated[
        Optional[float],  # noqa: UP045
        "With --kv-quant: GiB of KV memory per GPU, open pages and sink rows included, instead of "
        "what --mem-fraction-static leaves.",
        NS("memory"),
    ] = None

    def __post_init__(self) -> None:
        config = quant_config(self)
        if config is None:
            if self.disaggregation_transfer_backend == TRANSFER_BACKEND:
                raise ConfigError(
                    f"--disaggregation-transfer-backend {TRANSFER_BACKEND}: expected --kv-quant "
                    f"FORMAT beside it (bf16 for unquantized pages); add it"
                )
            super().__post_init__()
            return
        # Imported here: with the option off nothing of this package but the plugin is loaded.
        from sgl_kvq.host.model_files import check_model_files
        from sgl_kvq.host.support import (
            check_device,
            check_model,
            check_options,
            choose_graphs,
        )

        check_version()
        check_device()
        check_options(self)
        transfer_config(self)
        check_model_files(self.model_path)
        self.page_size = PAGE_SIZE
        self.attention_backend = BACKEND
        choose_graphs(self)
        try:
            super().__post_init__()
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"--model-path {self.model_path}: {reason}") from error
        if self.model_path.lower() in ("none", "dummy"):
            return
        model_config = self.get_model_config()
        check_model(model_config)
        from sgl_kvq.host.sizing import check_memory

        check_memory(self, model_config, config)
        from sgl_kvq.host.rank_basis import model_bases

        model_bases(config, model_config)

    @classmethod
    def from_cli_args(cls, args: Any) -> KvqServerArgs:
        """Build the options of a command line; end it with one line if they do not fit."""
        try:
            return super().from_cli_args(args)
        except KvqError as error:
            sys.exit(f"error: {error}")


def quant_config(args: Any) -> KVQuantConfig | None:
    """Read the `--kv-quant` options.

    Args:
        args: `ServerArgs`, ours or SGLang's own.

    Returns:
        None when `--kv-quant` is off.

    Raises:
        ConfigError: a value is out of range, or an option needs `--kv-quant`.
    """
    name = getattr(args, "kv_quant", None)
    if name is not None:
        return KVQuantConfig(
            format=name,
            prefill=args.kv_quant_prefill,
            sink_tokens=args.kv_quant_sink_tokens,
            hadamard_block=args.kv_quant_hadamard_block,
            memory_gb=args.kv_quant_memory_gb,
            config_file=args.kv_quant_config,
        )
    for field in dataclasses.fields(KvqServerArgs):
        if field.name.startswith("kv_quant_") and getattr(args, field.name, None) not in (
            None,
            field.default,
        ):
            flag = "--" + field.name.replace("_", "-")
            raise ConfigError(
                f"{flag}: expected --kv-quant FORMAT beside it; add it or drop {flag}"
            )
    return None
