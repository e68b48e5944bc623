"""SGLang's paged allocator for a CPU, where no Triton kernel can run."""

from __future__ import annotations

import torch

from sgl_kvq.host.names import PagedTokenToKVPoolAllocator, alloc_extend_naive, get_num_new_pages


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's paged allocator without its Triton kernels, which need a GPU."""

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Allocate slots for fresh tokens; see `PagedTokenToKVPoolAllocator.alloc_extend`.

        Returns:
            int64 [extend_num_tokens] slots, or None when too few pages are free.
        """
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if num_new_pages > len(self.free_pages):
            self.merge_and_sort_free()
        if num_new_pages > len(self.free_pages):
            return None
        out = torch.empty((extend_num_tokens,), dtype=torch.int64, device=self.device)
        alloc_extend_naive(
            prefix_lens, seq_lens, last_loc, self.free_pages, out, self.page_size, self.device
        )
        self.free_pages = self.free_pages[num_new_pages:]
        return out

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """Allocate one slot a request; see `PagedTokenToKVPoolAllocator.alloc_decode`.

        Returns:
            int64 [batch] slots, or None when too few pages are free.
        """
        begins_page = (seq_lens - 1) % self.page_size == 0
        num_new_pages = int(((seq_lens_cpu - 1) % self.page_size == 0).sum())
        if num_new_pages > len(self.free_pages):
            self.merge_and_sort_free()
        if num_new_pages > len(self.free_pages):
            return None
        out = last_loc.to(torch.int64) + 1
        out[begins_page] = self.free_pages[:num_new_pages] * self.page_size
        self.free_pages = self.free_pages[num_new_pages:]
        return out
