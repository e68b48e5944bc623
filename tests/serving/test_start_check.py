"""What a format loses is measured before a server starts, said in one line, refused if garbage."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from sgl_kvq.fidelity import loss
from sgl_kvq.fidelity.memory import cache_folder
from sgl_kvq.host import plugin, start_check
from sgl_kvq.host.text_pass import TextPass
from tests.support.scheduler import SchedulerHarness

TOKENS = 320


@pytest.fixture(scope="module")
def server(
    short_model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SchedulerHarness]:
    """Three layers of the real model, which checked itself with an empty cache folder."""
    if torch.cuda.is_available():
        pytest.skip("needs a model in float32, which SGLang serves on a CPU only")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(start_check, "MEASURED_TOKENS", TOKENS)
        harness = SchedulerHarness(
            short_model_path,
            kv_quant="hack2",
            kv_quant_accept_loss=False,
            kv_quant_prefill="quantized",
            kv_quant_memory_gb=0.02,
            max_running_requests=2,
            dtype="float32",
            skip_tokenizer_init=False,
        )
        yield harness
        harness.close()


@pytest.fixture
def check(
    server: SchedulerHarness, caplog: pytest.LogCaptureFixture
) -> Callable[[], logging.LogRecord]:
    """Check the server once more, as at a start; what it says."""

    def run() -> logging.LogRecord:
        caplog.clear()
        with caplog.at_level(logging.INFO, start_check.logger.name):
            start_check.check_loss(server.scheduler)
        (record,) = (r for r in caplog.records if r.name == start_check.logger.name)
        return record

    return run


def test_the_pool_and_the_engine_stay_as_they_were(server: SchedulerHarness) -> None:
    (kept,) = cache_folder().iterdir()  # so it was measured
    assert 0.002 < json.loads(kept.read_text())["nats"] < loss.REFUSE_NATS
    pool, allocator = server.pool, server.allocator
    assert allocator.free_pages.tolist() == list(range(1, pool.plan.num_rows + 1))
    assert allocator.available_size() == pool.plan.num_tokens
    assert (pool.open_slots.num_used(), pool.sink_pages.num_used()) == (0, 0)
    assert not server.scheduler.req_to_token_pool.req_to_token.any()
    assert server.scheduler.tp_worker.model_runner.attn_backend.engine.quantized_prefill


def test_a_second_start_measures_nothing(
    server: SchedulerHarness, check: Callable[[], logging.LogRecord]
) -> None:
    (kept,) = cache_folder().iterdir()
    remembered = check().getMessage()
    assert remembered.startswith("--kv-quant hack2 loses 0.")
    before, how = remembered.split(" (", 1)
    assert how.startswith("measured at an earlier start)")
    kept.unlink()
    tokenizer, server.scheduler.tokenizer = server.scheduler.tokenizer, None
    assert check().getMessage() == "--kv-quant hack2: loss not measured (needs a tokenizer)"
    server.scheduler.tokenizer = tokenizer
    assert check().getMessage().startswith(f"{before} (measured in ")


def test_a_check_that_fails_is_a_warning(
    check: Callable[[], logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_check, "recall", lambda key: None)
    monkeypatch.setattr(start_check, "measured_ids", lambda *_: 1 / 0)
    assert check().levelno == logging.WARNING


def test_garbage_ends_the_server_with_one_line_unless_accepted(
    server: SchedulerHarness,
    check: Callable[[], logging.LogRecord],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in (loss, start_check):
        monkeypatch.setattr(module, "REFUSE_NATS", 0.001)
    monkeypatch.setattr(loss, "WARN_NATS", 0.0005)
    with pytest.raises(SystemExit):
        plugin._init_cuda_graphs(lambda scheduler: None, server.scheduler)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    expected = "expected a loss of at most 0.001 nats a token on this model, got 0."
    assert last.startswith(f"error: --kv-quant hack2: {expected}")
    accepting = copy.copy(server.scheduler.server_args)
    object.__setattr__(accepting, "kv_quant_accept_loss", True)  # SGLang forbids the usual way
    monkeypatch.setattr(server.scheduler, "server_args", accepting)
    assert check().levelno == logging.WARNING


def test_on_a_gpu_nothing_is_measured_yet(
    server: SchedulerHarness,
    check: Callable[[], logging.LogRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server.scheduler.tp_worker.model_runner, "device", "cuda")
    expected = "--kv-quant hack2: loss not measured (not tried on GPUs yet; "
    assert check().getMessage().startswith(expected)


def test_a_model_that_cannot_be_served_ends_the_server_with_one_line(
    server: SchedulerHarness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first forward comes before the server is ready."""
    layer = server.scheduler.tp_worker.model_runner.model.model.layers[0].self_attn.attn
    monkeypatch.setattr(layer, "scaling", 2 * layer.scaling)
    monkeypatch.setattr(start_check, "recall", lambda key: None)
    with pytest.raises(SystemExit):
        plugin._init_cuda_graphs(lambda scheduler: None, server.scheduler)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: attention backend kvq: layer 0 scales its scores by 0.25, by")


def test_steps_of_a_page_are_what_is_served(server: SchedulerHarness, text_ids: list[int]) -> None:
    """The pass that reads codes has the log-probabilities that the server answers with."""
    ids = torch.tensor(text_ids[:TOKENS])
    text = TextPass(server.scheduler.tp_worker.model_runner, ids)
    with torch.no_grad(), text.in_pool():
        rows = torch.cat(list(text.logprobs(text.hidden(64))))
    (served,) = server.generate([ids.tolist()], 1, input_logprobs=True)
    found = rows[:-1].gather(1, ids[1:, None]).squeeze(1)
    torch.testing.assert_close(found, torch.tensor(served.input_logprobs), atol=1e-2, rtol=0)
