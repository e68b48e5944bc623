from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from sgl_kvq.commands.calibrate.basis_fit import Moments, fit_basis
from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import PAGE_SIZE, LayerBits, QuantFormat
from sgl_kvq.formats.calibration import (
    BitAllocation,
    Calibration,
    LayerBasis,
    change_basis,
    default_basis,
    load_calibration,
    save_bases,
)
from sgl_kvq.formats.registry import get_format

TOKENS, HEADS, GQA, D = 256, 2, 3, 64


def rows(seed: int, heads: int = HEADS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(heads, 2 * D, D, generator=generator, dtype=torch.float64)
    return torch.randn(heads, TOKENS, 2 * D, generator=generator, dtype=torch.float64) @ mix


def gathered() -> Moments:
    moments = Moments(*torch.zeros(4, HEADS, D, D, dtype=torch.float64).unbind())
    moments.add_rows(rows(1), rows(2))
    moments.add_gradients(rows(0), rows(3))
    return moments


def fitted() -> LayerBasis:
    return fit_basis(gathered())


@pytest.mark.parametrize("basis", [default_basis(D, HEADS), fitted()], ids=["default", "fitted"])
def test_scores_and_outputs_stay(basis: LayerBasis) -> None:
    q, k, v = rows(0, HEADS * GQA), rows(1), rows(2)
    changed_q = change_basis(q.transpose(0, 1), basis.q).transpose(0, 1)
    changed_k, changed_v = (
        change_basis(x.transpose(0, 1), matrices).transpose(0, 1)
        for x, matrices in ((k, basis.k), (v, basis.v))
    )
    scores = q @ k.repeat_interleave(GQA, 0).transpose(1, 2)
    changed = changed_q @ changed_k.repeat_interleave(GQA, 0).transpose(1, 2)
    assert (changed - scores).abs().max() < 1e-4 * scores.abs().max()
    out = change_basis(changed_v.transpose(0, 1), basis.out).transpose(0, 1)
    assert (out - v).abs().max() < 1e-4 * v.abs().max()


def moment(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Mean squares of channels after a change of basis, of tokens behind the first page."""
    return change_basis(x[:, PAGE_SIZE:].transpose(0, 1), matrices).double().square().mean(0)


def test_fitted_key_channels_are_sorted_by_what_an_error_costs() -> None:
    """Errors cost alike in every channel, and the leading ones vary most."""
    basis = fitted()
    cost = moment(rows(0), basis.q)  # gradients change like queries
    assert (cost.amax(1) < 1.05 * cost.amin(1)).all()
    pages = rows(1).unflatten(1, (-1, PAGE_SIZE))
    varying = (pages - pages.mean(2, keepdim=True)).flatten(1, 2)
    spread = moment(varying, basis.k)
    assert (spread.diff(dim=1) <= 1e-6 * spread.amax()).all()
    kept = moment(varying, torch.eye(D).repeat(HEADS, 1, 1))
    torch.testing.assert_close(spread.sum(1), kept.sum(1), rtol=1e-4, atol=0)


def test_fitted_value_channels_vary_alike_and_cost_less_than_in_any_scaling() -> None:
    """With one step for all channels an error costs (sum of variances) * (sum of costs)."""
    basis = fitted()
    spread = moment(rows(2), basis.v)
    assert (spread.amax(1) < 1.05 * spread.amin(1)).all()

    def loss(k: torch.Tensor) -> torch.Tensor:
        back = torch.linalg.inv(k.double()).transpose(1, 2)
        return moment(rows(2), k).sum(1) * moment(rows(3), back).sum(1)

    least = loss(basis.v)
    whitened = fit_basis(
        replace(gathered(), v=torch.eye(D, dtype=torch.float64).repeat(HEADS, 1, 1))
    )
    assert (least < loss(torch.eye(D).repeat(HEADS, 1, 1))).all()
    assert (least < loss(whitened.v)).all()


def test_the_default_puts_slow_channels_first() -> None:
    x = torch.arange(D, dtype=torch.float32).view(1, 1, D)
    assert change_basis(x, default_basis(D, 1).k)[0, 0, :4].tolist() == [31, 63, 30, 62]


def load(name: str, path: Path, num_layers: int = 2) -> Calibration:
    return load_calibration(name, str(path), num_layers, HEADS, D)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "kvq.safetensors"
    bases = [default_basis(D, HEADS), fitted()]
    save_bases(path, bases, {"model": "m"})
    calibration = load("kvq2", path)
    for saved, read in zip(bases, calibration.bases, strict=True):
        assert torch.equal(saved.k, read.k)
        assert torch.equal(saved.v, read.v)
    with pytest.raises(ConfigError, match=r"expected 3 layers .* calibrate this model"):
        load("kvq2", path, 3)
    with pytest.raises(ConfigError, match="expected a file of `python -m sgl_kvq calibrate`"):
        load("kvq2", tmp_path / "none")
    save_file({"k": bases[0].k, "v": bases[0].v}, path)
    with pytest.raises(ConfigError, match=r"expected version 1, .* calibrate this model"):
        load("kvq2", path)
    save_file({"k": bases[0].k}, path, metadata={"sgl_kvq": '{"version": 1}'})
    with pytest.raises(ConfigError, match="expected a file of `python -m sgl_kvq calibrate`"):
        load("kvq2", path)


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "kvq.safetensors"
    save_bases(path, [default_basis(D, HEADS)] * 2, {"model": "m"})
    first = load("kvq2", path)
    assert load("kvq2", path) is first
    assert first.digest == xxhash.xxh3_64_hexdigest(path.read_bytes())
    save_bases(path, [fitted()] * 2, {"model": "other"})
    second = load("kvq2", path)
    assert second.digest != first.digest
    assert torch.equal(second.bases[0].k, fitted().k)


def test_without_a_file() -> None:
    default = load_calibration("kvq2", None, 2, HEADS, D)
    assert [basis.k.shape for basis in default.bases] == [(HEADS, D, D)] * 2
    plain = load_calibration("hack2", None, 2, HEADS, D)
    assert (plain.bases, plain.digest) == ((), "unset")
    assert plain.formats == (get_format("hack2"),) * 2


def bits_of(formats: Sequence[QuantFormat]) -> list[LayerBits]:
    return [LayerBits(f.k.num_bits, f.k.outlier_16ths, f.v.num_bits) for f in formats]


def test_a_file_may_choose_bits_by_layer(tmp_path: Path) -> None:
    path = tmp_path / "kvq.safetensors"
    bases = [default_basis(D, HEADS)] * 2
    save_bases(path, bases, {"model": "m"})
    assert load("kvq2", path).formats == (get_format("kvq2"),) * 2
    chosen = BitAllocation("kvq4", [LayerBits(4, 2, 2), LayerBits(2, 3, 4)])
    save_bases(path, bases, {"model": "m"}, chosen)
    found = load("kvq4", path)
    assert bits_of(found.formats) == chosen.layers
    assert {f.name for f in found.formats} == {"kvq4"}
    assert found.bases[0].k.shape == (HEADS, D, D)
    with pytest.raises(ConfigError, match=r"chose bits for --kv-quant kvq4, got kvq2"):
        load("kvq2", path)
    save_bases(path, [*bases, bases[0]], {"model": "m"}, chosen)
    with pytest.raises(ConfigError, match=r"expected for each of 3 layers .* calibrate this model"):
        load("kvq4", path, 3)


@pytest.mark.parametrize(
    "layers", [[[3, 2, 2]], [[2, 17, 2]], [[2, 1.5, 2]], [[2, 0, 8]], [[2, 2]], [2], None], ids=str
)
def test_bits_that_do_not_exist_are_refused(tmp_path: Path, layers: object) -> None:
    path = tmp_path / "kvq.safetensors"
    save_bases(path, [default_basis(D, HEADS)], {"model": "m"})
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("k", "v")}
    chosen = {"format": "kvq2", "layers": layers}
    header = {"sgl_kvq": json.dumps({"version": 1, "chosen": chosen})}
    save_file(tensors, path, metadata=header)
    with pytest.raises(ConfigError, match=r"--kv-quant-config: expected for each of 1 layers"):
        load("kvq2", path, 1)
