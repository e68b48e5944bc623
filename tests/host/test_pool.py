from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sgl_kvq.errors import KvqError, PoolExhaustedError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.host.allocator import KvqCpuPagedAllocator
from sgl_kvq.host.pool import QuantizedKVPool
from sgl_kvq.memory_pool.capacity import PoolPlan, plan_pool


def make(num_pages: int = 20, open_slots: int = 3) -> tuple[QuantizedKVPool, KvqCpuPagedAllocator]:
    layout = PageLayout(get_format("hack2"), 64, 2)
    pool = QuantizedKVPool(PoolPlan((layout,) * 2, 4, num_pages, open_slots), device="cpu")
    allocator = KvqCpuPagedAllocator(
        pool.size, PAGE_SIZE, torch.bfloat16, "cpu", pool, need_sort=False
    )
    return pool, allocator


def extend(
    allocator: KvqCpuPagedAllocator, prefix: list[int], seq: list[int], last: list[int]
) -> torch.Tensor | None:
    lens = torch.tensor(prefix), torch.tensor(seq)
    return allocator.alloc_extend(
        lens[0], lens[0], lens[1], lens[1], torch.tensor(last), int((lens[1] - lens[0]).sum())
    )


def used(pool: QuantizedKVPool) -> tuple[int, int]:
    return pool.store.open_slots.num_used(), pool.store.sink_pages.num_used()


