"""How the layers of a model are stored: the format of each, and the basis of K and V.

Rows are transformed before they are stored, in 16 bits as in codes; queries are transformed so that
scores stay, and outputs are transformed back. Pages, kernels and transfers see plain rows.

A basis is calibrated (`python -m sgl_kvq calibrate`) or the default of `default_basis`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import LayerBits, QuantFormat, hadamard_order
from sgl_kvq.formats.hadamard import rotate
from sgl_kvq.formats.registry import get_format

FILE_VERSION = 1


@dataclass(frozen=True)
class BitAllocation:
    """Bits of each layer, as `calibrate --budget-bits` chose them.

    Args:
        format: `--kv-quant` that they go with.
        layers: Bits of each layer.
    """

    format: str
    layers: list[LayerBits]


@dataclass(frozen=True)
class LayerBasis:
    """Matrices of one layer; a row vector is multiplied from the right.

    Args:
        k: float32 [num_kv_heads, head_dim, head_dim], to the basis K is stored in; its first
            channels are those that a format with outlier channels gives more bits.
        v: Like k, to the basis V is stored in.
    """

    k: torch.Tensor
    v: torch.Tensor

    @property
    def q(self) -> torch.Tensor:
        """Matrices Q of queries: q Q (k K)^T = q k^T."""
        return torch.linalg.inv(self.k.double()).transpose(1, 2).float()

    @property
    def out(self) -> torch.Tensor:
        """Matrices that bring outputs back from the basis of V."""
        return torch.linalg.inv(self.v.double()).float()

    def heads(self, start: int, stop: int) -> LayerBasis:
        """Matrices of a rank's KV heads."""
        return LayerBasis(self.k[start:stop], self.v[start:stop])


