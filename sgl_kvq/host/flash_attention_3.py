"""FlashAttention-3 (`sgl_kernel`) over the scratch buffer."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch

from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.kernels.common.upload import copy_from_host, upload_columns
from sgl_kvq.kernels.extend.flashinfer_attention import FlashInferAttention
from sgl_kvq.kernels.extend.passes import AttentionPass, IntArray
from sgl_kvq.kernels.extend.prefill_attention import AttentionShape, PrefillAttention

HOPPER = 9  # major compute capability
LOG2_E = 1.4426950408889634
QUERY_TILE = 128  # rows of a tile: queries of the heads that share a KV head
HEURISTIC_SPLITS = 0  # FlashAttention-3 splits the keys when the queries leave multiprocessors idle


def make_prefill_attention(shape: AttentionShape, device: torch.device | str) -> PrefillAttention:
    """FlashAttention-3 on Hopper, as SGLang chooses there, FlashInfer elsewhere.

    FlashAttention-3 comes compiled, needs no plan on the host, and splits the keys when there are
    few queries.
    """
    if torch.cuda.get_device_capability(device)[0] == HOPPER:
        return FlashAttention3(shape, device)
    return FlashInferAttention(shape, device)


class PlannedPass(NamedTuple):
    """Arguments of a call that depend on the lengths.

    Args:
        cu_seqlens_q: int32 [n + 1] on the device.
        max_seqlen_q: Longest sequence of queries.
        cu_seqlens_k: int32 [n + 1] on the device; keys of a sequence lie in one piece.
        max_seqlen_k: Longest sequence of keys.
        page_table: int32 [n, pages] on the device; None: `cu_seqlens_k` says where keys are.
        cache_seqlens: int32 [n] on the device, keys of each sequence; with `page_table` only.
        num_splits: Most pieces that the keys of a sequence are cut into.
    """

    cu_seqlens_q: torch.Tensor
    max_seqlen_q: int
    cu_seqlens_k: torch.Tensor
    max_seqlen_k: int
    page_table: torch.Tensor | None
    cache_seqlens: torch.Tensor | None
    num_splits: int = HEURISTIC_SPLITS


class FlashAttention3:
    """A `PrefillAttention`: one call a pass, nothing planned but the lengths.

    Args:
        shape: Heads and numbers of the layers.
        device: A Hopper GPU.
    """

    def __init__(self, shape: AttentionShape, device: torch.device | str) -> None:
        self._shape = shape
        self._device = torch.device(device)
        self._planned: list[PlannedPass] = []
        self._captured: torch.Tensor | None = None
        self._library: Any = import_module("sgl_kernel.flash_attn")  # only with its GPU code

    def plan(self, passes: list[AttentionPass]) -> None:
        """Bring the lengths to the device, in one copy."""
        columns: dict[str, IntArray] = {}
        for index, step in enumerate(passes):
            columns[f"q{index}"] = step.qo_indptr
            columns[f"k{index}"] = step.kv_indptr
            if step.kv_indices is not None:
                columns[f"table{index}"] = _page_table(step).ravel()
                columns[f"lens{index}"] = _key_lens(step)
        on_device = upload_columns(columns, self._device)
        self._planned = []
        for index, step in enumerate(passes):
            table = on_device.get(f"table{index}")
            lens = np.diff(step.kv_indptr) if step.kv_indices is None else _key_lens(step)
            self._planned.append(
                PlannedPass(
                    cu_seqlens_q=on_device[f"q{index}"],
                    max_seqlen_q=int(np.diff(step.qo_indptr).max()),
                    cu_seqlens_k=on_device[f"k{index}"],
                    max_seqlen_k=int(lens.max()),
                    page_table=None if table is None else table.view(len(lens), -1),
                    cache_seqlens=on_device.get(f"lens{index}"),
                )
            )

    def plan_capture(self, max_sequences: int, max_queries: int, max_keys: int) -> None:
        """Run the next passes within these bounds; see `CapturableAttention`."""
        if self._captured is None:
            self._captured = torch.zeros(
                (2, max_sequences + 1), dtype=torch.int32, device=self._device
            )
        cu_seqlens_q, cu_seqlens_k = self._captured
        splits = self._splits(max_queries)
        self._planned = [
            PlannedPass(cu_seqlens_q, max_queries, cu_seqlens_k, max_keys, None, None, splits)
        ]

    def _splits(self, num_queries: int) -> int:
        """Pieces of the keys that occupy every multiprocessor once.

        The heuristic would choose for the most keys, and merging many pieces takes long.
        """
        shape = self._shape
        group = shape.num_qo_heads // shape.num_kv_heads
        tiles = -(-num_queries * group // QUERY_TILE) * shape.num_kv_heads
        properties = torch.cuda.get_device_properties(self._device)
        return max(1, int(properties.multi_processor_count) // tiles)

    def plan_replay(self, step: AttentionPass) -> None:
        """Give the lengths to captured calls and to the next `run`; see `CapturableAttention`."""
        assert self._captured is not None
        lens = np.empty(self._captured.shape, np.int32)
        for row, indptr in zip(lens, (step.qo_indptr, step.kv_indptr), strict=True):
            row[: len(indptr)] = indptr
            row[len(indptr) :] = indptr[-1]  # sequences of no tokens
        copy_from_host(self._captured, lens)
        longest_q, longest_k = (int(np.diff(x).max()) for x in (step.qo_indptr, step.kv_indptr))
        cu_seqlens_q, cu_seqlens_k = self._captured
        self._planned = [PlannedPass(cu_seqlens_q, longest_q, cu_seqlens_k, longest_k, None, None)]

    def run(
        self,
        index: int,
        step: AttentionPass,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Attend in one layer; see `PrefillAttention`."""
        planned = self._planned[index]
        common: dict[str, Any] = {
            "cu_seqlens_q": planned.cu_seqlens_q,
            "max_seqlen_q": planned.max_seqlen_q,
            "softmax_scale": self._shape.sm_scale,
            "causal": step.causal,
            "num_splits": planned.num_splits,
            "return_softmax_lse": True,
            "out": out,
        }
        if planned.page_table is None:
            _, natural, *_ = self._library.flash_attn_varlen_func(
                q,
                k,
                v,
                cu_seqlens_k=planned.cu_seqlens_k,
                max_seqlen_k=planned.max_seqlen_k,
                **common,
            )
        else:
            keys, values = (x.unflatten(0, (-1, PAGE_SIZE)) for x in (k, v))
            _, natural, *_ = self._library.flash_attn_with_kvcache(
                q,
                keys,
                values,
                page_table=planned.page_table,
                cache_seqlens=planned.cache_seqlens,
                **common,
            )
        if lse is not None:  # [num_qo_heads, tokens], natural logarithm
            torch.mul(natural.T, LOG2_E, out=lse)


def _key_lens(step: AttentionPass) -> IntArray:
    """int32 [n], keys of each sequence of a paged pass."""
    num_pages = np.diff(step.kv_indptr)
    assert step.kv_last_page_len is not None
    return np.where(num_pages > 0, (num_pages - 1) * PAGE_SIZE + step.kv_last_page_len, 0).astype(
        np.int32
    )


def _page_table(step: AttentionPass) -> IntArray:
    """int32 [n, most pages of a sequence], the pages of each sequence, padded with page 0."""
    num_pages = np.diff(step.kv_indptr)
    table = np.zeros((len(num_pages), max(1, int(num_pages.max()))), np.int32)
    assert step.kv_indices is not None
    table[np.arange(table.shape[1]) < num_pages[:, None]] = step.kv_indices
    return table
