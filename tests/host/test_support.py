"""Which CUDA graphs a server with `--kv-quant` captures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sgl_kvq.host.support import choose_graphs


def test_on_a_gpu_sglang_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    args = SimpleNamespace()
    choose_graphs(args)
    assert vars(args) == {}


def test_on_a_cpu_there_are_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = SimpleNamespace()
    choose_graphs(args)
    assert vars(args) == {"disable_cuda_graph": True}


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_gpu_server_s_options(model_path: str) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    from sgl_kvq.host.versions.records import resolve, resolved_value

    args = prepare_server_args(["--model-path", model_path, "--kv-quant", "hack2"])
    resolve(args)
    graphs = resolved_value(args, "cuda_graph_config")
    assert graphs.prefill.backend == "breakable"
    assert graphs.decode.backend == "full"
