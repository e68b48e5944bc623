"""kvq2 and kvq4 as served equal the offline reference, with and without a calibrated basis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_oracle import serve, short_model_path  # noqa: F401

from benchmarks.fidelity.history import FormatHistory
from benchmarks.fidelity.teacher import Teacher
from sgl_kvq.__main__ import main

PROMPT, DECODED = 700, 70


@pytest.fixture(scope="module")
def config_file(short_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: F811
    path = tmp_path_factory.mktemp("calibrated") / "kvq.safetensors"
    arguments = ["--context", "512", "--segments", "2", "--out", str(path)]
    assert main(["calibrate", short_model_path, *arguments]) == 0
    assert not list(Path(path).parent.glob("*.partial"))
    return str(path)


@pytest.mark.parametrize("calibrated", [False, True], ids=["default", "calibrated"])
@pytest.mark.parametrize("name", ["kvq2", "kvq4"])
def test_served_equals_offline(
    name: str,
    calibrated: bool,
    short_model_path: str,  # noqa: F811
    config_file: str,
    text_ids: list[int],
    start_scheduler: Callable[..., Any],
) -> None:
    chosen = config_file if calibrated else None
    result, sequence = serve(
        start_scheduler,
        short_model_path,
        name,
        text_ids[:PROMPT],
        DECODED,
        kv_quant_prefill="quantized",
        kv_quant_config=chosen,
    )
    found = torch.tensor([*result.input_logprobs, *result.output_logprobs])
    expected = offline(short_model_path, sequence, name, chosen)
    assert (found - expected).abs().mean() < 3e-3
    # The other basis is another function: the comparison can fail.
    other = offline(short_model_path, sequence, name, None if calibrated else config_file)
    assert (found - other).abs().mean() > 2 * (found - expected).abs().mean()


def offline(
    model_path: str, sequence: list[int], name: str, config_file: str | None
) -> torch.Tensor:
    teacher = Teacher(model_path)
    ids = torch.tensor(sequence)
    history = FormatHistory(name, teacher.model.config, config_file=config_file)
    logprobs = torch.cat(list(teacher.logprobs(teacher.hidden(ids, history)[:-1])))
    return logprobs.gather(1, ids[1:, None]).squeeze(1)
