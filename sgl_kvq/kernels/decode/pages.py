"""Attention to closed pages: scores and values computed from the codes."""

from __future__ import annotations

import triton.language as tl

from sgl_kvq.kernels.common.gluon import (
    async_copy,
    barrier,
    gl,
    jit,
    mma_v2,
)
from sgl_kvq.kernels.common.layouts import (
    EXTRA_BITS,
    PAGE,
    a_layout,
    b_layout,
    channel_meta_layout,
    channel_vector_layout,
    extra_meta_layout,
    is_inside,
    key_code_layout,
    mma_layout,
    num_extra_steps,
    num_extra_tiles,
    num_groups,
    num_planes,
    overlaps,
    padded_dim,
    plane_scale,
    plane_width,
    value_code_layout,
    value_rows,
)
from sgl_kvq.kernels.common.tiles import (
    CODE_UNIT,
    add_to_blocks,
    channel_operand,
    extra_place,
    extra_scale_operand,
    extra_tile,
    first_block,
    key_operand,
    key_scale,
    mask_field,
    split_key_channels,
    start_page,
    sum_in_lane,
    token_meta,
    token_of_row,
    transpose_blocks,
    upper_bytes,
    value_operand,
    widen,
)
from sgl_kvq.kernels.decode.operands import (
    HEADROOM,
    rescale,
)


@jit
def _fetch_extra(head_ptr, SPEC: tl.constexpr):
    """Load the extra bits of outlier key channels and their scales into registers.

    They lie at odd places of the page, so they come a page ahead in registers, not by the copies.

    Returns:
        By tile: the bits as left operand, then the scales [16] by step. Empty without any. Where no
        channel is, the scales are another's or minima: finite, and they meet queries of zero.
    """
    meta_ptr = head_ptr.to(gl.pointer_type(gl.bfloat16)) + SPEC.k.scales // 2
    byte = gl.arange(0, 16, extra_meta_layout())
    fetched = ()
    for part in tl.static_range(num_extra_tiles(SPEC.k)):
        fetched = fetched + (extra_tile(head_ptr + SPEC.k.extra, part, SPEC),)
        for step in tl.static_range(num_extra_steps(SPEC.k)):
            channel, _exists = extra_place(byte, part, step, SPEC)
            fetched = fetched + (gl.load(meta_ptr + channel),)
    return fetched


@jit
def _add_extra(s, extra, q_extra, SPEC: tl.constexpr):
    """Add what the extra bits of outlier key channels contribute."""
    STEPS: tl.constexpr = num_extra_steps(SPEC.k)
    for part in tl.static_range(num_extra_tiles(SPEC.k)):
        bits = extra[part * (1 + STEPS)]
        for step in tl.static_range(STEPS):
            scales = extra_scale_operand(extra[part * (1 + STEPS) + 1 + step].to(gl.float16))
            q = q_extra[part * STEPS + step] * scales
            s = mma_v2(mask_field(bits, EXTRA_BITS, step), q, s)
    return s


