"""Fixtures of tests that need a model or SGLang: models, real text, servers, schedulers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT


@pytest.fixture(scope="session")
def model_path() -> str:
    """SmolLM2-135M-Instruct as a Hugging Face folder; made by `make model`."""
    from scripts.fetch_model import fetch

    return str(fetch(Path(os.environ.get("KVQ_MODEL", ROOT / ".model" / "smollm2-135m"))))


@pytest.fixture(scope="session")
def short_model_path(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The real model's embeddings, first three layers and output head."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("three-layers")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def text_ids(model_path: str) -> list[int]:
    """About 8,000 tokens of CPython's documentation."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    text = "".join(topics.values())[:34_000]
    return AutoTokenizer.from_pretrained(model_path)(text)["input_ids"]


@pytest.fixture(scope="session")
def tiny_model_path(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A two-layer Llama with random weights and the real tokenizer, for load tests."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def small_server(paused_server: Any) -> Iterator[Any]:
    """A hack2 server with 40 pages and metrics, for two requests at once.

    Its random model has two KV heads of 64; one channel of V in the first layer is too large for a
    page.
    """
    paused_server.resume()
    yield paused_server
    paused_server.pause()


@pytest.fixture(scope="session")
def paused_server(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`small_server`, stopped while no test uses it: an idle scheduler keeps a core busy."""
    import torch

    from testbed.servers import launch_server
    from tests.support.model_folders import make_model

    folder = tmp_path_factory.mktemp("loud-llama")
    model = make_model(folder, model_path, "llama", torch.bfloat16)
    # The layer norm leaves about 1 a channel, so this channel is about 1.6e6; 65280 is the limit.
    model.model.layers[0].self_attn.v_proj.weight.data[0] *= 1e6
    model.model.layers[0].self_attn.o_proj.weight.data[:, 0] *= 1e-6
    model.save_pretrained(folder)
    flags = "--enable-metrics --decode-log-interval 1 --kv-quant hack2 --kv-quant-memory-gb 0.01"
    flags += " --max-total-tokens 2560 --max-running-requests 2 --skip-server-warmup"
    with launch_server(folder, flags.split(), folder / "server.log") as running:
        running.pause()
        yield running
        running.resume()


@pytest.fixture
def start_scheduler() -> Iterator[Callable[..., Any]]:
    """Start SGLang's scheduler in this process; closed when the test ends."""
    from tests.support.scheduler import SchedulerHarness

    running: list[SchedulerHarness] = []

    def start(model_path: str, **options: Any) -> SchedulerHarness:
        while running:
            running.pop().close()
        running.append(SchedulerHarness(model_path, **options))
        return running[-1]

    yield start
    while running:
        running.pop().close()
