"""Close pages: quantize and pack 16-bit rows into page rows. The specification of the kernels."""

from __future__ import annotations

from dataclasses import replace

import torch

from sgl_kvq.formats.base import (
    EXTRA_BITS,
    NESTED_STEPS,
    PAGE_SIZE,
    Coding,
    KOrV,
    nested_margin,
)
from sgl_kvq.formats.hadamard import rotate
from sgl_kvq.formats.page_layout import PageLayout

NESTED_CONSTANT_SCALE = 2.0**-20
"""Scale of a group of equal values in nested codings: what low-order bits add is next to nothing,
and float16 holds it."""


def quantize_groups(
    x: torch.Tensor,
    coding: Coding,
    dim: int,
    excluded: torch.Tensor | None = None,
    max_code: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code x in groups along one dimension against the stored bfloat16 metadata.

    m = bf16(low), s = bf16((high - m) / max_code), 1 where that is not positive;
    code = clip(round((x - m) / s), 0, max_code); value = code * s + m. Nested codings: the leading
    bits of `quantize_nested`.

    Args:
        x: float32, any shape, finite.
        coding: Bits and rounding, and whether codes are nested.
        dim: The dimension a group runs along.
        excluded: bool, broadcastable to x: elements left out of the range, coded 0.
        max_code: Largest code; None takes the coding's.

    Returns:
        codes uint8 like x; scales and mins bfloat16, size 1 along dim.

    Source: HACK (ATC '26), quantization against stored metadata; KIVI and SAW-INT4 code against
    unrounded metadata.
    """
    top = coding.max_code if max_code is None else max_code
    if coding.nested:
        codes, scales, mins = quantize_nested(x, dim, top, excluded)
        return codes >> EXTRA_BITS, scales, mins
    low, high = _range(x, dim, excluded)
    scales, mins = _metadata(low, high, top, 1.0)
    steps = (x - mins.float()) / scales.float()
    steps = steps.round() if coding.rounding == "even" else (steps + 0.5).floor()
    return _codes(steps, top, excluded), scales, mins


def quantize_nested(
    x: torch.Tensor, dim: int, max_code: int, excluded: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code x in groups with codes whose leading bits are codes too.

    The range from low to high has n (max_code + 1) - 1 equal steps, n = `NESTED_STEPS`; n of them
    are a cell, whose middle its leading bits stand for. m = bf16(low + `nested_margin` of the
    range), the middle of the lowest cell; s = bf16((high - margin - m) / max_code), the width of a
    cell, `NESTED_CONSTANT_SCALE` where that is not positive;
    code = clip(round(n (x - m) / s + (n - 1) / 2), 0, n (max_code + 1) - 1).

    Args:
        x: float32, any shape, finite.
        dim: The dimension a group runs along.
        max_code: Largest code of the leading bits.
        excluded: bool, broadcastable to x: elements left out of the range, coded 0.

    Returns:
        codes uint8 like x, of `EXTRA_BITS` more bits than max_code has; scales and mins bfloat16,
        size 1 along dim. Of c = code / n, value = floor(c) * s + m without the low-order bits and
        (c - (n - 1) / 2n) * s + m with them.
    """
    low, high = _range(x, dim, excluded)
    margin = (high - low) * nested_margin(max_code)
    scales, mins = _metadata(low + margin, high - margin, max_code, NESTED_CONSTANT_SCALE)
    steps = (x - mins.float()) / scales.float() * NESTED_STEPS + (NESTED_STEPS - 1) / 2
    return _codes(steps.round(), NESTED_STEPS * (max_code + 1) - 1, excluded), scales, mins


def _range(
    x: torch.Tensor, dim: int, excluded: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of each group, size 1 along dim."""
    lowest, highest = x, x
    if excluded is not None:
        lowest = x.masked_fill(excluded, torch.inf)
        highest = x.masked_fill(excluded, -torch.inf)
    return lowest.amin(dim, keepdim=True), highest.amax(dim, keepdim=True)


def _metadata(
    low: torch.Tensor, high: torch.Tensor, max_code: int, constant_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima, bfloat16, of groups whose codes 0 and `max_code` are low and high."""
    mins = low.to(torch.bfloat16)
    scales = ((high - mins.float()) / max_code).to(torch.bfloat16)
    return torch.where(scales > 0, scales, constant_scale), mins


def _codes(steps: torch.Tensor, top: int, excluded: torch.Tensor | None) -> torch.Tensor:
    """Whole steps as uint8 codes from 0 to top, 0 where excluded."""
    codes = steps.clamp(0, top).to(torch.uint8)
    return codes if excluded is None else codes.masked_fill(excluded, 0)


def pack_planes(codes: torch.Tensor, num_planes: int, dim: int) -> torch.Tensor:
    """Pack codes into bytes: field i of byte j holds element `i * width + j` along `dim`.

    Args:
        codes: uint8 [..., size, ...], each below 2^(8/num_planes).
        num_planes: Codes per byte, 1, 2 or 4; divides size.
        dim: The packed dimension, negative.

    Returns:
        uint8, size `size / num_planes` along dim.
    """
    packed = torch.zeros_like(codes.narrow(dim, 0, codes.shape[dim] // num_planes))
    for plane, part in enumerate(codes.chunk(num_planes, dim)):
        packed |= part << (plane * 8 // num_planes)
    return packed


# Largest |x| in a page: the largest number that bfloat16 and float16 share. The kernels multiply
# with scales in float16.
LARGEST_MAGNITUDE = 65280.0


def replace_nonfinite(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace NaN by 0 and clamp to `LARGEST_MAGNITUDE`.

    One bad element would otherwise poison the scale of its whole group.

    Args:
        x: 16-bit rows, any shape.

    Returns:
        (rows like x, number of replaced elements as an int64 scalar tensor).
    """
    limit = LARGEST_MAGNITUDE
    finite = torch.nan_to_num(x, posinf=limit, neginf=-limit).clamp(-limit, limit)
    return finite, (finite != x).sum()


def encode_pages(
    k: torch.Tensor, v: torch.Tensor, num_sinks: torch.Tensor, layout: PageLayout
) -> torch.Tensor:
    """Quantize full pages into page rows, as `layout.format` does.

    Args:
        k: [N, PAGE_SIZE, num_kv_heads, head_dim] keys after RoPE, of `layout.row_dtype`, at most
            `LARGEST_MAGNITUDE` in size.
        v: Values, same shape and dtype.
        num_sinks: int32 [N], leading tokens of each page that are kept elsewhere in 16 bits: left
            out of the scales along the tokens, coded 0.
        layout: Layout of the pages.

    Returns:
        uint8 [N, page_bytes], every byte defined: alignment gaps are 0.

    Raises:
        ValueError: wrong shape or dtype, or an element is NaN, infinite or too large.
    """
    expected = (PAGE_SIZE, layout.num_kv_heads, layout.head_dim)
    for name, rows in (("k", k), ("v", v)):
        if tuple(rows.shape[1:]) != expected or rows.dtype != layout.row_dtype:
            raise ValueError(
                f"{name}: expected [N, {', '.join(map(str, expected))}] {layout.row_dtype}, "
                f"got {list(rows.shape)} {rows.dtype}"
            )
        if not (rows.abs() <= LARGEST_MAGNITUDE).all():
            raise ValueError(
                f"{name}: expected finite values of at most {LARGEST_MAGNITUDE:.0f}, got others; "
                f"pass rows through replace_nonfinite first"
            )
    return layout.format.quantize(k, v, num_sinks, layout)


def quantize_pages(
    k: torch.Tensor, v: torch.Tensor, num_sinks: torch.Tensor, layout: PageLayout
) -> torch.Tensor:
    """Quantize pages of scalar formats; see `encode_pages`, which checks the arguments."""
    pages = torch.zeros((k.shape[0], layout.page_bytes), dtype=torch.uint8, device=k.device)
    tokens = torch.arange(PAGE_SIZE, device=k.device)
    is_sink = (tokens < num_sinks[:, None])[:, None, :, None]  # [N, 1, P, 1]
    _quantize_tensor(pages, "k", k, layout.format.k, is_sink, layout)
    _quantize_tensor(pages, "v", v, layout.format.v, is_sink, layout)
    return pages


def _quantize_tensor(
    pages: torch.Tensor,
    name: KOrV,
    rows: torch.Tensor,
    coding: Coding,
    is_sink: torch.Tensor,
    layout: PageLayout,
) -> None:
    """Write the fields of K or of V into `pages`."""
    if coding.is_raw:
        layout.view(pages, f"{name}_codes").copy_(rows.transpose(1, 2))
        return
    x = rows.transpose(1, 2).float()  # [N, H, P, D]
    if coding.rotated:
        x = rotate(x, layout.rotation_order)
    if coding.axis == "channel":
        codes, scales, mins = quantize_groups(x, coding, dim=2, excluded=is_sink)
        if outliers := coding.num_outliers(layout.head_dim):
            extra, extra_scales, extra_mins = _quantize_outliers(x[..., :outliers], coding, is_sink)
            codes[..., :outliers] = extra >> EXTRA_BITS
            scales[..., :outliers], mins[..., :outliers] = extra_scales, extra_mins
            low_bits = extra & ((1 << EXTRA_BITS) - 1)
            layout.view(pages, f"{name}_extra").copy_(pack_planes(low_bits, 8 // EXTRA_BITS, -1))
        scales, mins = scales.squeeze(2), mins.squeeze(2)  # [N, H, D]
    else:
        groups = coding.num_groups(layout.head_dim)
        grouped = x.unflatten(-1, (groups, -1))  # [N, H, P, G, D/G]
        codes, scales, mins = quantize_groups(grouped, coding, dim=-1)
        codes = codes.flatten(-2).masked_fill(is_sink, 0)
        scales, mins = (meta.squeeze(-1).transpose(2, 3) for meta in (scales, mins))  # [N, H, G, P]
    layout.view(pages, f"{name}_scales").copy_(scales)
    layout.view(pages, f"{name}_mins").copy_(mins)
    dim = -1
    if name == "v":  # token-contiguous
        codes, dim = codes.transpose(2, 3), -2
    layout.view(pages, f"{name}_codes").copy_(pack_planes(codes, coding.num_planes, dim))


def _quantize_outliers(
    x: torch.Tensor, coding: Coding, is_sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code outlier channels x [N, H, P, outliers] with `EXTRA_BITS` extra bits, not nested.

    Returns:
        codes like x; scales, of the leading bits (exactly 2^EXTRA_BITS steps), and mins
        [N, H, 1, outliers].
    """
    max_code = (coding.max_code + 1 << EXTRA_BITS) - 1
    whole = replace(coding, nested=False)
    codes, scales, mins = quantize_groups(x, whole, dim=2, excluded=is_sink, max_code=max_code)
    return codes, scales * (1 << EXTRA_BITS), mins