@jit
def _score_page(
    buffers, stage, extra, q_codes, q_extra, q_mins, unit, sm_scale_log2,
    HEADS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Scores [64 MMA rows, heads] of a page in the log2 domain."""
    lower = key_operand(buffers[0].index(stage).load(key_code_layout(SPEC)), SPEC)
    upper = upper_bytes(lower)
    scales = buffers[1].index(stage)
    if SPEC.k.per_channel:
        # float16 holds them: rows are at most LARGEST_MAGNITUDE in size when they are quantized.
        scales = widen(scales.load(channel_meta_layout(SPEC))).to(gl.float16)
        parts = split_key_channels(scales, 1, SPEC)
        s = gl.zeros([PAGE, HEADS], gl.float32, mma_layout())
        for half in tl.static_range(2):
            for plane in tl.static_range(num_planes(SPEC.k)):
                q = q_codes[half * num_planes(SPEC.k) + plane] * key_scale(parts, half, plane, SPEC)
                field = mask_field(upper if half else lower, SPEC.k.num_bits, plane)
                s = mma_v2(field, q, s)
        if SPEC.k.extra_bytes > 0:
            s = _add_extra(s, extra, q_extra, SPEC)
        offset = gl.zeros([16, HEADS], gl.float32, mma_layout())
        mins = buffers[2].index(stage).load(channel_vector_layout(padded_dim(SPEC)))
        rows = channel_operand(mins, SPEC)
        for part in tl.static_range(len(q_mins)):
            offset = mma_v2(rows, q_mins[part], offset)
        offset = first_block(offset, HEADS) * sm_scale_log2
        return add_to_blocks(s * unit[None, :], offset, PAGE, HEADS)
    else:
        total = gl.zeros([PAGE, HEADS], gl.float32, mma_layout())
        for group in tl.static_range(num_groups(SPEC, SPEC.k)):
            s = gl.zeros([PAGE, HEADS], gl.float32, mma_layout())
            for half in tl.static_range(2):
                for plane in tl.static_range(num_planes(SPEC.k)):
                    if overlaps(SPEC, SPEC.k, plane, group):
                        q = q_codes[(group * 2 + half) * num_planes(SPEC.k) + plane]
                        field = mask_field(upper if half else lower, SPEC.k.num_bits, plane)
                        s = mma_v2(field, q, s)
            scale = token_meta(scales, group)
            low = token_meta(scales, num_groups(SPEC, SPEC.k) + group)
            total = total + s * unit[None, :] * scale + low * q_mins[group][None, :]
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
def _attend_token_values(
    s, codes, meta, m_run, lane_sum, offsets, acc,
    HEADS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Add a page whose values have one scale a token and group."""
    largest = token_meta(meta, 0)
    for group in tl.static_range(1, num_groups(SPEC, SPEC.v)):
        largest = gl.maximum(largest, token_meta(meta, group))
    # probability * scale must fit float16, so the largest scale counts as part of the score.
    headroom = gl.log2(gl.max(gl.max(largest, axis=1), axis=0)) - HEADROOM
    m_run, alpha, lane_sum, offsets = rescale(
        gl.max(s, axis=0) + headroom, m_run, lane_sum, offsets, HEADS
    )
    p = gl.exp2(s - m_run[None, :])
    lane_sum = lane_sum + sum_in_lane(p, PAGE, HEADS)
    lower = value_operand(codes, SPEC)
    upper = upper_bytes(lower)
    scaled = ()
    for plane in tl.static_range(num_planes(SPEC.v)):
        scaled = scaled + (acc[plane] * alpha[None, :],)
    summed = ()
    for group in tl.static_range(num_groups(SPEC, SPEC.v)):
        low = token_meta(meta, num_groups(SPEC, SPEC.v) + group)
        summed = summed + (offsets[group] + sum_in_lane(p * low, PAGE, HEADS),)
        even, odd = _value_probabilities(p * token_meta(meta, group), HEADS)
        added = ()
        for plane in tl.static_range(num_planes(SPEC.v)):
            if overlaps(SPEC, SPEC.v, plane, group):
                product = _plane_product(lower, upper, even, odd, scaled[plane], plane, group, SPEC)
                added = added + (product,)
            else:
                added = added + (scaled[plane],)
        scaled = added
    return m_run, lane_sum, summed, scaled


@jit
def _attend_channel_values(
    s, codes, head_ptr, m_run, lane_sum, offsets, acc, HEADS: tl.constexpr, SPEC: tl.constexpr
):
    """Add a page whose values have one scale a channel."""
    m_run, alpha, lane_sum, offsets = rescale(
        gl.max(s, axis=0) - HEADROOM, m_run, lane_sum, offsets, HEADS
    )
    p = gl.exp2(s - m_run[None, :])
    lane_sum = lane_sum + sum_in_lane(p, PAGE, HEADS)
    lower = value_operand(codes, SPEC)
    upper = upper_bytes(lower)
    even, odd = _value_probabilities(p, HEADS)
    total = gl.sum(p, axis=0)[None, :]
    rows = gl.arange(0, value_rows(SPEC), gl.SliceLayout(1, mma_layout()))
    valid = rows < plane_width(SPEC, SPEC.v)
    added = ()
    for plane in tl.static_range(num_planes(SPEC.v)):
        product = gl.zeros([value_rows(SPEC), HEADS], gl.float32, mma_layout())
        product = _plane_product(lower, upper, even, odd, product, plane, 0, SPEC)
        at = head_ptr.to(gl.pointer_type(gl.bfloat16)) + plane * plane_width(SPEC, SPEC.v) + rows
        scale = gl.load(at + SPEC.v.scales // 2, mask=valid, other=0.0).to(gl.float32)[:, None]
        low = gl.load(at + SPEC.v.mins // 2, mask=valid, other=0.0).to(gl.float32)[:, None]
        scale = scale * (CODE_UNIT * plane_scale(SPEC.v, plane))
        added = added + (acc[plane] * alpha[None, :] + product * scale + total * low,)
    return m_run, lane_sum, offsets, added


@jit
def _attend_page(
    buffers, stage, head_ptr, extra, num_masked, q_codes, q_extra, q_mins, unit, sm_scale_log2,
    m_run, lane_sum, offsets, acc, HEADS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Add a staged page; its first `num_masked` tokens are read elsewhere."""
    s = _score_page(
        buffers, stage, extra, q_codes, q_extra, q_mins, unit, sm_scale_log2, HEADS, SPEC
    )
    if num_masked > 0:
        token = token_of_row(gl.arange(0, PAGE, gl.SliceLayout(1, mma_layout())))
        s = gl.where((token >= num_masked)[:, None], s, float("-inf"))
    codes = buffers[3].index(stage).load(value_code_layout(SPEC))
    if SPEC.v.per_channel:
        return _attend_channel_values(
            s, codes, head_ptr, m_run, lane_sum, offsets, acc, HEADS, SPEC
        )
    else:
        return _attend_token_values(
            s, codes, buffers[4].index(stage), m_run, lane_sum, offsets, acc, HEADS, SPEC
        )


@jit
def start_pages(
    first, end, indices_ptr, page_ptr, buffers, STAGES: tl.constexpr, SPEC: tl.constexpr
):
    """Start copying the first STAGES - 1 of pages first to end - 1.

    Returns:
        Number of page first, and of the next page to start.
    """
    coming = gl.load(indices_ptr + gl.minimum(first, end)).to(gl.int64)
    here = coming
    barrier()  # an earlier segment's pages may still be read
    for ahead in tl.static_range(STAGES - 1):
        start_page(buffers, ahead, page_ptr + coming * SPEC.page_bytes, first + ahead < end, SPEC)
        coming = gl.load(indices_ptr + gl.minimum(first + ahead + 1, end)).to(gl.int64)
    return here, coming


@jit
def attend_pages(
    first, end, here, coming, indices_ptr, page_ptr, buffers, q_codes, q_extra, q_mins,
    unit, sm_scale_log2, m_run, lane_sum, offsets, acc,
    SINKS: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Add closed pages first to end - 1, of which STAGES - 1 are on their way at any time.

    Page numbers are read one step earlier than the pages; see `start_pages`.
    """
    stage = 0
    free = STAGES - 1
    extra = _fetch_extra(page_ptr + here * SPEC.page_bytes, SPEC)
    for index in range(first, end):
        async_copy.wait_group(STAGES - 2)
        barrier()
        wanted = index + STAGES - 1 < end
        start_page(buffers, free, page_ptr + coming * SPEC.page_bytes, wanted, SPEC)
        coming = gl.load(indices_ptr + gl.minimum(index + STAGES, end)).to(gl.int64)
        next_extra = extra
        following = here
        if SPEC.v.per_channel or SPEC.k.extra_bytes > 0:
            following = gl.load(indices_ptr + gl.minimum(index + 1, end)).to(gl.int64)
            next_extra = _fetch_extra(page_ptr + following * SPEC.page_bytes, SPEC)
        masked = SINKS if index == 0 else 0
        m_run, lane_sum, offsets, acc = _attend_page(
            buffers, stage, page_ptr + here * SPEC.page_bytes, extra, masked,
            q_codes, q_extra, q_mins, unit, sm_scale_log2,
            m_run, lane_sum, offsets, acc, HEADS, SPEC,
        )  # fmt: skip
        here = following
        extra = next_extra
        free = stage
        stage = stage + 1 if stage + 1 < STAGES else 0
    return m_run, lane_sum, offsets, acc