def change_basis(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Multiply each head by the matrix of its KV head, in float32 (float64 for float64 x).

    Args:
        x: [tokens, heads, head_dim]; query heads that share a KV head are adjacent.
        matrices: float32 [num_kv_heads, head_dim, head_dim].

    Returns:
        A new tensor like x.
    """
    num_kv_heads, head_dim, _ = matrices.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    by_head = x.to(dtype).unflatten(1, (num_kv_heads, -1)).transpose(0, 1)  # [H, tokens, G, D]
    changed = torch.bmm(by_head.reshape(num_kv_heads, -1, head_dim), matrices.to(dtype))
    return changed.view(by_head.shape).transpose(0, 1).reshape(x.shape).to(x.dtype)


def default_basis(head_dim: int, num_kv_heads: int) -> LayerBasis:
    """Basis without calibration.

    K: channels that RoPE turns slowest first. Errors in them add up over distances and queries
    weigh them most (SmolLM2-135M: extra bits for the slowest quarter leave 0.05 nats of KL, for any
    other quarter 0.12). V: the Hadamard matrix, which spreads outliers over all channels.

    Args:
        head_dim: Channels of a head, RoPE's pairs being `i` and `i + head_dim / 2`.
        num_kv_heads: KV heads.
    """
    slowest_first = torch.arange(head_dim).view(2, -1).flip(1).T.flatten()
    eye = torch.eye(head_dim)
    k = eye[:, slowest_first]
    v = rotate(eye, hadamard_order(head_dim))
    return LayerBasis(k.repeat(num_kv_heads, 1, 1), v.repeat(num_kv_heads, 1, 1))


def save_bases(
    path: Path, bases: list[LayerBasis], about: dict[str, str], bits: BitAllocation | None = None
) -> None:
    """Write calibrated bases as a safetensors file.

    Args:
        path: The file.
        bases: One a layer.
        about: Notes on the origin of the bases, kept in the file's header.
        bits: Bits to use instead of those that `--kv-quant` names.
    """
    tensors = {name: torch.stack([getattr(basis, name) for basis in bases]) for name in ("k", "v")}
    header: dict[str, Any] = {"version": FILE_VERSION, **about}
    if bits is not None:
        header["chosen"] = asdict(bits)
    save_file(tensors, path, metadata={"sgl_kvq": json.dumps(header)})


@dataclass(frozen=True, eq=False)
class Calibration:
    """How a model's layers are stored.

    Args:
        formats: Format of each layer's pages.
        bases: Basis of each layer; empty if the format stores heads as they are.
        digest: XXH3 digest of the file it came from, 16 hexadecimal digits; "unset" without one.
    """

    formats: tuple[QuantFormat, ...]
    bases: tuple[LayerBasis, ...]
    digest: str


def load_calibration(
    name: str, config_file: str | None, num_layers: int, num_kv_heads: int, head_dim: int
) -> Calibration:
    """Say how a model is stored: by a file of `calibrate`, or by the format alone.

    A file is read once, however many parts of a process ask.

    Args:
        name: `--kv-quant`.
        config_file: `--kv-quant-config`.
        num_layers: Layers of the model.
        num_kv_heads: KV heads of the model, all ranks.
        head_dim: Channels of a head.

    Raises:
        ConfigError: no such format, not such a file, or one of another format or model.
    """
    named = get_format(name)
    if named.calibration is None:
        return Calibration((named,) * num_layers, (), "unset")
    if config_file is None:
        bases = (default_basis(head_dim, num_kv_heads),) * num_layers
        return Calibration((named,) * num_layers, bases, "unset")
    try:
        state = Path(config_file).stat()
    except OSError as error:
        raise _unreadable(config_file, error) from error
    changed = (state.st_mtime_ns, state.st_size)
    return _load_file(named, config_file, changed, (num_layers, num_kv_heads, head_dim))


@lru_cache(maxsize=1)
def _load_file(
    named: QuantFormat, path: str, _changed: tuple[int, int], geometry: tuple[int, int, int]
) -> Calibration:
    """Read a file of `save_bases`; `_changed` tells versions of it apart."""
    num_layers, num_kv_heads, head_dim = geometry
    about, tensors, digest = _read_file(path)
    shape = [num_layers, num_kv_heads, head_dim, head_dim]
    found = list(tensors["k"].shape)
    if not found == list(tensors["v"].shape) == shape:
        raise ConfigError(
            f"--kv-quant-config: expected {num_layers} layers of {num_kv_heads} KV heads of "
            f"{head_dim} channels, {path} has {found}; calibrate this model"
        )
    bases = tuple(LayerBasis(k.float(), v.float()) for k, v in zip(*tensors.values(), strict=True))
    return Calibration(_layer_formats(named, about, path, num_layers), bases, digest)


def _layer_formats(
    named: QuantFormat, about: dict[str, Any], path: str, num_layers: int
) -> tuple[QuantFormat, ...]:
    """Format of each layer: that of `--kv-quant`, with the bits that a file chose."""
    name, method, chosen = named.name, named.calibration, about.get("chosen")
    assert method is not None
    if chosen is None:
        return (named,) * num_layers
    if chosen.get("format") != name:
        raise ConfigError(
            f"--kv-quant-config: {path} chose bits for --kv-quant {chosen.get('format')}, "
            f"got {name}; pass the former, or calibrate without --budget-bits"
        )
    try:
        layers = [LayerBits(*bits) for bits in chosen["layers"]]
    except (KeyError, TypeError):
        layers = []
    if len(layers) != num_layers or not set(layers) <= set(method.allowed):
        raise ConfigError(
            f"--kv-quant-config: expected for each of {num_layers} layers bits of K, outlier "
            f"sixteenths and bits of V that {name} can have, {path} has {chosen.get('layers')}; "
            f"calibrate this model"
        )
    return tuple(method.with_bits(name, bits) for bits in layers)


def _read_file(path: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
    """Header, tensors "k" and "v", and digest of a file of `save_bases`."""
    try:
        digest = xxhash.xxh3_64_hexdigest(Path(path).read_bytes())
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("sgl_kvq", "{}"))
            tensors = {name: file.get_tensor(name) for name in ("k", "v")}
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from error
    if about.get("version") != FILE_VERSION:
        raise ConfigError(
            f"--kv-quant-config: expected version {FILE_VERSION}, {path} has "
            f"{about.get('version')}; calibrate this model"
        )
    return about, tensors, digest


def _unreadable(path: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"--kv-quant-config: expected a file of `python -m sgl_kvq calibrate`, {path}: {error}"
    )
