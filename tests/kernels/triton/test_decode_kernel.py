from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.registry import format_names
from sgl_kvq.kernels.decode.api import DecodeWorkspace, decode
from sgl_kvq.kernels.decode.kernel import _decode_fwd_kernel, _decode_merge_kernel
from sgl_kvq.kernels.decode.reference import attend, read_sequence
from sgl_kvq.memory_pool.storage import PagedCache, PageTable
from tests.support.attention import CHOSEN_BITS, RandomCache, random_cache
from tests.support.sink_rows import empty_sink_rows

KERNELS = (_decode_fwd_kernel, _decode_merge_kernel)
SEQ_LENS = [1, 63, 64, 65, 200]
GPU_SEQ_LENS = [1, 63, 64, 65, 1000, 33000]


def to_device(data: RandomCache, device: str) -> RandomCache:
    def moved(tensors: object) -> dict[str, torch.Tensor]:
        return {name: value.to(device) for name, value in vars(tensors).items()}

    cache, layout = data.cache, data.layout
    sink_rows = empty_sink_rows(layout, len(cache.sink_rows), cache.sink_tokens, device)
    sink_rows.copy_(cache.sink_rows)
    return replace(
        data,
        cache=PagedCache(cache.pages.to(device), cache.open_rows.to(device), sink_rows),
        table=PageTable(**moved(data.table)),
    )


def run(
    data: RandomCache,
    q: torch.Tensor,
    num_programs: int | None = None,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode with every output and partial result poisoned beforehand."""
    workspace = DecodeWorkspace(len(q), q.shape[1], data.layout, q.device, num_programs)
    workspace.out.fill_(torch.nan)
    workspace.stats.fill_(torch.nan)
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], torch.nan, device=q.device)
    scale = q.shape[2] ** -0.5
    decode(q, data.cache, data.table, data.layout, scale, workspace, out, lse, fresh)
    return out, lse


def check(data: RandomCache, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Compare with the reference in float64, element by element.

    Budget: a score errs by 2^-10 of sum |q_c| range_c (float16 q * scale, against codes that span
    at most the channel's range); a probability by 2^-8 (16 bits, either type); the output is
    rounded to 16 bits.
    """
    scale = q.shape[2] ** -0.5
    for row in range(len(q)):
        keys, values = read_sequence(data.cache, data.table, data.layout, row)
        exact, exact_lse = attend(q[row], keys, values, scale)
        absolute, _ = attend(q[row], keys, values.abs(), scale)
        grouped = q[row].double().abs().view(keys.shape[1], -1, q.shape[2])
        spread = keys.amax(0) - keys.amin(0)  # [H, D]
        score_error = torch.einsum("hgd,hd->hg", grouped, spread).flatten() * scale * 2**-10
        budget = absolute * (2 * score_error[:, None] + 2**-8) + exact.abs() * 2**-8 + 1e-6
        assert ((out[row].double() - exact).abs() <= budget).all()
        lse_budget = score_error * math.log2(math.e) + 1e-4
        assert ((lse[row].double() - exact_lse).abs() <= lse_budget).all()


def make(
    name: str, head_dim: int, heads: int, gqa: int, lens: list[int], sinks: int, device: str
) -> tuple[RandomCache, torch.Tensor]:
    generator = torch.Generator().manual_seed(head_dim + gqa)
    data = to_device(random_cache(name, head_dim, heads, lens, sinks, generator), device)
    wide = torch.randn(len(lens), heads * gqa + 1, head_dim, generator=generator)
    return data, wide.to(torch.bfloat16).to(device)[:, 1:]  # strided


@pytest.mark.parametrize("name", format_names())
def test_against_the_reference(name: str, device: str) -> None:
    lens = GPU_SEQ_LENS if device == "cuda" else SEQ_LENS
    data, q = make(name, 128, 2, 4, lens, 4, device)
    check(data, q, *run(data, q))


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        *product(("hack2", "k4v2", "hack2-v1", "saw4", "kvq2", "kvq4"), (64, 80, 96, 256)),
        *product(CHOSEN_BITS, (64, 128)),
    ],
)
def test_head_dims(name: str, head_dim: int, device: str) -> None:
    data, q = make(name, head_dim, 1, 3, [65, 130], 4, device)
    check(data, q, *run(data, q))


