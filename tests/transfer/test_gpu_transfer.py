"""Pools on GPUs: page-locked staging on a stream of its own; SGLang's streams do not notice."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from sgl_kvq.transfer.options import TransferConfig
from tests.support.sink_rows import take_back
from tests.support.transfer_pair import (
    DecodeSide,
    PrefillSide,
    assert_equal,
    stopped,
    take_pages,
    wait_for,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CONFIG = TransferConfig(deadline_s=10.0, block_bytes=65536, window_bytes=2**20)
NUM_TOKENS = 3000
SLEEP_S = 0.4


def devices() -> tuple[str, str]:
    return "cuda:0", "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"


def make_sides(format_name: str = "hack2") -> tuple[PrefillSide, DecodeSide]:
    source, target = devices()
    return (
        PrefillSide(CONFIG, format_name=format_name, device=source),
        DecodeSide(CONFIG, format_name=format_name, device=target),
    )


def begin(
    prefill: PrefillSide, decode: DecodeSide, room: int, num_tokens: int
) -> Callable[[], None]:
    """Start a transfer; returns what waits for it, checks every byte and gives the slots back."""
    sent = take_pages(prefill.pool, num_tokens, 1)
    got = take_pages(decode.pool, num_tokens, 2)
    torch.cuda.synchronize(prefill.pool.device)
    out = prefill.open(room)
    result = decode.announce(room, [prefill.endpoint])
    decode.start(room, got)
    prefill.send(room, sent, num_tokens)

    def finish() -> None:
        wait_for(lambda: bool(out.result and result.result))
        assert (out.result, result.result) == ("success", "success"), (out.reason, result.reason)
        assert_equal(prefill, sent, decode, got, num_tokens)
        prefill.close(room)
        decode.close(room)
        for pool, pages in ((prefill.pool, sent), (decode.pool, got)):
            take_back(pool, pages.to(pool.device))

    return finish


def sleep_cycles(seconds: float) -> int:
    """Clock cycles of the device that last about so long."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(200_000_000)  # an idle device raises its clock meanwhile
    began.record()
    torch.cuda._sleep(10_000_000)
    ended.record()
    ended.synchronize()
    return int(10_000_000 * seconds * 1e3 / began.elapsed_time(ended))


@pytest.mark.parametrize("format_name", ["bf16", "hack2", "hack4"])
def test_every_byte_arrives_while_another_stream_is_busy(format_name: str) -> None:
    prefill, decode = make_sides(format_name)
    busy = torch.cuda.Stream()
    matrix = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    with stopped(prefill, decode):
        for room, num_tokens in enumerate((1, 63, 64, 65, NUM_TOKENS), 1):
            with torch.cuda.stream(busy):
                for _ in range(200):
                    matrix @ matrix
            begin(prefill, decode, room, num_tokens)()


def test_heads_of_another_tensor_parallel_size_on_a_gpu() -> None:
    source, target = devices()
    senders = [PrefillSide(CONFIG, (2, rank), seed=rank + 1, device=source) for rank in range(2)]
    receiver = DecodeSide(CONFIG, (1, 0), device=target)
    with stopped(*senders, receiver):
        sent = [take_pages(side.pool, 500, 1) for side in senders]
        got = take_pages(receiver.pool, 500, 11)
        outcomes = [side.open(7) for side in senders]
        outcomes.append(receiver.announce(7, [side.endpoint for side in senders]))
        receiver.start(7, got)
        for side, pages in zip(senders, sent, strict=True):
            side.send(7, pages, 500)
        wait_for(lambda: all(outcome.result for outcome in outcomes))
        assert {outcome.result for outcome in outcomes} == {"success"}
        for side, pages in zip(senders, sent, strict=True):
            assert_equal(side, pages, receiver, got, 500)


def test_the_scheduler_thread_waits_for_nothing() -> None:
    """Its own stream is busy for long; handing a transfer over takes milliseconds all the same."""
    prefill, decode = make_sides()
    cycles = sleep_cycles(SLEEP_S)
    with stopped(prefill, decode):
        begin(prefill, decode, 1, NUM_TOKENS)()
        sent = take_pages(prefill.pool, NUM_TOKENS, 1)
        got = take_pages(decode.pool, NUM_TOKENS, 2)
        out, result = prefill.open(2), decode.announce(2, [prefill.endpoint])
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        began = time.monotonic()
        decode.start(2, got)
        prefill.send(2, sent, NUM_TOKENS)
        assert time.monotonic() - began < SLEEP_S / 8
        # The pages may be written only after what was queued before they were handed over.
        wait_for(lambda: bool(out.result and result.result))
        if devices()[0] == devices()[1]:
            assert time.monotonic() - began > SLEEP_S / 2
        assert result.result == "success"
        assert_equal(prefill, sent, decode, got, NUM_TOKENS)


def test_work_on_another_stream_is_not_held_up() -> None:
    """Steps of a model-like stream take as long during transfers as without any."""
    prefill, decode = make_sides()
    stream = torch.cuda.Stream()
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) / 64
    rows = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(stream):
        rows @ weight  # what cuBLAS sets up cannot be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        x = rows
        for _ in range(100):
            x = x @ weight
    head_start = sleep_cycles(0.003)  # launches need the interpreter, which transfers share

    def step_ms() -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(head_start)
            began.record()
            graph.replay()
            ended.record()
        ended.synchronize()
        return began.elapsed_time(ended)

    with stopped(prefill, decode):
        begin(prefill, decode, 1, NUM_TOKENS)()
        alone = [step_ms() for _ in range(40)][10:]
        during: list[float] = []
        for room in range(2, 22):
            finish = begin(prefill, decode, room, NUM_TOKENS)
            while prefill.outcomes[room].result == "":
                during.append(step_ms())
            finish()
    assert len(during) >= 20
    quiet, loaded = statistics.median(alone), statistics.median(during)
    print(f"step alone {quiet:.3f} ms, during transfers {loaded:.3f} ms ({len(during)} steps)")
    assert loaded < 1.15 * quiet
