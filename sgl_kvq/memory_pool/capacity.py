"""How many pages and open slots fit in a number of bytes (pure arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_kvq.config import MIN_PAGES
from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout

PAGES_PER_OPEN_SLOT = 288
"""Default concurrency: one running request for 18,432 tokens of capacity."""

MAX_OPEN_SLOTS = 2048


@dataclass(frozen=True)
class PoolPlan:
    """A sized pool of one rank. All counts are usable ones; each part has one padding entry more.

    The page that holds position 0 of a sequence takes a second page row for its sink rows. Rows for
    the running requests' first pages are set apart (`sink_pages`); those of cached sequences come
    out of `num_pages`, so that bytes alone bound how many sequences are cached.

    Args:
        layouts: Of a page row in each layer of this rank; they differ in their codings only.
        sink_tokens: Leading tokens of a sequence kept in 16 bits.
        num_pages: Pages for tokens.
        open_slots: Requests that can run at once.
    """

    layouts: tuple[PageLayout, ...]
    sink_tokens: int
    num_pages: int
    open_slots: int

    @property
    def layout(self) -> PageLayout:
        """Of the first layer; its rows, heads and format name are those of every layer."""
        return self.layouts[0]

    @property
    def num_layers(self) -> int:
        """Layers of this rank."""
        return len(self.layouts)

    @property
    def num_tokens(self) -> int:
        """Tokens that fit."""
        return self.num_pages * PAGE_SIZE

    @property
    def sink_pages(self) -> int:
        """Page rows set apart for sink rows: one for each running request."""
        return self.open_slots if self.sink_tokens else 0

    @property
    def num_rows(self) -> int:
        """Usable page rows: pages for tokens and those set apart for sink rows."""
        return self.num_pages + self.sink_pages

    @property
    def row_bytes(self) -> int:
        """Bytes of one page, all layers."""
        return sum(layout.page_bytes for layout in self.layouts)

    @property
    def page_bytes(self) -> int:
        """Bytes of all page rows, all layers."""
        return (self.num_rows + 1) * self.row_bytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes a token of a closed page takes, all layers."""
        return sum(layout.bytes_per_token for layout in self.layouts)

    @property
    def open_bytes(self) -> int:
        """Bytes of the rows of open pages, all layers."""
        return (self.open_slots + 1) * self.layout.row_page_bytes * self.num_layers

    @property
    def sink_bytes(self) -> int:
        """Bytes of the page rows set apart for sink rows, all layers."""
        return self.sink_pages * self.row_bytes

    @property
    def total_bytes(self) -> int:
        """Everything the pool allocates."""
        return self.page_bytes + self.open_bytes

    @property
    def bf16_tokens(self) -> int:
        """Tokens a 16-bit pool would hold in the same bytes."""
        return self.total_bytes * PAGE_SIZE // (self.layout.row_page_bytes * self.num_layers)

    def describe(self) -> str:
        """One line for the log: format, bytes per token, gain over 16 bits, tokens."""
        gain = self.num_tokens / self.bf16_tokens
        return (
            f"--kv-quant {self.layout.format.name}: {self.bytes_per_token:,.0f} bytes/token in "
            f"closed pages, {self.num_tokens:,} tokens in {self.total_bytes / 2**30:.3f} GiB, "
            f"{gain:.2f}x what bf16 holds ({self.bf16_tokens:,}); open pages of up to "
            f"{self.open_slots} running requests {self.open_bytes / 2**20:.1f} MiB, their sinks "
            f"{self.sink_bytes / 2**20:.1f} MiB"
        )


def plan_pool(
    budget_bytes: int,
    layouts: tuple[PageLayout, ...],
    sink_tokens: int,
    open_slots: int | None = None,
    max_tokens: int | None = None,
) -> PoolPlan:
    """Find the largest pool that fits.

    Args:
        budget_bytes: For this rank, everything included.
        layouts: Of a page row in each layer of this rank.
        sink_tokens: Rows kept in 16 bits of each first page.
        open_slots: Requests that run at once; None takes one for `PAGES_PER_OPEN_SLOT` pages.
        max_tokens: Upper limit on tokens.

    Returns:
        A plan with `total_bytes <= budget_bytes`.

    Raises:
        ConfigError: not even a few pages fit, or sink rows do not fit in a page row.
    """
    check_sink_tokens(layouts, sink_tokens)

    def plan(num_pages: int) -> PoolPlan:
        slots = open_slots
        if slots is None:
            slots = min(MAX_OPEN_SLOTS, max(2, num_pages // PAGES_PER_OPEN_SLOT))
        return PoolPlan(layouts, sink_tokens, num_pages, slots)

    low, high = 0, budget_bytes // sum(layout.page_bytes for layout in layouts)
    if max_tokens is not None:
        high = min(high, max_tokens // PAGE_SIZE)
    while low < high:
        middle = (low + high + 1) // 2
        if plan(middle).total_bytes <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    best = plan(low)
    if low < MIN_PAGES:
        need = plan(MIN_PAGES)
        raise ConfigError(
            f"--kv-quant {best.layout.format.name}: expected memory for at least {MIN_PAGES} pages "
            f"and the open pages of {need.open_slots} requests ({need.total_bytes / 2**30:.4f} "
            f"GiB), got {budget_bytes / 2**30:.4f} GiB"
            + (f" and --max-total-tokens {max_tokens}" if max_tokens is not None else "")
            + "; raise --kv-quant-memory-gb or --mem-fraction-static, or lower "
            "--max-running-requests"
        )
    return best


def check_sink_tokens(layouts: tuple[PageLayout, ...], sink_tokens: int) -> None:
    """Refuse more sink tokens than one page row holds in 16 bits.

    Args:
        layouts: Layout of a page row in each layer of this rank.
        sink_tokens: Leading tokens of a sequence kept in 16 bits.

    Raises:
        ConfigError: says how many fit.
    """
    most = min(layout.page_bytes * PAGE_SIZE // layout.row_page_bytes for layout in layouts)
    if sink_tokens > most:
        raise ConfigError(
            f"--kv-quant-sink-tokens: expected at most {most} with --kv-quant "
            f"{layouts[0].format.name}, whose pages hold that many rows in 16 bits, got "
            f"{sink_tokens}; lower it"
        )
