"""Random rows on which `python -m sgl_kvq check` runs the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.page_layout import PageLayout

SEQ_LENS = (1, 64, 200, 1000)
SINK_TOKENS = 4
GQA_GROUP = 4


@dataclass(frozen=True)
class Sample:
    """Rows of a batch, one request after the other, and where they belong.

    Args:
        k: [tokens, num_kv_heads, head_dim] on the device.
        v: Like k.
        pages: int64 [total pages] on the host, shuffled ids, in order of position.
        lengths: Rows of each of them, 1 to 64.
        is_first: Whether each holds position 0.
        is_last: Whether each is its request's last page.
    """

    k: torch.Tensor
    v: torch.Tensor
    pages: torch.Tensor
    lengths: list[int]
    is_first: list[bool]
    is_last: list[bool]

    def pages_of(self) -> list[torch.Tensor]:
        """Pages of each sequence."""
        return list(self.pages.split([-(-seq_len // PAGE_SIZE) for seq_len in SEQ_LENS]))


def make_sample(layout: PageLayout, device: str) -> Sample:
    """Make rows whose channels differ in size, as keys' do, in shuffled pages."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(SEQ_LENS), layout.num_kv_heads, layout.head_dim)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    k = k * torch.exp(0.7 * torch.randn(shape[1:], generator=generator))  # channels differ
    lengths, is_first, is_last = [], [], []
    for seq_len in SEQ_LENS:
        starts = range(0, seq_len, PAGE_SIZE)
        lengths += [min(PAGE_SIZE, seq_len - start) for start in starts]
        is_first += [start == 0 for start in starts]
        is_last += [start + PAGE_SIZE >= seq_len for start in starts]
    pages = torch.randperm(2 * len(lengths), generator=generator)[: len(lengths)] + 1
    dtype = layout.row_dtype
    return Sample(k.to(device, dtype), v.to(device, dtype), pages, lengths, is_first, is_last)