def test_life_of_a_request() -> None:
    pool, allocator = make()
    out = extend(allocator, [0], [100], [-1])
    assert out is not None
    assert used(pool) == (1, 1)
    loc = out[-1:]
    slots = out.tolist()
    for seq_len in range(101, 200):
        loc = allocator.alloc_decode(torch.tensor([seq_len]), torch.tensor([seq_len]), loc)
        assert loc is not None
        slots += loc.tolist()
        # The step that writes a page's 64th token still finds its rows, but no longer owns them.
        assert used(pool) == (0 if seq_len % PAGE_SIZE == 0 else 1, 1)
        assert int(pool.store.open_slots.step_view()[loc // PAGE_SIZE]) > 0
    assert [s % PAGE_SIZE for s in slots] == [i % PAGE_SIZE for i in range(199)]
    allocator.free(torch.tensor(slots))
    assert used(pool) == (0, 0)
    assert allocator.available_size() == pool.size


def test_prompt_of_whole_pages_holds_no_open_slot() -> None:
    pool, allocator = make()
    extend(allocator, [0], [128], [-1])
    assert used(pool) == (0, 1)


def test_resumed_page_moves_or_gives_up_its_slot() -> None:
    pool, allocator = make()
    first = extend(allocator, [0], [70], [-1])
    assert first is not None
    slot = int(pool.store.open_slots.step_view()[first[-1] // PAGE_SIZE])
    more = extend(allocator, [70], [200], [int(first[-1])])
    assert more is not None
    assert int(pool.store.open_slots.held_slot(more[-1:] // PAGE_SIZE)) == slot
    assert used(pool) == (1, 1)
    extend(allocator, [200], [256], [int(more[-1])])
    assert used(pool) == (0, 1)


def test_full_pool_returns_none_and_takes_no_slot() -> None:
    pool, allocator = make(num_pages=4)
    assert extend(allocator, [0], [300], [-1]) is None
    assert used(pool) == (0, 0)
    assert allocator.available_size() == pool.size


def test_more_requests_than_slots_fail_loudly() -> None:
    _, allocator = make(open_slots=1)
    extend(allocator, [0], [10], [-1])
    with pytest.raises(PoolExhaustedError, match="open pages: 1 slots wanted, 0 of 1 free"):
        extend(allocator, [0], [10], [-1])


def fill(pool: QuantizedKVPool) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer_id in range(2):
        layer = pool.store.layer(layer_id)
        layer.pages.random_(0, 256, generator=generator)
        layer.open_rows.normal_(generator=generator)
        layer.sink_rows.normal_(generator=generator)


def test_cpu_copy_brings_a_request_back_elsewhere() -> None:
    pool, allocator = make()
    old = extend(allocator, [0], [150], [-1])
    assert old is not None
    fill(pool)
    copy = pool.get_cpu_copy(old)
    new = extend(allocator, [0], [150], [-1])
    assert new is not None
    allocator.free(old)
    pool.load_cpu_copy(copy, new)
    for layer_id in range(2):
        layer = pool.store.layer(layer_id)
        pages = new[::PAGE_SIZE] // PAGE_SIZE
        assert torch.equal(layer.pages[pages], copy["pages"][layer_id])
        slot = pool.store.open_slots.held_slot(pages[-1:])
        assert torch.equal(layer.open_rows[slot], copy["open_rows"][layer_id])
        sink = pool.store.sink_pages.held_slot(pages[:1])
        assert torch.equal(layer.sink_rows[sink], copy["sink_rows"][layer_id])
    with pytest.raises(ValueError, match="expected 150 slots, got 149"):
        pool.load_cpu_copy(copy, new[:-1])


def test_cpu_copy_of_whole_pages_leaves_the_slots_of_neighbours_alone() -> None:
    """A page that closed keeps a stale entry to a slot that a running neighbour may hold by now."""
    pool, allocator = make(num_pages=50, open_slots=1)
    for _ in range(50):  # every page's table entry points at the one slot
        page = extend(allocator, [0], [10], [-1])
        assert page is not None
        allocator.free(page)
    retracted = extend(allocator, [0], [2 * PAGE_SIZE], [-1])
    assert retracted is not None
    neighbour = extend(allocator, [0], [10], [-1])
    assert neighbour is not None
    fill(pool)
    before = [layer.open_rows.clone() for layer in pool.store.layers]
    copy = pool.get_cpu_copy(retracted)
    for layer in copy["open_rows"]:
        layer.fill_(float("nan"))
    pool.load_cpu_copy(copy, retracted)
    slot = pool.store.open_slots.held_slot(neighbour[-1:] // PAGE_SIZE)
    assert int(slot) > 0
    for layer, rows in zip(pool.store.layers, before, strict=True):
        assert torch.equal(layer.open_rows[slot], rows[slot])


def test_move_kv_cache() -> None:
    pool, allocator = make()
    a, b = extend(allocator, [0], [90], [-1]), extend(allocator, [0], [90], [-1])
    assert a is not None
    assert b is not None
    fill(pool)
    rows = [pool.store.layer(i).open_rows.clone() for i in range(2)]
    pool.move_kv_cache(b[64:70], a[70:76])
    slot_a, slot_b = (int(pool.store.open_slots.step_view()[x[-1] // PAGE_SIZE]) for x in (a, b))
    for i in range(2):
        assert torch.equal(pool.store.layer(i).open_rows[slot_b, :, 0:6], rows[i][slot_a, :, 6:12])
    page_a, page_b = int(a[0]) // PAGE_SIZE, int(b[0]) // PAGE_SIZE
    pool.move_kv_cache(b[:64], a[:64])
    sink_a, sink_b = (int(pool.store.sink_pages.step_view()[p]) for p in (page_a, page_b))
    for i in range(2):
        layer = pool.store.layer(i)
        assert torch.equal(layer.pages[page_b], layer.pages[page_a])
        assert torch.equal(layer.sink_rows[sink_b], layer.sink_rows[sink_a])
    with pytest.raises(ValueError, match="that split a closed page"):
        pool.move_kv_cache(b[:10], a[:10])


def test_raw_access_is_refused() -> None:
    pool, _ = make()
    for access in (pool.get_key_buffer, pool.get_value_buffer, pool.get_kv_buffer):
        with pytest.raises(KvqError, match="outside of the kvq attention backend"):
            access(0)


def test_clear_frees_everything() -> None:
    pool, allocator = make()
    extend(allocator, [0, 0], [10, 200], [-1, -1])
    allocator.clear()
    assert used(pool) == (0, 0)
    assert allocator.available_size() == pool.size


def test_a_prompt_that_is_there_in_whole_takes_nothing() -> None:
    """A decode instance allocates for a prompt whose pages are all in its radix tree."""
    pool, allocator = make()
    out = extend(allocator, [0], [128], [-1])
    assert out is not None
    before = used(pool), allocator.available_size()
    nothing = extend(allocator, [128], [128], [int(out[-1])])
    assert nothing is not None
    assert len(nothing) == 0
    assert (used(pool), allocator.available_size()) == before


def test_contiguous_buffers_describe_one_row_a_page_and_layer() -> None:
    layout = PageLayout(get_format("hack4"), 64, 2)
    plan = plan_pool(8 << 20, (layout,) * 3, 4, open_slots=2)
    pool = QuantizedKVPool(plan, device="cpu", start_layer=5)
    addresses, sizes, item_sizes = pool.get_contiguous_buf_infos()
    assert len(addresses) == len(set(addresses)) == 3
    assert item_sizes == [layout.page_bytes] * 3
    assert sizes == [(pool.plan.num_rows + 1) * layout.page_bytes] * 3
    assert pool.store.layer(6).pages.data_ptr() == addresses[1]
    assert pool.store.layer(5).open_rows.dtype == torch.bfloat16


def test_models_leave_writing_to_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-MoE, gpt-oss and others fuse RoPE with a store to 16-bit buffers, which we lack."""
    from sglang.srt.models import utils

    pool = make()[0]
    monkeypatch.setattr(utils, "_is_cuda", True)
    monkeypatch.setattr(utils, "get_token_to_kv_pool", lambda: pool)
    monkeypatch.setattr(utils, "is_prefill_context_parallel_enabled", lambda: False, raising=False)
    monkeypatch.setattr(utils, "is_cp_active", lambda batch: False, raising=False)
    assert not utils.enable_fused_set_kv_buffer(SimpleNamespace(dcp_kv_mask=None))
