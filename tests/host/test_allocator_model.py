"""Allocator, slots, sink rows and pool copies against a model that remembers who holds what."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.host.allocator import KvqCpuPagedAllocator
from sgl_kvq.host.names import EvictParams
from sgl_kvq.host.pool import QuantizedKVPool
from sgl_kvq.memory_pool.capacity import PoolPlan

NUM_PAGES, OPEN_SLOTS, SINK_TOKENS = 16, 3, 4
LENGTHS = st.sampled_from((64, 64, 128, 1, 63, 65, 100, 192, 300))


@dataclass(eq=False)
class Sequence:
    """A sequence's token slots, and what its 16-bit rows were filled with."""

    slots: torch.Tensor
    mark: float
    pages: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.pages = (self.slots[::PAGE_SIZE] // PAGE_SIZE).tolist()


class Cache:
    """Cached sequences, oldest first, behind the calls that the allocator makes."""

    def __init__(self, allocator: KvqCpuPagedAllocator) -> None:
        self.allocator = allocator
        self.sequences: list[Sequence] = []

    def evictable_size(self) -> int:
        return sum(len(sequence.slots) for sequence in self.sequences)

    def evict(self, params: EvictParams) -> None:
        freed = 0
        while self.sequences and freed < params.num_tokens:
            slots = self.sequences.pop(0).slots
            freed += len(slots)
            self.allocator.free(slots)


class AllocatorMachine(RuleBasedStateMachine):
    """Requests start, grow, retract to the host, resume, finish into the cache or end."""

    def __init__(self) -> None:
        super().__init__()
        layout = PageLayout(get_format("hack2"), 64, 1)
        plan = PoolPlan((layout,), SINK_TOKENS, NUM_PAGES, OPEN_SLOTS)
        self.pool = QuantizedKVPool(plan, device="cpu")
        self.store = self.pool.store
        self.allocator = KvqCpuPagedAllocator(
            self.pool.size, PAGE_SIZE, torch.bfloat16, "cpu", self.pool, need_sort=False
        )
        self.cache = Cache(self.allocator)
        self.allocator.evictable_cache = self.cache
        self.running: list[Sequence] = []
        self.retracted: list[tuple[dict, float]] = []
        self.marks = iter(range(1, 10**6))
        self.random = random.Random(0)

    def host_makes_room(self, num_tokens: int) -> bool:
        """What SGLang does before it allocates: evict, then look whether it fits."""
        missing = num_tokens - self.allocator.available_size()
        if missing > 0:
            self.cache.evict(EvictParams(num_tokens=missing))
        return self.allocator.available_size() >= num_tokens

    def extend(self, before: torch.Tensor, num_new: int) -> torch.Tensor | None:
        old, new = torch.tensor([len(before)]), torch.tensor([len(before) + num_new])
        last = before[-1:] if len(before) else torch.tensor([-1])
        if not self.host_makes_room(num_new + PAGE_SIZE):
            return None
        out = self.allocator.alloc_extend(old, old, new, new, last, num_new)
        assert out is not None, "what SGLang counts as free must be there"
        return torch.cat([before, out])

    def fill(self, sequence: Sequence) -> None:
        """Mark the rows that this sequence alone may read and write."""
        cache = self.store.layers[0]
        first, last = (torch.tensor([sequence.pages[i]]) for i in (0, -1))
        cache.sink_rows[self.store.sink_pages.held_slot(first)] = sequence.mark
        if len(sequence.slots) % PAGE_SIZE:
            cache.open_rows[self.store.open_slots.held_slot(last)] = sequence.mark

    @precondition(lambda self: len(self.running) < OPEN_SLOTS)
    @rule(num_tokens=LENGTHS)
    def start(self, num_tokens: int) -> None:
        slots = self.extend(torch.empty(0, dtype=torch.int64), num_tokens)
        if slots is not None:
            self.running.append(Sequence(slots, float(next(self.marks) % 251)))
            self.fill(self.running[-1])

    @precondition(lambda self: self.running)
    @rule(num_tokens=LENGTHS)
    def next_chunk(self, num_tokens: int) -> None:
        old = self.running.pop(0)
        slots = self.extend(old.slots, num_tokens)
        self.running.append(old if slots is None else Sequence(slots, old.mark))
        self.fill(self.running[-1])

    @precondition(lambda self: self.running)
    @rule(steps=st.sampled_from((1, 2, 30, PAGE_SIZE)))
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            if not self.host_makes_room(len(self.running) * PAGE_SIZE):
                break
            lens = torch.tensor([len(sequence.slots) + 1 for sequence in self.running])
            last = torch.cat([sequence.slots[-1:] for sequence in self.running])
            out = self.allocator.alloc_decode(lens, lens, last)
            assert out is not None
            self.running = [
                Sequence(torch.cat([sequence.slots, slot[None]]), sequence.mark)
                for sequence, slot in zip(self.running, out, strict=True)
            ]
        for sequence in self.running:
            self.fill(sequence)

    @precondition(lambda self: self.running)
    @rule(cached=st.booleans())
    def finish(self, cached: bool) -> None:
        """Whole pages go to the cache, the rest is freed, as the radix cache does it."""
        sequence = self.running.pop(self.random.randrange(len(self.running)))
        kept = len(sequence.slots) // PAGE_SIZE * PAGE_SIZE if cached else 0
        self.allocator.free(sequence.slots[kept:])
        if kept:
            self.cache.sequences.append(Sequence(sequence.slots[:kept], sequence.mark))

    @precondition(lambda self: self.running)
    @rule()
    def retract(self) -> None:
        whole = [s for s in self.running if len(s.slots) % PAGE_SIZE == 0]
        sequence = (whole or self.running)[-1]
        self.running.remove(sequence)
        copy = self.pool.get_cpu_copy(sequence.slots)
        self.retracted.append((copy, sequence.mark))
        self.allocator.free(sequence.slots)

    @precondition(lambda self: self.retracted and len(self.running) < OPEN_SLOTS)
    @rule()
    def resume(self) -> None:
        copy, mark = self.retracted[0]
        slots = self.extend(torch.empty(0, dtype=torch.int64), copy["num_tokens"])
        if slots is not None:
            self.retracted.pop(0)
            self.pool.load_cpu_copy(copy, slots)
            self.running.append(Sequence(slots, mark))

    @precondition(lambda self: len(self.cache.sequences) > NUM_PAGES // 2)
    @rule()
    def flush(self) -> None:
        self.cache.evict(EvictParams(num_tokens=10**9))

    @invariant()
    def every_page_row_is_held_once(self) -> None:
        held = [page for s in (*self.running, *self.cache.sequences) for page in s.pages]
        sinks = self.store.sink_pages.held_slot(torch.tensor(held, dtype=torch.int64))
        sinks = sinks[sinks > 0].tolist()
        # Pages that wait to be sorted: a list of tensors from SGLang 0.5.20, one tensor before.
        waiting = getattr(self.allocator, "staged_pages", [self.allocator.release_pages])
        free = torch.cat([self.allocator.free_pages, *waiting]).tolist()
        assert len({*held, *sinks, *free}) == len(held) + len(sinks) + len(free)
        given_up = self.store.sink_pages.num_held - len(sinks)
        assert len(held) + len(sinks) + len(free) + given_up == self.store.plan.num_rows
        assert self.allocator.available_size() == (NUM_PAGES - len(held)) * PAGE_SIZE

    @invariant()
    def rows_are_those_of_their_sequence(self) -> None:
        cache, slots = self.store.layers[0], set()
        for sequence in (*self.running, *self.cache.sequences):
            row = int(self.store.sink_pages.held_slot(torch.tensor(sequence.pages[:1])))
            assert row > 0
            assert (cache.sink_rows[row] == sequence.mark).all()
        for sequence in self.running:
            if len(sequence.slots) % PAGE_SIZE == 0:
                continue
            slot = int(self.store.open_slots.held_slot(torch.tensor(sequence.pages[-1:])))
            assert slot > 0
            slots.add(slot)
            assert (cache.open_rows[slot] == sequence.mark).all()
        assert len(slots) == self.store.open_slots.num_used()

    def teardown(self) -> None:
        for sequence in self.running:
            self.allocator.free(sequence.slots)
        self.cache.evict(EvictParams(num_tokens=10**9))
        assert self.allocator.available_size() == NUM_PAGES * PAGE_SIZE
        assert self.store.open_slots.num_used() == self.store.sink_pages.num_used() == 0


AllocatorMachine.TestCase.settings = settings(
    max_examples=50, stateful_step_count=50, deadline=None
)
TestAllocator = AllocatorMachine.TestCase
