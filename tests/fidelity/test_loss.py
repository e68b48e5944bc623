"""The measure of a loss, its bounds, and what is remembered of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sgl_kvq.fidelity.loss import REFUSE_NATS, WARN_NATS, Loss, mean_loss, verdict
from sgl_kvq.fidelity.memory import cache_folder, recall, remember

LOSS = Loss(0.25, 0.75)


def test_the_mean_over_all_parts() -> None:
    reference = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]).log()
    found = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.25, 0.75]]).log()
    loss = mean_loss(zip(reference.split(2), found.split(2), strict=True))
    second = 0.25 * math.log(1 / 3) + 0.75 * math.log(3)
    third = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert loss.nats == pytest.approx((second + third) / 3)
    assert loss.same_top == pytest.approx(1 / 3)
    assert str(LOSS) == "0.250 nats a token, same most likely token 75.0%"


@pytest.mark.parametrize(
    ("nats", "expected"),
    [
        (WARN_NATS, "served"),
        (WARN_NATS * 1.01, "served with a warning"),
        (REFUSE_NATS, "served with a warning"),
        (REFUSE_NATS * 1.01, "refused"),
        (math.nan, "refused"),
    ],
)
def test_bounds(nats: float, expected: str) -> None:
    assert verdict(Loss(nats, 0.5)) == expected


def test_a_loss_is_remembered_until_its_file_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert recall("a") is None
    remember("a", LOSS)
    assert recall("a") == LOSS
    assert recall("b") is None
    (file,) = cache_folder().iterdir()
    for damaged in ("", "[]", '{"nats": 1}', '{"nats": "much", "same_top": 1}', "null"):
        file.write_text(damaged)
        assert recall("a") is None
    remember("a", LOSS)
    assert recall("a") == LOSS


def test_a_folder_that_cannot_be_written_is_said_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remember("a", LOSS)
    assert "the loss is measured at each start" in caplog.text
    assert recall("a") is None


def test_without_a_variable_it_is_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "sgl_kvq" / "loss"