@pytest.mark.parametrize("gqa", [1, 8, 16])
def test_query_groups(gqa: int, device: str) -> None:
    data, q = make("hack2", 64, 2, gqa, [65, 130], 4, device)
    check(data, q, *run(data, q))


@pytest.mark.parametrize("sinks", [0, 16])
@pytest.mark.parametrize("name", ["hack4", "bf16"])
def test_sink_tokens(name: str, sinks: int, device: str) -> None:
    data, q = make(name, 64, 1, 2, [64, 130], sinks, device)
    check(data, q, *run(data, q))


@pytest.mark.parametrize("num_programs", [1, 2, 7, 40, 500])
def test_the_number_of_pieces_does_not_matter(num_programs: int, device: str) -> None:
    data, q = make("hack2", 64, 2, 4, [1, 65, 200], 4, device)  # 86 units of work
    check(data, q, *run(data, q, num_programs))


def test_the_order_of_the_batch_does_not_matter(device: str) -> None:
    data, q = make("hack2", 64, 1, 2, [130, 65], 4, device)
    out, _ = run(data, q)
    table = data.table
    begin, middle, end = table.kv_indptr.tolist()
    swapped = PageTable(
        kv_indptr=torch.tensor([begin, end - middle, end], dtype=torch.int32, device=device),
        kv_indices=torch.cat([table.kv_indices[middle:end], table.kv_indices[begin:middle]]),
        kv_last_page_len=table.kv_last_page_len.flip(0),
        open_slots=table.open_slots.flip(0),
        sink_pages=table.sink_pages.flip(0),
    )
    other, _ = run(replace(data, table=swapped), q.flip(0), 3)
    torch.testing.assert_close(other.flip(0), out, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "head_dim", "num_programs"),
    [("hack2", 80, 7), ("saw4", 96, 3), ("kvq4", 128, 1), ("bf16", 64, 40)],
)
def test_fresh_rows_are_attended_to_and_stored(
    name: str, head_dim: int, num_programs: int, device: str
) -> None:
    """A page's 1st, 16th, 17th, 63rd and 64th row; two padding rows share page and slot 0."""
    lens = [65, 16, 17, 63, 128, 1, 1]
    data, q = make(name, head_dim, 2, 2, lens, 4, device)
    data.table.open_slots[-2:] = 0
    data.table.kv_indices[-2:] = 0
    offsets = torch.tensor(lens[:5], device=device).sub(1).remainder(PAGE_SIZE)
    fresh = (data.table.open_slots[:5].long(), slice(None), offsets)
    wide = torch.randn(2, 7, 3, 2 * head_dim, device=device).bfloat16()
    k, v = wide[:, :, 1:, :head_dim]  # strided
    rows = data.cache.open_rows
    rows[fresh] = torch.stack([k, v], 1)[:5]
    expected, expected_lse = run(data, q, num_programs)
    before = rows.clone()
    rows[fresh] = torch.nan  # an earlier owner's
    out, lse = run(data, q, num_programs, (k, v))
    assert torch.equal(out[:5], expected[:5])
    assert torch.equal(lse[:5], expected_lse[:5])
    assert torch.equal(rows[1:].view(torch.int16), before[1:].view(torch.int16))
    assert rows[0, :, 1:].isnan().all()


def test_float16_models(device: str) -> None:
    data, q = make("hack2", 64, 1, 2, [200], 4, device)
    layout = replace(data.layout, row_dtype=torch.float16)
    sinks = empty_sink_rows(layout, len(data.cache.sink_rows), data.cache.sink_tokens, device)
    sinks.copy_(data.cache.sink_rows)
    cache = replace(data.cache, open_rows=data.cache.open_rows.half(), sink_rows=sinks)
    data, q = replace(data, layout=layout, cache=cache), q.half()
    check(data, q, *run(data, q))


