"""Transfers in a deterministic simulation: whatever happens, every promise is kept.

`KVQ_SEEDS=FIRST:COUNT` chooses other seeds; `python -m tests.support.simulation` runs any
number.
"""

from __future__ import annotations

import os

import pytest

from tests.support.simulation.run import run_seed, trace
from tests.support.simulation.scenario import draw
from tests.support.simulation.world import Violation

SEEDS_A_TEST = 100
FIRST, COUNT = map(int, os.environ.get("KVQ_SEEDS", "0:1000").split(":"))
LONG_COUNT = 20_000
FOUND = {
    3: "a repeated request forgot what was in flight",
    6: "a decode rank that cannot undo a codec neither acknowledged nor failed",
    10: "a lost Done was not sent again once the decode instance had forgotten the request",
    12: "blocks that left before the decode rank could say what it has were sent twice",
    26: "deadlines shorter than the time between keep-alives were accepted",
    28: "a codec that the decode rank lacks was not refused in the handshake",
    34: "blocks were asked for again on a connection that had not lost them",
    35: "heads, addresses and prompts were not compared; a request without any prefill rank lasted",
    36: "a refused request was not told",
    44: "a slow block was cut by each new connection, or sent on two of them",
    45: "blocks that were being written as the Welcome came were asked for again",
    63: "a connection closed before the new one could be opened",
    89: "versions of the weights were not compared",
    101: "a buffer was filled again while ZeroMQ held it",
    201: "a block was written after its request had ended",
    415: "a message of blocks that could not be read at all was not asked for again",
    421: "a request that had been asked for was not told when it was refused then",
}
"""Seeds that find a fault when its mend is taken out."""


def run(first: int, count: int) -> None:
    for seed in range(first, first + count):
        try:
            run_seed(seed)
        except Violation as violation:
            pytest.fail(str(violation), pytrace=False)


@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, SEEDS_A_TEST))
def test_promises_are_kept(first: int) -> None:
    run(first, min(SEEDS_A_TEST, FIRST + COUNT - first))


@pytest.mark.long
@pytest.mark.parametrize("first", range(FIRST + COUNT, LONG_COUNT, 1000))
def test_promises_are_kept_in_many_seeds(first: int) -> None:
    run(first, 1000)


@pytest.mark.parametrize("seed", FOUND, ids=lambda seed: str(seed))
def test_seeds_that_found_a_fault(seed: int) -> None:
    run(seed, 1)


def test_a_seed_always_does_the_same() -> None:
    for seed in (2, 20, 143):
        assert trace(draw(seed)) == trace(draw(seed))
