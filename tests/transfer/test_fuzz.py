"""Random changes of valid input do no harm to whoever reads it."""

from __future__ import annotations

import os
import random
import time

import pytest

from tests.support import wire_targets

SEEDS = wire_targets.seeds()
SMALL = tuple(range(8))
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


@pytest.mark.parametrize("seconds", [2.0, pytest.param(None, marks=pytest.mark.long)])
def test_changed_input(seconds: float | None) -> None:
    """KVQ_FUZZ_SEED=SEED:NUMBER begins with the input that a failure names."""
    if seconds is None:
        seconds = float(os.environ.get("KVQ_FUZZ_SECONDS", "120"))
        seed, _, first = os.environ.get("KVQ_FUZZ_SEED", f"{time.time_ns()}:0").partition(":")
    else:
        seed, first = "0", "0"
    number, began, until = int(first or 0), time.monotonic(), time.monotonic() + seconds
    while time.monotonic() < until:
        data = changed(random.Random(f"{seed}:{number}"))
        try:
            wire_targets.one_input(data)
        except BaseException as error:
            error.add_note(f"KVQ_FUZZ_SEED={seed}:{number}, input {data[:200].hex()}")
            raise
        number += 1
    rate = (number - int(first or 0)) / (time.monotonic() - began)
    print(f"seed {seed}: inputs {first or 0} to {number}, {rate:.0f} a second")


def changed(rng: random.Random) -> bytes:
    """A valid input with a few changes, nearly always for the same target."""
    data = bytearray(rng.choice(SEEDS))
    for _ in range(rng.choice(SMALL)):
        place = rng.randrange(1, len(data) + 1)
        change = rng.randrange(6)
        if change == 0:
            data[place - 1] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[place:place] = rng.randbytes(rng.choice((1, 2, 8, 100)))
        elif change == 2:
            del data[place : place + rng.choice((1, 2, 8, 100))]
        elif change == 3:
            size = rng.choice((1, 2, 4, 8))
            edge = rng.choice(EDGES) % 256**size
            data[place : place + size] = edge.to_bytes(size, rng.choice(("little", "big")))
        elif change == 4:
            data[place:] = data[place:] * rng.choice((0, 2, 3))
        else:
            other = rng.choice(SEEDS)
            data[place:] = other[rng.randrange(len(other)) :]
    return bytes(data[:70_000])
