"""What happens in one seed: instances, requests, links and faults, drawn before anything runs."""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass, field

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.transfer.options import MIN_DEADLINE_S
from sgl_kvq.transfer.prefill.pace import START_BYTES

PROFILES = {"clean": 12, "slow": 14, "cuts": 22, "misuse": 18, "chaos": 34}
CROWD_EVERY, CROWD_ROOMS = 500, (2000, 17_000)
LARGEST_BLOCK_BYTES = 2**14
"""Rows of an open page, of one head in one layer; they are not cut."""
FAST_BYTES_PER_S = 1e9
CODECS = ("wrapped", "missing", "broken")
"""Both sides have it; the decode side lacks it; the decode side says it has it and fails."""


WRONG_SOURCES = ("missing rank", "rank twice", "rank instead")
"""A prefill rank is not named, or also by a second address, beside or instead of another."""


@dataclass(frozen=True)
class RoomPlan:
    """One request.

    Args:
        key: Distinct.
        number: `bootstrap_room`; distinct unless reused.
        prefill: Instance that computes it.
        decode: Instance that receives it.
        num_tokens: Of the prompt.
        prefix_pages: Pages that the decode instance has.
        prefill_at: When the prefill instance gets it, in seconds from the start.
        decode_at: When the decode instance gets it.
        chunk_s: Time between chunks of the prefill.
        chunk_pages: Pages of a chunk.
        abort: Side and time of an abort by the user.
        fault: What is wrong with it: "prompt", "weights", "reused", "refused", or one of
            `WRONG_SOURCES`.
    """

    key: int
    number: int
    prefill: int
    decode: int
    num_tokens: int
    prefix_pages: int
    prefill_at: float
    decode_at: float
    chunk_s: float
    chunk_pages: int
    abort: tuple[str, float] | None = None
    fault: str = ""

    @property
    def num_pages(self) -> int:
        return math.ceil(self.num_tokens / PAGE_SIZE)


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Args:
        at: When, in seconds from the start.
        kind: Method of `Faults`.
        target: Chooses among what it can hit.
        duration_s: How long.
        size: Meaning depends on the kind.
    """

    at: float
    kind: str
    target: float
    duration_s: float = 0.0
    size: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """See the module.

    Args:
        strict: Whether every request without a fault of its own must succeed.
        blocks_are_quick: Whether the largest block arrives before the connection is taken as dead.
    """

    seed: int
    profile: str
    deadline_s: float
    num_heads: int
    prefill_tp: list[int]
    decode_tp: list[int]
    bytes_per_s: tuple[float, float]
    latency_s: tuple[float, float]
    block_bytes: int
    window_bytes: int
    blocks_are_quick: bool
    workers: int
    strict: bool
    codec: str = "identity"
    rooms: list[RoomPlan] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def quiet_from(self) -> float:
        """When everything has arrived and the last fault is over, in seconds from the start."""
        ends = [fault.at + fault.duration_s for fault in self.faults]
        ends += [max(room.prefill_at, room.decode_at) for room in self.rooms]
        ends += [room.abort[1] for room in self.rooms if room.abort]
        return max(ends, default=0.0)

    @property
    def has_loss(self) -> bool:
        """Whether connections break or messages are damaged."""
        return bool(self.faults)

    def __str__(self) -> str:
        faults = ", ".join(f"{fault.kind} at {fault.at:.2f}" for fault in self.faults[:12])
        return (
            f"seed {self.seed}: {self.profile}, prefill {self.prefill_tp}, "
            f"decode {self.decode_tp}, {self.num_heads} heads, {len(self.rooms)} rooms, "
            f"deadline {self.deadline_s:g} s, from {self.bytes_per_s[0] / 1000:.0f} KB/s, "
            f"codec {self.codec}; "
            f"faults: {faults or 'none'}"
        )


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = random.Random(f"scenario {seed}")
    crowd = seed % CROWD_EVERY == CROWD_EVERY // 2
    profile = "crowd" if crowd else rng.choices(list(PROFILES), list(PROFILES.values()))[0]
    deadline_s = rng.choice([MIN_DEADLINE_S, MIN_DEADLINE_S, 5.0, 8.0])
    chaotic = profile == "chaos"
    slow = profile == "slow" or (chaotic and rng.random() < 0.3)
    num_heads = rng.choice([2, 4, 4])
    prefill_tp, decode_tp = ([1], [1]) if crowd else (_sizes(rng), _sizes(rng))
    largest = LARGEST_BLOCK_BYTES * num_heads // max(min(prefill_tp), min(decode_tp))
    # A block must arrive before the connection is given up the second time, and what is sent before
    # the first acknowledgement before anything is given up.
    slowest = max(largest / (deadline_s * 2 / 3 - 1.5), START_BYTES * 3 / deadline_s)
    slowest *= 0.3 if chaotic else 1
    lone = profile == "slow" and rng.random() < 0.2
    if lone:  # one block takes longer than a connection is left silent the first time
        deadline_s, prefill_tp, decode_tp, num_heads = 8.0, [1], [1], 4
        largest = LARGEST_BLOCK_BYTES * num_heads
        slowest = largest / (deadline_s * rng.uniform(0.36, 0.5))
    low = (
        slowest
        if lone
        else slowest * 30 ** (rng.random() ** 2)
        if slow
        else 10 ** rng.uniform(6.5, 9)
    )
    scenario = Scenario(
        seed=seed,
        profile=profile,
        deadline_s=deadline_s,
        num_heads=num_heads,
        prefill_tp=prefill_tp,
        decode_tp=decode_tp,
        bytes_per_s=(low, low * (1.01 if lone else 2) if slow else FAST_BYTES_PER_S),
        latency_s=(1e-4, rng.choice([1e-3, 0.02, 0.1])),
        block_bytes=rng.choice([4096, 16384, 16384, 2**17, 2**20]),
        window_bytes=rng.choice([2**17, 2**20, 2**25]) + 2**20,
        blocks_are_quick=largest / low < deadline_s / 3 - 1.3,
        workers=rng.choice([0, 0, 2, 3]),
        strict=not chaotic,
        codec=rng.choice(["identity"] * 4 + [*CODECS]) if profile == "misuse" else "identity",
    )
    _draw_rooms(rng, scenario)
    if lone:
        plan = dataclasses.replace(scenario.rooms[0], num_tokens=63, prefix_pages=0, abort=None)
        plan = dataclasses.replace(plan, prefill_at=0.0, decode_at=0.0, chunk_s=0.0)
        scenario.rooms[:] = [plan]
    _draw_faults(rng, scenario)
    return scenario


def _sizes(rng: random.Random) -> list[int]:
    """Tensor-parallel sizes of the instances of a side, two to four ranks in all, seldom one."""
    return rng.choice([[1], [2], [2], [2], [4], [1, 1], [2, 2], [2, 1]])


def _draw_rooms(rng: random.Random, scenario: Scenario) -> None:
    profile = scenario.profile
    count = rng.choices([1, 2, 3, rng.randint(4, 12)], [30, 25, 25, 20])[0]
    if profile == "slow":
        count = min(count, 3)
    if profile == "crowd":
        count = int(rng.choice(CROWD_ROOMS) * rng.uniform(0.9, 1.1))
    window_s = rng.choice([0.0, 0.5, 3.0])
    longest = 64 * (12 if profile == "slow" else rng.choice([2, 5, 8]))
    for key in range(count):
        num_tokens = rng.choice([1, 63, 64, 65, rng.randint(1, longest), rng.randint(1, longest)])
        at = rng.uniform(0, window_s)
        delays = [rng.choice([0.0, rng.uniform(0, 0.3 * scenario.deadline_s)]), 0.0]
        rng.shuffle(delays)
        chunk_s = rng.choice([0.0, 0.02, rng.uniform(0, 0.2 * scenario.deadline_s)])
        chunk_pages = rng.choice([1, 2, 100])
        if rng.random() < 0.05:
            chunk_s, chunk_pages = 1.5 * scenario.deadline_s, 100
        abort, fault = None, ""
        if profile == "crowd":
            abort = None if key < 20 else ("decode", at + 1.3 * scenario.deadline_s)
        elif profile in ("misuse", "chaos", "slow") and rng.random() < 0.2:
            abort = (rng.choice(["prefill", "decode"]), at + rng.uniform(0, rng.choice([1, 5])))
        if profile == "misuse" and rng.random() < 0.5:
            fault = rng.choice(["prompt", "weights", "reused", "refused", *WRONG_SOURCES])
        number = rng.getrandbits(63)
        if fault == "reused" and scenario.rooms:
            number = rng.choice(scenario.rooms).number
        scenario.rooms.append(
            RoomPlan(
                key=key,
                number=number,
                prefill=rng.randrange(len(scenario.prefill_tp)),
                decode=rng.randrange(len(scenario.decode_tp)),
                num_tokens=num_tokens,
                prefix_pages=rng.choice([0, 0, 0, rng.randint(0, num_tokens // PAGE_SIZE)]),
                prefill_at=at + delays[0],
                decode_at=at + delays[1],
                chunk_s=chunk_s,
                chunk_pages=chunk_pages,
                abort=abort,
                fault=fault,
            )
        )


def _draw_faults(rng: random.Random, scenario: Scenario) -> None:
    deadline_s = scenario.deadline_s
    if scenario.profile == "cuts":
        # Few enough for the five tries of a block.
        for i in range(rng.randint(1, 3)):
            kinds = ["cut", "cut", "cut_on", "cut_on", "cut_unread", "cut_unread"]
            kind = rng.choice([*kinds, "stall", "refuse", "pause", "damage"])
            at = rng.uniform(0, 2) + 1.5 * i * deadline_s
            fault = Fault(
                at, kind, rng.random(), rng.uniform(0.05, 0.25 * deadline_s), rng.random()
            )
            scenario.faults.append(fault)
    if scenario.profile == "chaos":
        kinds = ["cut", "cut", "half_open", "stall", "refuse", "reject", "pause", "damage", "slow"]
        kinds += ["restart_prefill", "restart_decode", "no_descriptors", "cut_all"]
        kinds += ["garble", "cut_on", "cut_unread"]
        kinds = rng.sample(kinds, rng.randint(1, 4))
        for _ in range(rng.randint(1, 8)):
            duration_s = deadline_s * 10 ** rng.uniform(-2, 0.4)
            fault = Fault(
                rng.uniform(0, 8), rng.choice(kinds), rng.random(), duration_s, rng.random()
            )
            scenario.faults.append(fault)
    scenario.faults.sort(key=lambda fault: fault.at)
