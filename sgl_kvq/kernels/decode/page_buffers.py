"""Pages of one head in shared memory, filled by asynchronous copies."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from sgl_kvq.kernels.common.gluon import async_copy, gl, jit
from sgl_kvq.kernels.common.layouts import (
    PAGE,
    copy_layout,
    key_words,
    meta_rows,
    num_groups,
    num_planes,
    padded_dim,
    plane_width,
    shared_layout,
    value_rows,
)


class PageBuffers(NamedTuple):
    """Shared memory for some pages of one head; the first dimension of each counts pages.

    Args:
        k_codes: int16 [stages, PAGE, key_words].
        k_scales: bfloat16 [stages, planes, 2 * key_words] with a scale a channel, otherwise
            [stages, meta_rows, PAGE], minima behind the scales.
        k_mins: bfloat16 [stages, 1, padded_dim] with a minimum a channel, otherwise `k_scales`.
        v_codes: int16 [stages, value_rows, 32].
        v_meta: bfloat16 [stages, meta_rows, PAGE], scales and minima of tokens; not to be read
            with a scale a channel.
    """

    k_codes: Any
    k_scales: Any
    k_mins: Any
    v_codes: Any
    v_meta: Any


@jit
def allocate_page(STAGES: tl.constexpr, SPEC: tl.constexpr):
    """Allocate `PageBuffers` for STAGES pages."""
    LAYOUT: tl.constexpr = shared_layout()
    k_codes = gl.allocate_shared_memory(gl.int16, [STAGES, PAGE, key_words(SPEC)], LAYOUT)
    if SPEC.k.per_channel:
        WIDTH: tl.constexpr = 2 * key_words(SPEC)
        k_scales = gl.allocate_shared_memory(
            gl.bfloat16, [STAGES, num_planes(SPEC.k), WIDTH], LAYOUT
        )
        k_mins = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, padded_dim(SPEC)], LAYOUT)
    else:
        k_scales = gl.allocate_shared_memory(
            gl.bfloat16, [STAGES, meta_rows(SPEC, SPEC.k), PAGE], LAYOUT
        )
        k_mins = k_scales
    v_codes = gl.allocate_shared_memory(gl.int16, [STAGES, value_rows(SPEC), 32], LAYOUT)
    v_meta = v_codes
    if not SPEC.v.per_channel:
        v_meta = gl.allocate_shared_memory(
            gl.bfloat16, [STAGES, meta_rows(SPEC, SPEC.v), PAGE], LAYOUT
        )
    return PageBuffers(k_codes, k_scales, k_mins, v_codes, v_meta)


@jit
def _copy_tile(
    buffer, base_ptr, wanted, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
    ALL_ROWS: tl.constexpr, ALL_COLS: tl.constexpr,
):  # fmt: skip
    """Start copying [ROWS, COLS] elements, WIDTH apart, into a buffer of [ALL_ROWS, ALL_COLS]."""
    if ROWS == ALL_ROWS and COLS == ALL_COLS and WIDTH == COLS:
        # One piece: every such copy has the same offsets in a lane, which saves address arithmetic.
        FLAT: tl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
        ptrs = base_ptr + gl.arange(0, ROWS * COLS, FLAT)
        buffer = buffer.reshape([ROWS * COLS])
        async_copy.async_copy_global_to_shared(buffer, ptrs, mask=wanted)
    else:
        LAYOUT: tl.constexpr = copy_layout(ALL_COLS)
        rows = gl.arange(0, ALL_ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
        cols = gl.arange(0, ALL_COLS, gl.SliceLayout(0, LAYOUT))[None, :]
        mask = (rows < ROWS) & (cols < COLS) & wanted
        async_copy.async_copy_global_to_shared(buffer, base_ptr + rows * WIDTH + cols, mask=mask)


@jit
def start_page(buffers, stage, head_ptr, wanted, SPEC: tl.constexpr):
    """Start copying one head's slice of a page into a stage of the buffers, if it is wanted.

    The copies are one group of `async_copy`, also when nothing is wanted.
    """
    words_ptr = head_ptr.to(gl.pointer_type(gl.int16))
    meta_ptr = head_ptr.to(gl.pointer_type(gl.bfloat16))
    WORDS: tl.constexpr = plane_width(SPEC, SPEC.k) // 2
    _copy_tile(
        buffers.k_codes.index(stage), words_ptr + SPEC.k.codes // 2, wanted,
        PAGE, WORDS, WORDS, PAGE, key_words(SPEC),
    )  # fmt: skip
    if SPEC.k.per_channel:
        PLANES: tl.constexpr = num_planes(SPEC.k)
        WIDTH: tl.constexpr = plane_width(SPEC, SPEC.k)
        _copy_tile(
            buffers.k_scales.index(stage), meta_ptr + SPEC.k.scales // 2, wanted,
            PLANES, WIDTH, WIDTH, PLANES, 2 * key_words(SPEC),
        )  # fmt: skip
        _copy_tile(
            buffers.k_mins.index(stage), meta_ptr + SPEC.k.mins // 2, wanted,
            1, SPEC.head_dim, SPEC.head_dim, 1, padded_dim(SPEC),
        )  # fmt: skip
    else:
        GROUPS: tl.constexpr = num_groups(SPEC, SPEC.k)
        _copy_tile(
            buffers.k_scales.index(stage), meta_ptr + SPEC.k.scales // 2, wanted,
            2 * GROUPS, PAGE, PAGE, meta_rows(SPEC, SPEC.k), PAGE,
        )  # fmt: skip
    ROWS: tl.constexpr = plane_width(SPEC, SPEC.v)
    _copy_tile(
        buffers.v_codes.index(stage), words_ptr + SPEC.v.codes // 2, wanted,
        ROWS, 32, 32, value_rows(SPEC), 32,
    )  # fmt: skip
    if not SPEC.v.per_channel:
        GROUPS_V: tl.constexpr = num_groups(SPEC, SPEC.v)
        _copy_tile(
            buffers.v_meta.index(stage), meta_ptr + SPEC.v.scales // 2, wanted,
            2 * GROUPS_V, PAGE, PAGE, meta_rows(SPEC, SPEC.v), PAGE,
        )  # fmt: skip
    async_copy.commit_group()