def test_wrong_queries_are_refused(device: str) -> None:
    data, q = make("hack2", 64, 1, 2, [65], 4, device)
    with pytest.raises(ValueError, match=r"expected at most 1 rows of torch.bfloat16"):
        run(data, q.float())
    with pytest.raises(ValueError, match=r"k: expected at most 1 rows of torch.bfloat16"):
        run(data, q, None, (q[:, :1].float(), q[:, :1]))
    with pytest.raises(ValueError, match="num_qo_heads: expected 1 to 16 times the 1 KV heads"):
        DecodeWorkspace(1, 17, data.layout, device)


def test_a_graph_replays_with_new_lengths(gpu: str) -> None:
    data, q = make("hack2", 128, 2, 4, [130, 1000], 4, gpu)
    workspace = DecodeWorkspace(2, 8, data.layout, gpu)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=gpu)
    arguments = (q, data.cache, data.table, data.layout, 0.1, workspace, out, lse)
    decode(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(*arguments)
    data.table.kv_last_page_len.fill_(1)
    out.fill_(torch.nan)
    graph.replay()
    replayed = out.clone()
    decode(*arguments)
    assert torch.equal(out, replayed)


def test_another_batch_or_length_compiles_nothing(gpu: str) -> None:
    data, q = make("hack2", 128, 2, 4, [130] * 17, 4, gpu)
    for num_programs in (1, 500):  # few and many partial results, as captured batches have
        run(data, q, num_programs)
    compiled = [len(kernel.device_caches[0][0]) for kernel in KERNELS]
    for batch in (1, 2, 16):
        table = replace(
            data.table,
            kv_indptr=data.table.kv_indptr[: batch + 1],
            kv_indices=data.table.kv_indices[: 3 * batch],
            kv_last_page_len=data.table.kv_last_page_len[:batch] - 1,
            open_slots=data.table.open_slots[:batch],
            sink_pages=data.table.sink_pages[1 : batch + 1],
        )
        run(replace(data, table=table), q[:batch], 7 * batch)
    assert [len(kernel.device_caches[0][0]) for kernel in KERNELS] == compiled


def test_a_pool_beyond_2_31_bytes(gpu: str) -> None:
    data, q = make("hack2", 128, 8, 4, [300], 4, gpu)
    num_pages = 2**31 // data.layout.page_bytes + 100
    big = torch.full((num_pages, data.layout.page_bytes), 0xFF, dtype=torch.uint8, device=gpu)
    far = num_pages - 1 - torch.arange(len(data.table.kv_indices), device=gpu)
    big[far] = data.cache.pages[data.table.kv_indices.long()]
    table = replace(data.table, kv_indices=far.int())
    moved = replace(data, cache=replace(data.cache, pages=big), table=table)
    check(moved, q, *run(moved, q))


def test_merges_with_flashinfer(gpu: str) -> None:
    flashinfer = pytest.importorskip("flashinfer")
    data, q = make("hack2", 128, 2, 4, [500], 4, gpu)
    out, lse = run(data, q)
    keys, values = (torch.randn(70, 2, 128, device=gpu).bfloat16() for _ in range(2))
    other, other_lse = (x[None] for x in attend(q[0], keys, values, 128**-0.5))
    merged, _ = flashinfer.merge_state(out, lse, other.bfloat16(), other_lse.float())
    own = read_sequence(data.cache, data.table, data.layout, 0)
    both = [torch.cat([a, b.double()]) for a, b in zip(own, (keys, values), strict=True)]
    exact, _ = attend(q[0], *both, 128**-0.5)
    assert (merged[0].double() - exact).norm() < 2**-6 * exact.norm()
