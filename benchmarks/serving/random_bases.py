"""A file of bases for `--kv-quant-config` without a calibration: random, for timing and tests.

Usage: python -m benchmarks.serving.random_bases MODEL_FOLDER OUT

Every layer and KV head has orthonormal matrices of its own, as in a file of `python -m sgl_kvq
calibrate`, so a server does the same work with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sgl_kvq.formats.calibration import LayerBasis, save_bases


def random_bases(num_layers: int, num_kv_heads: int, head_dim: int) -> list[LayerBasis]:
    """Return orthonormal matrices of a fixed seed, different for each layer and KV head."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_layers, 2, num_kv_heads, head_dim, head_dim)
    q, _ = torch.linalg.qr(torch.randn(shape, generator=generator))
    return [LayerBasis(k, v) for k, v in q]


def main(argv: Sequence[str]) -> int:
    """Write the file; return the exit status."""
    from transformers import AutoConfig

    if len(argv) != 2:
        print((__doc__ or "").splitlines()[2], file=sys.stderr)
        return 2
    config = AutoConfig.from_pretrained(argv[0]).get_text_config()
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    save_bases(Path(argv[1]), random_bases(layers, heads, config.head_dim), {"made_by": "random"})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
