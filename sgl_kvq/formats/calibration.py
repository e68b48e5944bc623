"""The basis in which a format of its own basis stores K and V.

Rows are transformed before they are stored, in 16 bits as in codes; queries are transformed so that
scores stay, and outputs are transformed back. Pages, kernels and transfers see plain rows.

A basis is calibrated (`python -m sgl_kvq calibrate`) or the default of `default_basis`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import QuantFormat, hadamard_order
from sgl_kvq.formats.hadamard import rotate
from sgl_kvq.formats.kvq import kvq_format
from sgl_kvq.formats.registry import get_format

FILE_VERSION = 1


class KvqBits(NamedTuple):
    """Codings of a member of the kvq family, see `sgl_kvq.formats.kvq.kvq_format`."""

    k: int
    outlier_16ths: int
    v: int


@dataclass(frozen=True)
class Chosen:
    """What `--budget-bits` chose.

    Args:
        format: `--kv-quant` that it goes with.
        layers: Codings of each layer.
    """

    format: str
    layers: list[KvqBits]


KVQ_CHOICES = tuple(KvqBits(*bits) for bits in product((2, 4), range(17), (2, 4)))
"""Members of the family that a file may ask for."""


@dataclass(frozen=True)
class LayerBasis:
    """Matrices of one layer; a row vector is multiplied from the right.

    Args:
        k: float32 [num_kv_heads, head_dim, head_dim], to the basis K is stored in; its first
            channels are those that a format with outlier channels gives more bits.
        v: Likewise for V.
    """

    k: torch.Tensor
    v: torch.Tensor

    @property
    def q(self) -> torch.Tensor:
        """Of queries: q Q (k K)^T = q k^T."""
        return torch.linalg.inv(self.k.double()).transpose(1, 2).float()

    @property
    def out(self) -> torch.Tensor:
        """From the basis of V back."""
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
    path: Path, bases: list[LayerBasis], about: dict[str, str], chosen: Chosen | None = None
) -> None:
    """Write calibrated bases as a safetensors file.

    Args:
        path: The file.
        bases: One a layer.
        about: What made it; kept in the file's header.
        chosen: Codings to use instead of those that `--kv-quant` names.
    """
    tensors = {name: torch.stack([getattr(basis, name) for basis in bases]) for name in ("k", "v")}
    header: dict[str, Any] = {"version": FILE_VERSION, **about}
    if chosen is not None:
        header["chosen"] = asdict(chosen)
    save_file(tensors, path, metadata={"sgl_kvq": json.dumps(header)})


def load_bases(path: str, num_layers: int, num_kv_heads: int, head_dim: int) -> list[LayerBasis]:
    """Read what `save_bases` wrote.

    Args:
        path: `--kv-quant-config`.
        num_layers: Layers of the model.
        num_kv_heads: KV heads of the model, all ranks.
        head_dim: Channels of a head.

    Raises:
        ConfigError: not such a file, or of another model.
    """
    _, tensors = _read_file(path, ("k", "v"))
    shape = [num_layers, num_kv_heads, head_dim, head_dim]
    found = list(tensors["k"].shape)
    if not found == list(tensors["v"].shape) == shape:
        raise ConfigError(
            f"--kv-quant-config: expected {num_layers} layers of {num_kv_heads} KV heads of "
            f"{head_dim} channels, {path} has {found}; calibrate this model"
        )
    return [LayerBasis(*pair) for pair in zip(*(x.float() for x in tensors.values()), strict=True)]


def layer_formats(name: str, config_file: str | None, num_layers: int) -> list[QuantFormat]:
    """Format of each layer's pages: that of `--kv-quant`, with the bits that a file chose.

    Args:
        name: `--kv-quant`.
        config_file: `--kv-quant-config`.
        num_layers: Layers of the model.

    Raises:
        ConfigError: no such format, not such a file, or one that chose for another format or model.
    """
    named = get_format(name)
    chosen = _read_file(config_file, ())[0].get("chosen") if config_file else None
    if chosen is None:
        return [named] * num_layers
    if chosen.get("format") != name:
        raise ConfigError(
            f"--kv-quant-config: {config_file} chose bits for --kv-quant {chosen.get('format')}, "
            f"got {name}; pass the former, or calibrate without --budget-bits"
        )
    try:
        layers = [KvqBits(*bits) for bits in chosen["layers"]]
    except (KeyError, TypeError):
        layers = []
    if len(layers) != num_layers or not set(layers) <= set(KVQ_CHOICES):
        raise ConfigError(
            f"--kv-quant-config: expected for each of {num_layers} layers K 2 or 4 bits, 0 to 16 "
            f"outlier sixteenths, V 2 or 4 bits, {config_file} has {chosen.get('layers')}; "
            f"calibrate this model"
        )
    return [kvq_format(name, *bits) for bits in layers]


def _read_file(path: str, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and some tensors of a file of `save_bases`."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("sgl_kvq", "{}"))
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(
            f"--kv-quant-config: expected a file of `python -m sgl_kvq calibrate`, {path}: {error}"
        ) from error
    if about.get("version") != FILE_VERSION:
        raise ConfigError(
            f"--kv-quant-config: expected version {FILE_VERSION}, {path} has "
            f"{about.get('version')}; calibrate this model"
        )
    return about, tensors
