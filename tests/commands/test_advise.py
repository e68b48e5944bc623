"""What `python -m sgl_kvq advise` recommends, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_kvq.__main__ import main
from sgl_kvq.commands.advise import Measured, advice
from sgl_kvq.fidelity.loss import Loss
from sgl_kvq.formats.calibration import BitAllocation, default_basis, save_bases
from sgl_kvq.formats.registry import get_format


def measured(name: str, bits: float, nats: float, file: str | None = None) -> Measured:
    return Measured(name, file, bits, int(1e6 / bits), Loss(nats, 0.9))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [measured("hack2", 2.5, 0.2), measured("kvq2", 2.9, 0.03), measured("hack4", 4.5, 0.0)],
            "take --kv-quant kvq2: the smallest that loses at most 0.05 nats a token; kvq2 loses "
            "less after `python -m sgl_kvq calibrate M`",
        ),
        (
            [measured("kvq2", 2.9, 0.07), measured("hack4", 4.5, 0.0)],
            "take --kv-quant hack4: the smallest that loses at most 0.05 nats a token; kvq2 loses "
            "less after `python -m sgl_kvq calibrate M`",
        ),
        (
            [
                measured("kvq2", 2.9, 0.02, "f"),
                measured("kvq2", 2.9, 0.07),
                measured("hack4", 4.5, 0.0),
            ],
            "take --kv-quant kvq2 --kv-quant-config f: the smallest that loses at most 0.05 nats "
            "a token",
        ),
        (
            [measured("hack2", 2.5, 0.9), measured("hack4", 4.5, 0.1)],
            "take --kv-quant hack4: loses least",
        ),
    ],
    ids=["smallest", "smaller-after-calibration", "with-file", "none-is-good"],
)
def test_advice(rows: list[Measured], expected: str) -> None:
    assert advice(rows, "M") == expected


def test_the_table_of_a_model(
    tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    bases = [default_basis(64, 2)] * 2
    bits = BitAllocation("kvq4", [get_format("kvq4").bits] * 2)
    save_bases(tmp_path / "file", bases, {}, bits)
    command = ["advise", tiny_model_path, "--context", "128", "--formats", "hack8", "kvq2", "kvq4"]
    picture = tmp_path / "picture.png"
    options = ["--kv-quant-config", str(tmp_path / "file"), "--plot", str(picture)]
    assert main([*command, *options]) == 0
    said = capsys.readouterr().out
    assert "kvq4 with the file" in said
    assert "kvq2 with the file" not in said  # the file is of kvq4
    assert "take --kv-quant " in said
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["no/such/model"], "error: no/such/model: "),
        (["no/such/model", "--context", "100"], "error: --context: expected a multiple of 64 from"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(expected)


def test_a_file_that_goes_with_no_format(
    tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["advise", tiny_model_path, "--context", "128", "--kv-quant-config", "file"]
    assert main([*command, "--formats", "hack4"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "error: --kv-quant-config: no format of hack4 takes a file"
