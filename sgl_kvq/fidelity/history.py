"""K and V as a server stores them and reads them back, with the reference code of its formats."""

from __future__ import annotations

from statistics import mean

import torch

from sgl_kvq.fidelity.geometry import model_geometry
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.formats.calibration import change_basis, load_calibration
from sgl_kvq.formats.dequantize import decode_keys, decode_values
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.quantize import encode_pages, replace_nonfinite


class FormatHistory:
    """A format, for a `sgl_kvq.fidelity.teacher.Teacher`.

    Args:
        name: The format.
        model_config: `PretrainedConfig` of transformers.
        sink_tokens: Leading tokens kept in 16 bits.
        config_file: Value of `--kv-quant-config`.
        window_pages: Last closed pages that a request still reads as 16-bit rows.
        device: Where rows are.

    Attributes:
        errors: Where to keep, by layer, each query head's squared error of the attention output
            relative to the output's square, float32 [num_qo_heads]; None: nowhere.
    """

    def __init__(
        self,
        name: str,
        model_config: object,
        sink_tokens: int = 4,
        config_file: str | None = None,
        window_pages: int = 0,
        device: str = "cpu",
    ) -> None:
        shape = model_geometry(model_config)
        calibration = load_calibration(
            name, config_file, shape.num_layers, shape.num_kv_heads, shape.head_dim
        )
        self.layouts = [
            PageLayout(layer_format, shape.head_dim, shape.num_kv_heads)
            for layer_format in calibration.formats
        ]
        self.sink_tokens = sink_tokens
        self.window_pages = window_pages
        self.errors: dict[int, torch.Tensor] | None = None
        self.matrices = [
            tuple(x.to(device) for x in (basis.q, basis.k, basis.v, basis.out))
            for basis in calibration.bases
        ]

    @property
    def bits_per_element(self) -> float:
        """Bits a stored number takes, mean over layers, all metadata of its page included."""
        return mean(layout.bits_per_element for layout in self.layouts)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a token in closed pages, all layers."""
        return sum(layout.page_bytes for layout in self.layouts) / PAGE_SIZE

    def enter(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Bring q, k and v, each [heads, tokens, head_dim], to the basis of the pages."""
        if self.matrices:
            q, k, v = (
                change_basis(x.transpose(0, 1), matrices).transpose(0, 1)
                for x, matrices in zip((q, k, v), self.matrices[layer], strict=False)
            )
        return q, k.to(torch.bfloat16), v.to(torch.bfloat16)

    def leave(self, layer: int, out: torch.Tensor) -> torch.Tensor:
        """Bring outputs [heads, tokens, head_dim] back."""
        if self.matrices:
            out = change_basis(out.transpose(0, 1), self.matrices[layer][3]).transpose(0, 1)
        return out

    def read(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store K and V in closed pages and read them back.

        Args:
            layer: Layer of the model.
            k: bfloat16 [num_kv_heads, tokens, head_dim] in the basis of the pages, full pages.
            v: Like k.

        Returns:
            K and V, float32, shaped like k.
        """
        layout = self.layouts[layer]
        if layout.format.is_raw:
            return k.float(), v.float()
        by_page = [x.unflatten(1, (-1, PAGE_SIZE)).permute(1, 2, 0, 3) for x in (k, v)]
        rows = [replace_nonfinite(x)[0] for x in by_page]  # [pages, P, H, D]
        num_sinks = torch.zeros(len(rows[0]), dtype=torch.int32, device=k.device)
        num_sinks[0] = self.sink_tokens
        pages = encode_pages(rows[0], rows[1], num_sinks, layout)
        read = [
            decode(pages, layout).transpose(0, 1).flatten(1, 2)
            for decode in (decode_keys, decode_values)
        ]
        for stored, exact in zip(read, (k, v), strict=True):
            stored[:, : self.sink_tokens] = exact[:, : self.sink_tokens]
        return read[0], read[1]
