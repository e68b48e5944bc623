"""`python -m sgl_kvq calibrate MODEL`: the bases that kvq2 and kvq4 store a model's K and V in."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sgl_kvq.commands.basis_fit import Moments, fit_basis
from sgl_kvq.config import PAGE_SIZE
from sgl_kvq.errors import ConfigError
from sgl_kvq.kernels.basis import save_bases

ATTENTION_NAME = "kvq_calibrate"
NUM_TOPICS = 25
"""Documentation topics of the default text; the fidelity benchmark measures on the others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", help="Hugging Face folder or name")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        help="text files like what will be served (default: documentation that comes with Python)",
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens of a text, default: 2048")
    parser.add_argument("--segments", type=int, default=8, help="texts to run, default: 8")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="in what the model runs, default: that of its files; float32 is several times faster "
        "on CPUs without bfloat16 instructions",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("kvq.safetensors"), help="default: kvq.safetensors"
    )


def run(args: argparse.Namespace) -> int:
    """Run the model over the texts and write the bases; goes on where an earlier run stopped."""
    if args.context % PAGE_SIZE or args.context < 2 * PAGE_SIZE or args.segments < 1:
        raise ConfigError(
            f"--context, --segments: expected a multiple of {PAGE_SIZE} from {2 * PAGE_SIZE} on "
            f"and at least 1, got {args.context} and {args.segments}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=args.dtype, attn_implementation=ATTENTION_NAME
        ).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{args.model}: {str(error).splitlines()[0]}") from error
    texts = _texts(args, tokenizer)
    collected = _Collected(args.out.with_suffix(".partial"), _key(args, texts))
    for number in track(range(len(texts)), "calibrating"):
        if number >= collected.done:
            with torch.inference_mode():
                model.base_model(input_ids=texts[number][None], use_cache=False, into=collected)
            collected.finish_text()
    layers = sorted(collected.moments)
    bases = [fit_basis(collected.moments[i], collected.out_grams[i]) for i in layers]
    about = {"model": Path(args.model).name, "tokens": str(len(texts) * args.context)}
    save_bases(args.out, bases, about)
    collected.path.unlink()
    sys.stdout.write(f"serve with --kv-quant kvq2 --kv-quant-config {args.out}\n")
    return 0


def _texts(args: argparse.Namespace, tokenizer: Any) -> list[torch.Tensor]:
    """Cut the text into pieces of `--context` tokens, spread over all of it."""
    text = "".join(list(topics.values())[:NUM_TOPICS])
    if args.text:
        text = "\n\n".join(path.read_text() for path in args.text)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    available = len(ids) // args.context
    if not available:
        raise ConfigError(
            f"--text: expected at least {args.context} tokens, got {len(ids)}; give more text or a "
            f"smaller --context"
        )
    count = min(args.segments, available)
    starts = [i * available // count * args.context for i in range(count)]
    return [ids[start : start + args.context] for start in starts]


def _key(args: argparse.Namespace, texts: list[torch.Tensor]) -> str:
    """Identify what a partial result belongs to."""
    ids = torch.cat(texts).numpy().tobytes()
    return hashlib.sha256(f"{args.model} {args.dtype}".encode() + ids).hexdigest()


class _Collected:
    """Moments by layer, kept on disk after each text.

    Args:
        path: The partial result.
        key: What it must belong to, to be used.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key, self.done = path, key, 0
        self.moments: dict[int, Moments] = {}
        self.out_grams: dict[int, torch.Tensor] = {}
        if path.exists():
            self._resume()

    def _resume(self) -> None:
        with safe_open(self.path, framework="pt") as file:
            header = file.metadata()
            if header["key"] != self.key:
                return
            self.done = int(header["done"])
            names = ("q", "k", "v", "out")
            for i in range(int(header["layers"])):
                q, k, v, out = (file.get_tensor(f"{i}.{name}") for name in names)
                self.moments[i], self.out_grams[i] = Moments(q, k, v), out

    def finish_text(self) -> None:
        """Count a text and write everything."""
        self.done += 1
        tensors = {f"{i}.out": gram for i, gram in self.out_grams.items()}
        for i, moments in self.moments.items():
            tensors |= {f"{i}.{name}": getattr(moments, name) for name in ("q", "k", "v")}
        header = {"key": self.key, "done": str(self.done), "layers": str(len(self.moments))}
        whole = self.path.with_suffix(".writing")
        save_file(tensors, whole, metadata=header)
        whole.replace(self.path)

    def add(
        self, module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Add a layer's q, k and v of one text, each [heads, tokens, head_dim]."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer not in self.moments:
            shape = (len(k), k.shape[2], k.shape[2])
            zeros = [torch.zeros(shape, dtype=torch.float64) for _ in range(3)]
            self.moments[layer] = Moments(*zeros)
            self.out_grams[layer] = _out_gram(module, len(q), len(k), k.shape[2])
        self.moments[layer].add(q, k, v)


def _out_gram(
    module: torch.nn.Module, num_qo_heads: int, num_kv_heads: int, head_dim: int
) -> torch.Tensor:
    """float64 [num_kv_heads, head_dim, head_dim], Gram matrix of the output projection's rows."""
    projection: Any = module.o_proj
    weight = projection.weight.double().T
    rows = weight.reshape(num_kv_heads, num_qo_heads // num_kv_heads, head_dim, -1)
    return (rows @ rows.transpose(2, 3)).sum(1).detach()


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    into: _Collected,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers that also collects."""
    into.add(module, query[0], key[0], value[0])
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out, None


AttentionInterface.register(ATTENTION_NAME, _attention)
