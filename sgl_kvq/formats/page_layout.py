"""Where the fields of a closed page lie inside its row of bytes (pure arithmetic)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from sgl_kvq.formats.base import PAGE_SIZE, QuantFormat, hadamard_order

ALIGNMENT_BYTES = 16
_DTYPES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Field:
    """One field of one head inside a page row.

    Args:
        offset_bytes: From the first byte of the head.
        shape: Elements, row-major.
        dtype: Element type.
    """

    offset_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of the field without alignment padding."""
        return math.prod(self.shape) * self.dtype.itemsize


def _align(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class PageLayout:
    """Byte layout of a page row: `num_kv_heads` equal head slices, fields inside each.

    The format names the fields of a head; each begins at a multiple of 16 bytes. Those of scalar
    formats, with B bits, P = 64 tokens and D = head_dim: `k_codes` uint8 [P, D*B/8], `k_scales` and
    `k_mins` bfloat16 [D] (channel axis) or [groups, P] (token axis), `k_extra` uint8
    [P, outliers/4] if there are outlier channels, then `v_codes` uint8 [D*B/8, P]
    (token-contiguous), `v_scales` and `v_mins`. With 16 bits the codes are the rows, [P, D].

    Args:
        format: Format of the pages.
        head_dim: Channels of a head, a multiple of 16.
        num_kv_heads: KV heads of this rank.
        row_dtype: Type of 16-bit rows, bfloat16 or float16.
        hadamard_block: Order of the Hadamard blocks of rotated codings; 0 takes the largest.

    Raises:
        ValueError: head_dim is not a multiple of 16, or the Hadamard block does not divide it.
    """

    format: QuantFormat
    head_dim: int
    num_kv_heads: int
    row_dtype: torch.dtype = torch.bfloat16
    hadamard_block: int = 0

    def __post_init__(self) -> None:
        if self.head_dim % 16:
            raise ValueError(f"head_dim: expected a multiple of 16, got {self.head_dim}")
        hadamard_order(self.head_dim, self.hadamard_block)

    @property
    def rotation_order(self) -> int:
        """Order of the Hadamard blocks of rotated codings."""
        return hadamard_order(self.head_dim, self.hadamard_block)

    @cached_property
    def fields(self) -> dict[str, Field]:
        """Fields of one head by name, in the order they lie."""
        fields: dict[str, Field] = {}
        offset = 0
        for name, shape, element in self.format.fields(self.head_dim):
            fields[name] = Field(offset, shape, _DTYPES.get(element, self.row_dtype))
            offset = _align(offset + fields[name].size_bytes)
        return fields

    @cached_property
    def head_bytes(self) -> int:
        """Bytes of one head, padding included."""
        last = list(self.fields.values())[-1]
        return _align(last.offset_bytes + last.size_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page row: one layer, all heads of this rank."""
        return self.head_bytes * self.num_kv_heads

    @property
    def row_page_bytes(self) -> int:
        """Bytes of the same 64 tokens as 16-bit K and V rows."""
        return 2 * PAGE_SIZE * self.num_kv_heads * self.head_dim * self.row_dtype.itemsize

    @property
    def bits_per_element(self) -> float:
        """Bits of a stored number, all metadata of its page included."""
        return 8 * self.page_bytes / (2 * PAGE_SIZE * self.num_kv_heads * self.head_dim)

    @property
    def bytes_per_token(self) -> float:
        """Bytes a token of a closed page takes in one layer."""
        return self.page_bytes / PAGE_SIZE

    def view(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """View one field of page rows, without a copy.

        Args:
            rows: uint8 [N, page_bytes], contiguous.
            name: A key of `fields`.

        Returns:
            [N, num_kv_heads, *shape] of the field's dtype, aliasing `rows`.
        """
        field = self.fields[name]
        heads = rows.view(-1, self.num_kv_heads, self.head_bytes)
        part = heads[..., field.offset_bytes : field.offset_bytes + field.size_bytes]
        return part.view(field.dtype).unflatten(-1, field.shape)
