"""kvq2 and kvq4 as served equal the offline reference, with and without a calibrated file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sgl_kvq.__main__ import main
from sgl_kvq.fidelity.history import FormatHistory
from sgl_kvq.fidelity.teacher import Teacher
from sgl_kvq.formats.calibration import load_calibration
from sgl_kvq.formats.registry import get_format
from tests.serving.test_oracle import serve

PROMPT, DECODED = 330, 70
NUM_LAYERS = 3  # of the short model


@pytest.fixture(scope="module")
def config_files(
    short_model_path: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str | None]:
    """By what a file says: nothing without a file, the bases, or the bases and other bits."""
    folder = tmp_path_factory.mktemp("calibrated")
    paths: dict[str, str | None] = {"default": None}
    for name, budget in (("calibrated", []), ("chosen", ["--budget-bits", "3.4"])):
        paths[name] = str(folder / f"{name}.safetensors")
        arguments = ["--context", "512", "--segments", "2", "--out", paths[name]]
        assert main(["calibrate", short_model_path, *arguments, *budget]) == 0
    assert not list(folder.glob("*.partial"))
    chosen = load_calibration("kvq2", paths["chosen"], NUM_LAYERS, 3, 64).formats
    assert get_format("kvq2") not in chosen
    assert len(set(chosen)) == 2
    return paths


@pytest.mark.parametrize(
    ("name", "file", "other"),
    [
        ("kvq2", "default", "calibrated"),
        ("kvq4", "calibrated", "default"),
        ("kvq2", "calibrated", "default"),
        ("kvq2", "chosen", "calibrated"),
    ],
)
def test_served_equals_offline(
    name: str,
    file: str,
    other: str,
    short_model_path: str,
    config_files: dict[str, str | None],
    text_ids: list[int],
    start_scheduler: Callable[..., Any],
) -> None:
    result, sequence = serve(
        start_scheduler,
        short_model_path,
        name,
        text_ids[:PROMPT],
        DECODED,
        kv_quant_prefill="quantized",
        kv_quant_config=config_files[file],
    )
    found = torch.tensor([*result.input_logprobs, *result.output_logprobs])
    expected = offline(short_model_path, sequence, name, config_files[file])
    assert (found - expected).abs().mean() < 3e-3
    # The other file makes another function: the comparison can fail.
    different = offline(short_model_path, sequence, name, config_files[other])
    assert (found - different).abs().mean() > 2 * (found - expected).abs().mean()


def offline(
    model_path: str, sequence: list[int], name: str, config_file: str | None
) -> torch.Tensor:
    teacher = Teacher(model_path)
    ids = torch.tensor(sequence)
    history = FormatHistory(name, teacher.model.config, config_file=config_file)
    logprobs = torch.cat(list(teacher.logprobs(teacher.hidden(ids, history)[:-1])))
    return logprobs.gather(1, ids[1:, None]).squeeze(1)
