"""What `calibrate` measures, and what it chooses from that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgl_kvq.__main__ import main
from sgl_kvq.commands import calibrate
from sgl_kvq.commands.basis_fit import Moments, fit_basis
from sgl_kvq.commands.budget import bits_per_element, choose_bits, left_over
from sgl_kvq.commands.stored_attention import stored_attention
from sgl_kvq.config import PAGE_SIZE
from sgl_kvq.errors import ConfigError
from sgl_kvq.kernels.basis import KvqBits, stored_format

HEADS, GQA, D = 2, 3, 64


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


def choose(budget: float, k_cost: float, v_cost: float) -> KvqBits:
    layers = [moments(k_cost, v_cost)] * 2
    return choose_bits(budget, layers, [fit_basis(layer) for layer in layers], 1).bits


def test_bits_go_where_errors_cost() -> None:
    assert choose(2.9, 1, 1) == KvqBits(2, 6, 2)
    assert choose(3.75, 1, 1e-6).v == 2
    assert choose(3.75, 1e-6, 1).v == 4
    assert choose(2.5, 1, 1) == KvqBits(2, 0, 2)
    for budget in (2.5, 2.7, 3.0, 3.6, 4.6):
        assert bits_per_element(choose(budget, 1, 1), D) <= budget
    with pytest.raises(ConfigError, match=r"--budget-bits: expected at least 2\.5"):
        choose(2.4, 1, 1)


def test_left_over_shrinks_sixteenfold_with_two_bits() -> None:
    """Uniform steps: a quarter of the step is a sixteenth of the error, less what ranges cut."""
    assert left_over(2, 64) == pytest.approx(0.12, abs=0.015)
    assert 10 < left_over(2, 64) / left_over(4, 64) < 16
    assert 12 < left_over(4, 64) / left_over(6, 64) < 17


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
    chosen = stored_format("kvq2", str(parts))
    assert f"K {chosen.k.num_bits} bits" in said
