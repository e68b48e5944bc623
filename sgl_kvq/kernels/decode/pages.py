"""Attention to closed pages: scores and outputs computed from the codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from sgl_kvq.kernels.common.gluon import async_copy, barrier, gl, jit, mma_v2
from sgl_kvq.kernels.common.layouts import (
    PAGE,
    a_layout,
    b_layout,
    channel_meta_layout,
    channel_vector_layout,
    is_inside,
    key_code_layout,
    mma_layout,
    num_groups,
    num_planes,
    overlaps,
    padded_dim,
    plane_scale,
    plane_width,
    value_code_layout,
    value_rows,
)
from sgl_kvq.kernels.decode.extra_bits import add_extra, fetch_extra
from sgl_kvq.kernels.decode.page_buffers import start_page
from sgl_kvq.kernels.decode.softmax import HEADROOM, SoftmaxState, rescale
from sgl_kvq.kernels.decode.tiles import (
    CODE_UNIT,
    add_to_blocks,
    channel_operand,
    first_block,
    key_operand,
    key_scale,
    mask_field,
    split_key_channels,
    sum_in_lane,
    token_meta,
    token_of_row,
    transpose_blocks,
    upper_bytes,
    value_operand,
    widen,
)


class PageCursor(NamedTuple):
    """A page of a segment that is worked on, while STAGES - 1 pages behind it are copied.

    Page numbers are read one page before they are needed.

    Args:
        number: Page number; of a later page if nothing is read by it.
        coming: Number of the next page to copy.
        stage: Buffer that holds the page.
        free: Buffer for the next page to copy.
        extra: Extra bits of the page's outlier channels, see `fetch_extra`.
    """

    number: Any
    coming: Any
    stage: Any
    free: Any
    extra: Any


@jit
def _page_number(segment, index):
    """Number of a closed page; behind the segment's last one, of any page."""
    last = gl.minimum(segment.end, segment.num_closed)
    return gl.load(segment.indices_ptr + gl.minimum(index, last)).to(gl.int64)


@jit
def _score_channel_page(
    buffers, stage, extra, queries, sm_scale_log2, HEADS: tl.constexpr, SPEC: tl.constexpr
):
    """Scores [64 MMA rows, heads] of keys with one scale a channel, in base 2."""
    lower = key_operand(buffers.k_codes.index(stage).load(key_code_layout(SPEC)), SPEC)
    upper = upper_bytes(lower)
    scales = buffers.k_scales.index(stage).load(channel_meta_layout(SPEC))
    # float16 holds them: rows are at most LARGEST_MAGNITUDE in size when they are quantized.
    scales = split_key_channels(widen(scales).to(gl.float16), 1, SPEC)
    s = gl.zeros([PAGE, HEADS], gl.float32, mma_layout())
    for half in tl.static_range(2):
        for plane in tl.static_range(num_planes(SPEC.k)):
            q = queries.codes[0][half][plane] * key_scale(scales, half, plane, SPEC)
            field = mask_field(upper if half else lower, SPEC.k.num_bits, plane)
            s = mma_v2(field, q, s)
    if SPEC.k.extra_bytes > 0:
        s = add_extra(s, extra, queries.extra, SPEC)
    offset = gl.zeros([16, HEADS], gl.float32, mma_layout())
    mins = buffers.k_mins.index(stage).load(channel_vector_layout(padded_dim(SPEC)))
    rows = channel_operand(mins, SPEC)
    for part in tl.static_range(len(queries.mins)):
        offset = mma_v2(rows, queries.mins[part], offset)
    offset = first_block(offset, HEADS) * sm_scale_log2
    return add_to_blocks(s * queries.unit[None, :], offset, PAGE, HEADS)


@jit
def _score_token_page(buffers, stage, queries, HEADS: tl.constexpr, SPEC: tl.constexpr):
    """Scores [64 MMA rows, heads] of keys with one scale a token and group, in base 2."""
    lower = key_operand(buffers.k_codes.index(stage).load(key_code_layout(SPEC)), SPEC)
    upper = upper_bytes(lower)
    meta = buffers.k_scales.index(stage)
    total = gl.zeros([PAGE, HEADS], gl.float32, mma_layout())
    for group in tl.static_range(num_groups(SPEC, SPEC.k)):
        s = gl.zeros([PAGE, HEADS], gl.float32, mma_layout())
        for half in tl.static_range(2):
            for plane in tl.static_range(num_planes(SPEC.k)):
                if overlaps(SPEC, SPEC.k, plane, group):
                    q = queries.codes[group][half][plane]
                    field = mask_field(upper if half else lower, SPEC.k.num_bits, plane)
                    s = mma_v2(field, q, s)
        scale = token_meta(meta, group)
        low = token_meta(meta, num_groups(SPEC, SPEC.k) + group)
        total = total + s * queries.unit[None, :] * scale + low * queries.mins[group][None, :]
    return total


