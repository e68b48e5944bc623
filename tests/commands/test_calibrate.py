"""What `calibrate` measures, and what it chooses from that."""

from __future__ import annotations

import json
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from sgl_kvq.__main__ import main
from sgl_kvq.commands.calibrate import command as calibrate
from sgl_kvq.commands.calibrate.basis_fit import Moments, fit_basis
from sgl_kvq.commands.calibrate.budget import (
    _cost,
    _spread,
    bits_per_element,
    candidate_formats,
    choose_bits,
    relative_mse,
)
from sgl_kvq.commands.calibrate.stored_attention import stored_attention
from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import PAGE_SIZE, LayerBits
from sgl_kvq.formats.calibration import load_calibration
from sgl_kvq.formats.families.kvq import kvq_format
from sgl_kvq.formats.registry import calibrated_formats, get_format

HEADS, GQA, D = 2, 3, 64
CANDIDATES = candidate_formats(get_format("kvq2"))


def test_stored_attention_reports_gradients_of_earlier_pages_only() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = 3 * PAGE_SIZE
    sizes = (HEADS * GQA, HEADS, HEADS)
    q, k, v = (
        torch.randn(size, tokens, D, generator=generator, dtype=torch.float64) for size in sizes
    )
    weight = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    k.requires_grad_()
    reported: list[tuple[torch.Tensor, torch.Tensor]] = []
    out = stored_attention(q, k, v, 1 / 8, lambda *gradients: reported.append(gradients))
    (out * weight).sum().backward()

    # One softmax over keys of which those of the own page are constants.
    stored_k, stored_v = (x.detach().clone().requires_grad_() for x in (k, v))
    position = torch.arange(tokens)
    own = (position // PAGE_SIZE)[:, None] == position // PAGE_SIZE
    repeated = [x.repeat_interleave(GQA, 0) for x in (k.detach(), v, stored_k, stored_v)]
    scores = torch.where(own, q @ repeated[0].mT, q @ repeated[2].mT) / 8
    weights = scores.masked_fill(position > position[:, None], -torch.inf).softmax(-1)
    expected = (weights * own) @ repeated[1] + (weights * ~own) @ repeated[3]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # softmax is in float32
    (expected * weight).sum().backward()
    for found, stored in zip(reported[0], (stored_k, stored_v), strict=True):
        assert stored.grad is not None
        torch.testing.assert_close(found, stored.grad, rtol=1e-4, atol=1e-5)
        assert not found[:, -PAGE_SIZE:].any()


def moments(k_cost: float, v_cost: float) -> Moments:
    eye = torch.eye(D, dtype=torch.float64).repeat(HEADS, 1, 1)
    spread = torch.diag(torch.logspace(0, -3, D, dtype=torch.float64)).repeat(HEADS, 1, 1)
    return Moments(spread, spread, k_cost * eye, v_cost * eye)


def size_of(bits: LayerBits) -> float:
    return bits_per_element(kvq_format("layer", *bits), D)


def choose(budget: float, k_cost: float, v_cost: float, later: float = 1) -> list[LayerBits]:
    """Choose for four layers; errors in the last two cost `later` times as much."""
    layers = [moments(scale * k_cost, scale * v_cost) for scale in (1, 1, later, later)]
    found = choose_bits(budget, layers, [fit_basis(layer) for layer in layers], 1)
    size = sum(size_of(bits) for bits in found.allocation.layers) / 4
    assert found.bits_per_element == pytest.approx(size)
    assert size <= budget
    return found.allocation.layers


def test_bits_go_where_errors_cost() -> None:
    assert choose(2.5, 1, 1) == [LayerBits(2, 0, 2)] * 4
    assert {bits.v for bits in choose(3.75, 1, 1e-6)} == {2}
    assert {bits.v for bits in choose(3.75, 1e-6, 1)} == {4}
    first, _, third, last = choose(3.5, 1, 1, later=100)
    assert size_of(first) < size_of(third)
    assert third == last
    with pytest.raises(ConfigError, match=r"--budget-bits: expected at least 2\.5"):
        choose(2.4, 1, 1)


@pytest.mark.parametrize("budget", [2.7, 3.0, 3.6, 4.6])
def test_no_other_pair_of_codings_is_better(budget: float) -> None:
    """Against all assignments of all pairs to three layers."""
    layers = [moments(k, v) for k, v in ((1, 3), (5, 1), (30, 40))]
    bases = [fit_basis(layer) for layer in layers]
    costs = [
        [_cost(candidate, _spread(*pair)) for candidate in CANDIDATES]
        for pair in zip(layers, bases, strict=True)
    ]
    sizes = [bits_per_element(candidate, D) for candidate in CANDIDATES]
    least = min(
        sum(layer_costs[i] for layer_costs, i in zip(costs, picks, strict=True))
        for pair in combinations(range(len(CANDIDATES)), 2)
        for picks in product(pair, repeat=3)
        if sum(sizes[i] for i in picks) <= 3 * budget
    )
    assert sum(choose_bits(budget, layers, bases, 1).costs) == pytest.approx(least)


def test_relative_mse_shrinks_sixteenfold_with_two_bits() -> None:
    """A step of 15 / 63 the size has 1 / 17.6 of the error, a cell of four steps 16 times it."""
    two, four, six = (
        relative_mse(2, True, 64),
        relative_mse(4, False, 64),
        relative_mse(6, False, 64),
    )
    assert two == pytest.approx(0.134, abs=0.002)
    assert two / four == pytest.approx(16, rel=0.06)
    assert 12 < four / six < 18


@pytest.mark.parametrize(("budget", "name"), [(2.6, "kvq2"), (3.7, "kvq2"), (3.72, "kvq4")])
def test_bits_go_with_the_format_of_the_nearest_size(budget: float, name: str) -> None:
    layers = [moments(1, 1)]
    assert choose_bits(budget, layers, [fit_basis(layers[0])], 1).allocation.format == name
    assert name in {found.name for found in calibrated_formats()}


def test_calibrate_goes_on_where_it_was_stopped(
    tiny_model_path: str,
    model_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs: list[int] = []
    run_text = calibrate._run_text

    def interrupted(model: object, ids: torch.Tensor, number: int, into: object) -> None:
        if len(runs) == 1:
            runs.append(-1)
            raise KeyboardInterrupt
        runs.append(number)
        run_text(model, ids, number, into)

    def command(name: str) -> list[str]:
        options = ["--context", "128", "--segments", "2", "--budget-bits", "3.6"]
        return ["calibrate", tiny_model_path, *options, "--out", str(tmp_path / name)]

    assert main(command("whole.safetensors")) == 0
    said = capsys.readouterr().out
    monkeypatch.setattr(calibrate, "_run_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(command("parts.safetensors"))
    assert main(command("parts.safetensors")) == 0
    assert runs == [0, -1, 1]
    assert not list(tmp_path.glob("*.partial"))
    whole, parts = (tmp_path / f"{name}.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    report = json.loads(whole.with_suffix(".json").read_text())
    chosen = load_calibration(report["format"], str(parts), len(report["layers"]), 2, 64).formats
    assert [bits["k"] for bits in report["layers"]] == [f.k.num_bits for f in chosen]
    assert report["bits_per_element"] <= 3.6
    assert f"K {chosen[0].k.num_bits} bits" in said
    assert f"--kv-quant {report['format']}" in said
