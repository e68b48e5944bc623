from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sgl_kvq.commands.calibrate.basis_fit import Moments, fit_basis
from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.calibration import (
    Chosen,
    KvqBits,
    LayerBasis,
    change_basis,
    default_basis,
    layer_formats,
    load_bases,
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


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "kvq.safetensors"
    bases = [default_basis(D, HEADS), fitted()]
    save_bases(path, bases, {"model": "m"})
    loaded = load_bases(str(path), 2, HEADS, D)
    for saved, read in zip(bases, loaded, strict=True):
        assert torch.equal(saved.k, read.k)
        assert torch.equal(saved.v, read.v)
    with pytest.raises(ConfigError, match=r"expected 3 layers .* calibrate this model"):
        load_bases(str(path), 3, HEADS, D)
    with pytest.raises(ConfigError, match="expected a file of `python -m sgl_kvq calibrate`"):
        load_bases(str(tmp_path / "none"), 2, HEADS, D)
    save_file({"k": bases[0].k, "v": bases[0].v}, path)
    with pytest.raises(ConfigError, match=r"expected version 1, .* calibrate this model"):
        load_bases(str(path), 2, HEADS, D)
    save_file({"k": bases[0].k}, path, metadata={"sgl_kvq": '{"version": 1}'})
    with pytest.raises(ConfigError, match="expected a file of `python -m sgl_kvq calibrate`"):
        load_bases(str(path), 2, HEADS, D)


def test_a_file_may_choose_bits_by_layer(tmp_path: Path) -> None:
    path = str(tmp_path / "kvq.safetensors")
    bases = [default_basis(D, HEADS)] * 2
    save_bases(Path(path), bases, {"model": "m"})
    plain = [get_format("kvq2")] * 2
    assert layer_formats("kvq2", path, 2) == layer_formats("kvq2", None, 2) == plain
    chosen = Chosen("kvq4", [KvqBits(4, 2, 2), KvqBits(2, 3, 4)])
    save_bases(Path(path), bases, {"model": "m"}, chosen)
    found = layer_formats("kvq4", path, 2)
    assert [KvqBits(f.k.num_bits, f.k.outlier_16ths, f.v.num_bits) for f in found] == chosen.layers
    assert {f.name for f in found} == {"kvq4"}
    assert load_bases(path, 2, HEADS, D)[0].k.shape == (HEADS, D, D)
    with pytest.raises(ConfigError, match=r"chose bits for --kv-quant kvq4, got kvq2"):
        layer_formats("kvq2", path, 2)
    with pytest.raises(ConfigError, match=r"expected for each of 3 layers .* calibrate this model"):
        layer_formats("kvq4", path, 3)


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
        layer_formats("kvq2", str(path), 1)
