"""`python -m sgl_kvq calibrate MODEL`: the bases that calibrated formats store K and V in."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AttentionInterface

from sgl_kvq.commands.calibrate.basis_fit import Moments, fit_basis
from sgl_kvq.commands.calibrate.budget import Choice, choose_bits
from sgl_kvq.commands.calibrate.stored_attention import stored_attention
from sgl_kvq.commands.calibrate.text import default_text
from sgl_kvq.errors import ConfigError
from sgl_kvq.fidelity.geometry import model_geometry
from sgl_kvq.fidelity.loading import load_model, load_tokenizer
from sgl_kvq.formats.base import EXTRA_BITS, PAGE_SIZE
from sgl_kvq.formats.calibration import save_bases
from sgl_kvq.formats.registry import calibrated_formats

ATTENTION_NAME = "kvq_calibrate"
GPU_TEXTS, CPU_TEXTS = 36, 8
LOGIT_ROWS = 256  # rows of the [T, vocabulary] logits in memory at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", help="Hugging Face folder or name")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        help="text files like what will be served (default: documentation, as prose and as "
        "dialogue, and source code that come with Python)",
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens of a text, default: 2048")
    parser.add_argument(
        "--segments", type=int, help=f"texts to run, default: {GPU_TEXTS}, on a CPU {CPU_TEXTS}"
    )
    parser.add_argument(
        "--budget-bits",
        type=float,
        metavar="B",
        help="choose the bits of K and V in each layer that lose least within B bits per element, "
        "metadata included, instead of those of the format",
    )
    parser.add_argument("--device", default="cpu", help="where the model runs, default: cpu")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="in what the model runs, default: float32, which is also several times faster on CPUs "
        "without bfloat16 instructions; bfloat16 takes half the memory",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("kvq.safetensors"), help="default: kvq.safetensors"
    )


def run(args: argparse.Namespace) -> int:
    """Run the model over the texts and write the bases; goes on where an earlier run stopped."""
    if (
        args.context % PAGE_SIZE
        or args.context < 2 * PAGE_SIZE
        or (args.segments is not None and args.segments < 1)
    ):
        raise ConfigError(
            f"--context, --segments: expected a multiple of {PAGE_SIZE} from {2 * PAGE_SIZE} on "
            f"and at least 1, got {args.context} and {args.segments}"
        )
    collected = collect(args)
    write(args, collected)
    collected.path.unlink()
    return 0


def write(args: argparse.Namespace, collected: Collected) -> None:
    """Fit bases, choose bits if asked to, and write both.

    Args:
        args: Options of the command.
        collected: What `collect` returned.

    Raises:
        ConfigError: no coding is small enough for `--budget-bits`.
    """
    moments = [collected.moments[layer].cpu() for layer in sorted(collected.moments)]
    bases = [fit_basis(layer_moments) for layer_moments in moments]
    num_tokens = collected.done * args.context
    about = {"model": Path(args.model).name, "tokens": str(num_tokens)}
    if args.budget_bits is None:
        save_bases(args.out, bases, about)
        names = " or ".join(found.name for found in calibrated_formats())
    else:
        choice = choose_bits(args.budget_bits, moments, bases, num_tokens)
        save_bases(args.out, bases, about, choice.allocation)
        names = choice.allocation.format
        _report(choice, about, args.out.with_suffix(".json"))
    sys.stdout.write(f"serve with --kv-quant {names} --kv-quant-config {args.out}\n")


def _report(choice: Choice, about: dict[str, str], path: Path) -> None:
    """Say what was chosen, and write it as JSON for people; a server reads the other file."""
    layers = [
        bits._asdict() | {"predicted_nats": float(f"{cost:.3g}")}
        for bits, cost in zip(choice.allocation.layers, choice.costs, strict=True)
    ]
    report = {
        **about,
        "format": choice.allocation.format,
        "bits_per_element": round(choice.bits_per_element, 4),
        "layers": layers,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    for bits, count in Counter(choice.allocation.layers).most_common():
        sys.stdout.write(
            f"{count} layers: K {bits.k} bits, {bits.outlier_16ths} of 16 channels {EXTRA_BITS} "
            f"more, V {bits.v} bits\n"
        )
    sys.stdout.write(f"{choice.bits_per_element:.4g} bits per element; {path} lists the layers\n")


def collect(args: argparse.Namespace) -> Collected:
    """Collect moments over the texts.

    Args:
        args: Options of the command.

    Raises:
        ConfigError: no such model, one whose cache no format can hold, or too little text.
    """
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, args.dtype, ATTENTION_NAME, args.device)
    head_dim = model_geometry(model.config).head_dim
    if head_dim % 16:
        raise ConfigError(f"{args.model}: expected head_dim a multiple of 16, got {head_dim}")
    texts = _texts(args, tokenizer)
    collected = Collected(args.out.with_suffix(".partial"), _key(args, texts), args.device)
    for number in track(range(len(texts)), "calibrating"):
        if number >= collected.done:
            _run_text(model, texts[number].to(args.device), number, collected)
            collected.finish_text()
    return collected


def _run_text(model: Any, ids: torch.Tensor, number: int, into: Collected) -> None:
    """Run one text forward, draw an answer for each token, and bring its gradient back."""
    embedded = model.get_input_embeddings()(ids[None]).requires_grad_()
    hidden = model.base_model(inputs_embeds=embedded, use_cache=False, into=into).last_hidden_state
    states = hidden.detach().requires_grad_()
    generator = torch.Generator(ids.device).manual_seed(number)
    for rows in states[0].split(LOGIT_ROWS):
        logprobs = model.get_output_embeddings()(rows).float().log_softmax(-1)
        drawn = torch.multinomial(logprobs.detach().exp(), 1, generator=generator)
        logprobs.gather(1, drawn).sum().backward()
    hidden.backward(states.grad)


def _texts(args: argparse.Namespace, tokenizer: Any) -> list[torch.Tensor]:
    """Cut the text into pieces of `--context` tokens, spread over all of it."""
    if args.text:
        text = "\n\n".join(path.read_text() for path in args.text)
    else:
        text = default_text(tokenizer)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    available = len(ids) // args.context
    if not available:
        raise ConfigError(
            f"--text: expected at least {args.context} tokens, got {len(ids)}; give more text or a "
            f"smaller --context"
        )
    wanted = args.segments or (CPU_TEXTS if args.device == "cpu" else GPU_TEXTS)
    count = min(wanted, available)
    starts = [i * available // count * args.context for i in range(count)]
    return [ids[start : start + args.context] for start in starts]


def _key(args: argparse.Namespace, texts: list[torch.Tensor]) -> str:
    """Identify what a partial result belongs to."""
    ids = torch.cat(texts).numpy().tobytes()
    return hashlib.sha256(f"{args.model} {args.dtype}".encode() + ids).hexdigest()


class Collected:
    """Moments by layer, kept on disk after each text.

    Args:
        path: The partial result.
        key: Digest of model and texts; a partial result with another one is discarded.
        device: Where the model runs and moments are summed.
    """

    def __init__(self, path: Path, key: str, device: str) -> None:
        self.path, self.key, self.device, self.done = path, key, device, 0
        self.moments: dict[int, Moments] = {}
        if path.exists():
            self._resume()

    def _resume(self) -> None:
        with safe_open(self.path, framework="pt", device=self.device) as file:
            header = file.metadata()
            if header["key"] != self.key:
                return
            self.done = int(header["done"])
            for i in range(int(header["layers"])):
                names = Moments.__annotations__
                self.moments[i] = Moments(*(file.get_tensor(f"{i}.{name}") for name in names))

    def finish_text(self) -> None:
        """Count a text and write everything."""
        self.done += 1
        tensors = {
            f"{i}.{name}": tensor
            for i, moments in self.moments.items()
            for name, tensor in vars(moments).items()
        }
        header = {"key": self.key, "done": str(self.done), "layers": str(len(self.moments))}
        whole = self.path.with_suffix(".writing")
        save_file(tensors, whole, metadata=header)
        whole.replace(self.path)

    def of_layer(self, layer: int, k: torch.Tensor) -> Moments:
        """Moments of a layer whose keys are k [heads, tokens, head_dim]."""
        if layer not in self.moments:
            shape = (4, len(k), k.shape[2], k.shape[2])
            zeros = torch.zeros(shape, dtype=torch.float64, device=self.device)
            self.moments[layer] = Moments(*zeros.unbind())
        return self.moments[layer]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    into: Collected,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers that also collects, now and when gradients arrive."""
    moments = into.of_layer(int(module.layer_idx), key[0])  # type: ignore[arg-type]
    moments.add_rows(key[0].detach(), value[0].detach())
    sm_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = stored_attention(query[0], key[0], value[0], sm_scale, moments.add_gradients)
    return out.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention)
