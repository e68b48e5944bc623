"""The options of `--kv-quant`, validated once."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.registry import calibrated_formats, get_format

MIN_PAGES = 4
"""Smallest pool worth starting a server for."""

MAX_SINK_TOKENS = 16

PREFILL_MODES = ("exact", "quantized")


@dataclass(frozen=True)
class KVQuantConfig:
    """The validated options.

    Args:
        format: Name of a registered format, see `sgl_kvq.formats.registry`.
        prefill: "exact": fresh tokens attend to each other in 16 bits and to the cached prefix in
            codes. "quantized": a token attends to every closed page in codes, so the result is a
            function of the token sequence alone.
        sink_tokens: Leading tokens of a sequence kept in 16 bits once their page closes, 0 to 16.
        hadamard_block: Order of the Hadamard blocks of rotated formats, a power of two that
            divides head_dim; 0 takes the largest one up to 128.
        memory_gb: KV memory in GiB, open pages and sink rows included; None takes what SGLang's
            `--mem-fraction-static` leaves.
        config_file: File of `python -m sgl_kvq calibrate`, for calibrated formats; None takes their
            default basis.

    Raises:
        ConfigError: a value is out of range or no format has this name.
    """

    format: str
    prefill: str = "exact"
    sink_tokens: int = 4
    hadamard_block: int = 0
    memory_gb: float | None = None
    config_file: str | None = None

    def __post_init__(self) -> None:
        if get_format(self.format).calibration is None and self.config_file is not None:
            known = " or ".join(found.name for found in calibrated_formats())
            raise ConfigError(
                f"--kv-quant-config: expected {known} as --kv-quant, got {self.format}; "
                f"drop --kv-quant-config"
            )
        if self.prefill not in PREFILL_MODES:
            raise ConfigError(
                f"--kv-quant-prefill: expected one of {', '.join(PREFILL_MODES)}, "
                f"got {self.prefill!r}"
            )
        if not 0 <= self.sink_tokens <= MAX_SINK_TOKENS:
            raise ConfigError(
                f"--kv-quant-sink-tokens: expected 0 to {MAX_SINK_TOKENS}, got {self.sink_tokens}"
            )
        block = self.hadamard_block
        if block < 0 or block & (block - 1):
            raise ConfigError(
                f"--kv-quant-hadamard-block: expected a power of two, or 0 for the default, "
                f"got {block}"
            )
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise ConfigError(
                f"--kv-quant-memory-gb: expected a positive number, got {self.memory_gb}"
            )

    @property
    def quantized_prefill(self) -> bool:
        """Whether a token attends to pages closed in its own chunk in codes."""
        return self.prefill == "quantized"
