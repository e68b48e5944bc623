"""Page tables of a decode step from token tables, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_kvq.kernels.common.layouts import PAGE

BLOCK: tl.constexpr = tl.constexpr(256)


@triton.jit(
    do_not_specialize=("batch", "stride_r"),
    do_not_specialize_on_alignment=("seq_lens_ptr", "rows_ptr"),
)
def _tables_fwd_kernel(
    seq_lens_ptr, rows_ptr, req_to_token_ptr, stride_r,
    open_slot_of_ptr, sink_page_of_ptr, batch, fields_ptr, stride_f, kv_indptr_ptr, kv_indices_ptr,
):  # fmt: skip
    """One program a request: its place in the table, its pages, and its slots."""
    request = tl.program_id(0)
    begin = tl.zeros([], tl.int32)
    for start in range(0, batch, BLOCK):
        other = start + tl.arange(0, BLOCK)
        lens = tl.load(seq_lens_ptr + other, mask=other < request, other=0).to(tl.int32)
        begin += tl.sum((lens + PAGE - 1) // PAGE, axis=0)
    seq_len = tl.load(seq_lens_ptr + request).to(tl.int32)
    num_pages = (seq_len + PAGE - 1) // PAGE
    tl.store(kv_indptr_ptr + request, begin)
    if request == batch - 1:
        tl.store(kv_indptr_ptr + batch, begin + num_pages)
    row_ptr = req_to_token_ptr + tl.load(rows_ptr + request).to(tl.int64) * stride_r
    for start in range(0, num_pages, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < num_pages
        page = tl.load(row_ptr + index * PAGE, mask=mask, other=0) // PAGE
        tl.store(kv_indices_ptr + begin + index, page, mask=mask)
    first_page = tl.load(row_ptr) // PAGE
    last_page = tl.load(row_ptr + seq_len - 1) // PAGE
    field_ptr = fields_ptr + request
    tl.store(field_ptr, (seq_len - 1) % PAGE + 1)
    tl.store(field_ptr + stride_f, tl.load(open_slot_of_ptr + last_page).to(tl.int32))
    tl.store(field_ptr + 2 * stride_f, tl.load(sink_page_of_ptr + first_page).to(tl.int32))
