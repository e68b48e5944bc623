from __future__ import annotations

import pytest

from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.families.kvq import kvq_format
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import format_names, get_format
from sgl_kvq.memory_pool.capacity import plan_pool
from sgl_kvq.memory_pool.store import PagedStore

SMOLLM2 = {"head_dim": 64, "num_kv_heads": 3}
BITS_BY_LAYER = ((2, 4, 2), (2, 4, 2), (4, 5, 4))  # as `calibrate --budget-bits` chooses
BF16_TOKEN_BYTES = 30 * 3 * 64 * 2 * 2


@pytest.mark.parametrize("bf16_tokens", [20_000, 50_000, 423_494])
@pytest.mark.parametrize(("name", "gain"), [("hack2", 6.1), ("hack4", 3.45), ("kivi4", 3.4)])
def test_gain_over_bf16_counts_everything(name: str, gain: float, bf16_tokens: int) -> None:
    budget = bf16_tokens * BF16_TOKEN_BYTES
    plan = plan_pool(budget, (PageLayout(get_format(name), **SMOLLM2),) * 30, sink_tokens=4)
    assert plan.total_bytes <= budget
    assert plan.num_tokens >= gain * bf16_tokens


@pytest.mark.parametrize("sink_tokens", [0, 4])
@pytest.mark.parametrize("name", format_names())
def test_plan_is_what_the_pool_allocates(name: str, sink_tokens: int) -> None:
    layout = PageLayout(get_format(name), 64, 2)
    plan = plan_pool(8 << 20, (layout,) * 2, sink_tokens, open_slots=5)
    pool = PagedStore(plan, device="cpu")
    tensors = [t for i in range(2) for t in (pool.layer(i).pages, pool.layer(i).open_rows)]
    assert sum(t.nbytes for t in tensors) == plan.total_bytes
    one_more = plan_pool(8 << 20, (layout,) * 2, sink_tokens, 5, max_tokens=plan.num_tokens + 64)
    assert one_more.num_pages == plan.num_pages  # nothing fits any more


def test_layers_may_have_pages_of_different_sizes() -> None:
    layouts = tuple(PageLayout(kvq_format("kvq2", *bits), 64, 2) for bits in BITS_BY_LAYER)
    plan = plan_pool(8 << 20, layouts, 4, open_slots=5)
    pool = PagedStore(plan, device="cpu", start_layer=7)
    tensors = [t for layer in pool.layers for t in (layer.pages, layer.open_rows)]
    assert sum(t.nbytes for t in tensors) == plan.total_bytes <= 8 << 20
    small, _, large = (layout.page_bytes for layout in layouts)
    assert pool.layout_of(9) == layouts[2]
    assert plan.bytes_per_token == (2 * small + large) / 64
    assert f"{plan.bytes_per_token:,.0f} bytes/token" in plan.describe()


def test_limits_and_refusals() -> None:
    layouts = (PageLayout(get_format("hack2"), **SMOLLM2),) * 30
    assert plan_pool(1 << 30, layouts, 4, max_tokens=1000).num_tokens == 960
    assert plan_pool(1 << 30, layouts, 4, open_slots=50).open_slots == 50
    with pytest.raises(ConfigError, match=r"expected memory for at least 4 pages.*raise"):
        plan_pool(1 << 20, layouts, 4)
    with pytest.raises(ConfigError, match="--max-total-tokens 64"):
        plan_pool(1 << 30, layouts, 4, max_tokens=64)


def test_start_line_says_what_fits() -> None:
    plan = plan_pool(460_800_000, (PageLayout(get_format("hack2"), **SMOLLM2),) * 30, 4)
    line = plan.describe()
    assert "--kv-quant hack2: 3,600 bytes/token" in line
    assert f"{plan.num_tokens:,} tokens" in line
    assert f"{plan.num_tokens / plan.bf16_tokens:.2f}x what bf16 holds" in line
