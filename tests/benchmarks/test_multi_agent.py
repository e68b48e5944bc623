"""What the multi-agent benchmark sends and counts, on a real server."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.agents.many import Sizes, Swarm
from benchmarks.agents.sessions import summarize
from testbed.servers import Server, ServerError

SIZES = Sizes(shared_tokens=128, task_tokens=20, turns=3, answer_tokens=8, tool_tokens=30)


def test_agents_grow_their_transcripts_and_find_them_cached(small_server: Server) -> None:
    small_server.flush_cache()
    swarm = Swarm(small_server.url, SIZES, 2)
    asyncio.run(swarm.run(60))
    turns = sorted(swarm.turns, key=lambda turn: turn.prompt_tokens)
    assert [turn.prompt_tokens for turn in turns] == [148, 148, 186, 186, 224, 224]
    # After the first turn an agent's whole pages are cached: 156, then 194 tokens were computed.
    assert [turn.known_tokens for turn in turns[2:]] == [156, 156, 194, 194]
    assert [turn.cached_tokens for turn in turns[2:]] == [128, 128, 192, 192]
    summary = summarize(turns)
    assert summary.prompt_tokens == 1116
    assert summary.hit_rate >= (128 + 128 + 192 + 192) / 1116
    assert 0 < summary.ttft_p50_s < summary.total_s


def test_the_working_set_counts_the_shared_part_once() -> None:
    assert SIZES.working_set(3) == 128 + 3 * (20 + 3 * 8 + 2 * 30)


def test_a_server_that_is_gone_ends_in_one_line() -> None:
    with pytest.raises(ServerError, match="1 agents: ConnectError"):
        asyncio.run(Swarm("http://127.0.0.1:9", SIZES, 1).run(5))
