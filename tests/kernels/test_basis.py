from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sgl_kvq.commands.basis_fit import Moments, fit_basis
from sgl_kvq.errors import ConfigError
from sgl_kvq.kernels.basis import (
    LayerBasis,
    change_basis,
    default_basis,
    load_bases,
    save_bases,
)

TOKENS, HEADS, GQA, D = 256, 2, 3, 64


def rows(seed: int, heads: int = HEADS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(heads, D, D, generator=generator, dtype=torch.float64)
    return torch.randn(heads, TOKENS, D, generator=generator, dtype=torch.float64) @ mix


def fitted() -> LayerBasis:
    q, k, v = rows(0, HEADS * GQA), rows(1), rows(2)
    moments = Moments(*(torch.zeros(HEADS, D, D, dtype=torch.float64) for _ in range(3)))
    moments.add(q, k, v)
    return fit_basis(moments, torch.eye(D, dtype=torch.float64).repeat(HEADS, 1, 1))


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


def test_fitted_channels_are_sorted_by_what_an_error_costs() -> None:
    """Errors count alike in every channel, and the leading ones vary most."""
    basis, q, k = fitted(), rows(0, HEADS * GQA), rows(1)
    queries = change_basis(q.transpose(0, 1), basis.q).transpose(0, 1)
    moment = queries.reshape(HEADS, -1, D).square().mean(1)
    assert moment.amax() < 1.05 * moment.amin()
    varying = k[:, 64:].unflatten(1, (-1, 64))
    varying = (varying - varying.mean(2, keepdim=True)).flatten(1, 2)
    spread = change_basis(varying.transpose(0, 1), basis.k).square().mean(0)
    assert (spread.diff(dim=1) <= 1e-6 * spread.amax()).all()


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
    with pytest.raises(ConfigError, match=r"for 3 layers .* calibrate this model"):
        load_bases(str(path), 3, HEADS, D)
    with pytest.raises(ConfigError, match="expected a file of `python -m sgl_kvq calibrate`"):
        load_bases(str(tmp_path / "none"), 2, HEADS, D)
    save_file({"k": bases[0].k}, path)
    with pytest.raises(ConfigError, match="expected a file of `python -m sgl_kvq calibrate`"):
        load_bases(str(path), 2, HEADS, D)