@jit
def _value_probabilities(p, HEADS: tl.constexpr):
    """Probabilities [64 MMA rows, heads] as right operands: even and odd tokens, [32, heads]."""
    p = transpose_blocks(p.to(gl.float16), PAGE, HEADS)
    p = gl.permute(
        gl.reshape(p, [2, 2, 2, 8, HEADS // 8, 4, 2]), [0, 1, 5, 6, 4, 3, 2]
    )  # [i1, i0, t, x, heads, token parity]
    even, odd = gl.split(gl.reshape(p, [32, HEADS, 2]))
    even = gl.convert_layout(even, b_layout(), assert_trivial=True)
    return even, gl.convert_layout(odd, b_layout(), assert_trivial=True)


@jit
def _plane_product(
    lower, upper, even, odd, acc, plane: tl.constexpr, group: tl.constexpr, SPEC: tl.constexpr
):
    """acc + codes of one plane (only channels of one group) x probabilities."""
    low = mask_field(lower, SPEC.v.num_bits, plane)
    high = mask_field(upper, SPEC.v.num_bits, plane)
    if not is_inside(SPEC, SPEC.v, plane, group):
        rows = gl.arange(0, value_rows(SPEC), gl.SliceLayout(1, a_layout()))
        channels = plane * plane_width(SPEC, SPEC.v) + rows
        inside = (channels // SPEC.v.group_channels == group)[:, None]
        low = gl.where(inside, low, 0.0)
        high = gl.where(inside, high, 0.0)
    return mma_v2(high, odd, mma_v2(low, even, acc))


@jit
def _attend_token_values(s, codes, meta, state, HEADS: tl.constexpr, SPEC: tl.constexpr):
    """Add a page whose values have one scale a token and group."""
    largest = token_meta(meta, 0)
    for group in tl.static_range(1, num_groups(SPEC, SPEC.v)):
        largest = gl.maximum(largest, token_meta(meta, group))
    # probability * scale must fit float16, so the largest scale counts as part of the score.
    headroom = gl.log2(gl.max(gl.max(largest, axis=1), axis=0)) - HEADROOM
    state = rescale(state, gl.max(s, axis=0) + headroom, HEADS)
    p = gl.exp2(s - state.m[None, :])
    lane_sum = state.lane_sum + sum_in_lane(p, PAGE, HEADS)
    lower = value_operand(codes, SPEC)
    upper = upper_bytes(lower)
    acc = state.acc
    offsets = ()
    for group in tl.static_range(num_groups(SPEC, SPEC.v)):
        low = token_meta(meta, num_groups(SPEC, SPEC.v) + group)
        offsets = offsets + (state.offsets[group] + sum_in_lane(p * low, PAGE, HEADS),)
        even, odd = _value_probabilities(p * token_meta(meta, group), HEADS)
        added = ()
        for plane in tl.static_range(num_planes(SPEC.v)):
            if overlaps(SPEC, SPEC.v, plane, group):
                product = _plane_product(lower, upper, even, odd, acc[plane], plane, group, SPEC)
                added = added + (product,)
            else:
                added = added + (acc[plane],)
        acc = added
    return SoftmaxState(state.m, lane_sum, offsets, acc)


@jit
def _attend_channel_values(s, codes, head_ptr, state, HEADS: tl.constexpr, SPEC: tl.constexpr):
    """Add a page whose values have one scale a channel."""
    state = rescale(state, gl.max(s, axis=0) - HEADROOM, HEADS)
    p = gl.exp2(s - state.m[None, :])
    lane_sum = state.lane_sum + sum_in_lane(p, PAGE, HEADS)
    lower = value_operand(codes, SPEC)
    upper = upper_bytes(lower)
    even, odd = _value_probabilities(p, HEADS)
    total = gl.sum(p, axis=0)[None, :]
    rows = gl.arange(0, value_rows(SPEC), gl.SliceLayout(1, mma_layout()))
    valid = rows < plane_width(SPEC, SPEC.v)
    acc = ()
    for plane in tl.static_range(num_planes(SPEC.v)):
        product = gl.zeros([value_rows(SPEC), HEADS], gl.float32, mma_layout())
        product = _plane_product(lower, upper, even, odd, product, plane, 0, SPEC)
        at = head_ptr.to(gl.pointer_type(gl.bfloat16)) + plane * plane_width(SPEC, SPEC.v) + rows
        scale = gl.load(at + SPEC.v.scales // 2, mask=valid, other=0.0).to(gl.float32)[:, None]
        low = gl.load(at + SPEC.v.mins // 2, mask=valid, other=0.0).to(gl.float32)[:, None]
        scale = scale * (CODE_UNIT * plane_scale(SPEC.v, plane))
        acc = acc + (state.acc[plane] + product * scale + total * low,)
    return SoftmaxState(state.m, lane_sum, state.offsets, acc)


@jit
def _attend_page(
    cursor, head_ptr, num_masked, buffers, queries, sm_scale_log2, state,
    HEADS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Add the page at hand; its first `num_masked` tokens are read elsewhere."""
    stage = cursor.stage
    if SPEC.k.per_channel:
        s = _score_channel_page(buffers, stage, cursor.extra, queries, sm_scale_log2, HEADS, SPEC)
    else:
        s = _score_token_page(buffers, stage, queries, HEADS, SPEC)
    if num_masked > 0:
        token = token_of_row(gl.arange(0, PAGE, gl.SliceLayout(1, mma_layout())))
        s = gl.where((token >= num_masked)[:, None], s, float("-inf"))
    codes = buffers.v_codes.index(stage).load(value_code_layout(SPEC))
    if SPEC.v.per_channel:
        return _attend_channel_values(s, codes, head_ptr, state, HEADS, SPEC)
    else:
        return _attend_token_values(s, codes, buffers.v_meta.index(stage), state, HEADS, SPEC)


@jit
def start_pages(segment, storage, buffers, STAGES: tl.constexpr, SPEC: tl.constexpr):
    """Start copying the first STAGES - 1 closed pages of a segment: a cursor without extra bits."""
    pages_ptr = storage.pages_ptr + segment.head * SPEC.head_bytes
    end = gl.minimum(segment.end, segment.num_closed)
    number = _page_number(segment, segment.first)
    coming = number
    barrier()  # an earlier segment's pages may still be read
    for ahead in tl.static_range(STAGES - 1):
        wanted = segment.first + ahead < end
        start_page(buffers, ahead, pages_ptr + coming * SPEC.page_bytes, wanted, SPEC)
        coming = _page_number(segment, segment.first + ahead + 1)
    return PageCursor(number, coming, gl.to_tensor(0), gl.to_tensor(STAGES - 1), ())


@jit
def _advance(cursor, index, segment, pages_ptr, buffers, STAGES: tl.constexpr, SPEC: tl.constexpr):
    """Start copying the page STAGES - 1 behind page `index`: the cursor of page `index + 1`."""
    wanted = index + STAGES - 1 < gl.minimum(segment.end, segment.num_closed)
    start_page(buffers, cursor.free, pages_ptr + cursor.coming * SPEC.page_bytes, wanted, SPEC)
    coming = _page_number(segment, index + STAGES)
    number = cursor.number
    extra = cursor.extra
    if SPEC.v.per_channel or SPEC.k.extra_bytes > 0:
        number = _page_number(segment, index + 1)
        extra = fetch_extra(pages_ptr + number * SPEC.page_bytes, SPEC)
    stage = cursor.stage + 1 if cursor.stage + 1 < STAGES else 0
    return PageCursor(number, coming, stage, cursor.stage, extra)


@jit
def attend_pages(
    segment, storage, cursor, buffers, queries, sm_scale_log2, state,
    SINKS: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Add the segment's closed pages, from the cursor that `start_pages` returned."""
    pages_ptr = storage.pages_ptr + segment.head * SPEC.head_bytes
    extra = fetch_extra(pages_ptr + cursor.number * SPEC.page_bytes, SPEC)
    cursor = PageCursor(cursor.number, cursor.coming, cursor.stage, cursor.free, extra)
    for index in range(segment.first, gl.minimum(segment.end, segment.num_closed)):
        async_copy.wait_group(STAGES - 2)
        barrier()
        following = _advance(cursor, index, segment, pages_ptr, buffers, STAGES, SPEC)
        head_ptr = pages_ptr + cursor.number * SPEC.page_bytes
        masked = SINKS if index == 0 else 0
        state = _attend_page(
            cursor, head_ptr, masked, buffers, queries, sm_scale_log2, state, HEADS, SPEC
        )
        cursor = following
    return state
