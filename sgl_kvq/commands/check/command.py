"""`python -m sgl_kvq check`: one screen that says whether this machine can serve quantized KV."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sgl_kvq import __version__
from sgl_kvq.commands.check.kernel_errors import KernelErrors, measure
from sgl_kvq.commands.check.progress import show_progress
from sgl_kvq.errors import KvqError
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import format_names, get_format
from sgl_kvq.host import names as host
from sgl_kvq.host.versions import supported

DEFAULT_FORMATS = ("kvq2", "hack2", "hack4", "bf16")
MIN_CAPABILITY = (8, 0)
NUM_KV_HEADS = 2
# 16-bit outputs and factors: 2^-8 on each; a wrong scale, page or sink row is far above this.
MAX_ERROR = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=format_names(),
        default=DEFAULT_FORMATS,
        metavar="FORMAT",
        help="formats whose kernels run; on a GPU each takes seconds to compile (default: "
        f"{' '.join(DEFAULT_FORMATS)})",
    )
    parser.add_argument("--head-dim", type=int, default=128, help="default: 128")


def run(args: argparse.Namespace) -> int:
    """Print the screen; return 1 if something fails."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]sgl_kvq {__version__}[/bold]  {_versions()}")
    passed = [_line(console, "device", _device), _line(console, "host", supported.describe_version)]
    with show_progress(console) as report:
        report("hooks: loading SGLang")
        passed.append(_line(console, "hooks", _hooks))
        on_gpu = torch.cuda.is_available()
        errors: dict[str, KernelErrors] = {}
        for name in args.formats:
            layout = PageLayout(get_format(name), args.head_dim, NUM_KV_HEADS)
            check = partial(_kernels, layout, on_gpu, errors, report)
            passed.append(_line(console, name, check))
    console.print(_formats_table(args.head_dim, errors))
    failed = passed.count(False)
    console.print("everything works" if not failed else f"[red]{failed} of {len(passed)} failed")
    return 1 if failed else 0


def _line(console: Console, name: str, check: Callable[[], str]) -> bool:
    """Print one check; an error is its result, not the end of the screen."""
    try:
        text, passed = check(), True
    except Exception as error:  # whatever a broken installation raises is what the user must see
        reason = str(error).strip() or type(error).__name__
        text, passed = reason.splitlines()[0], False
    mark = "[green]ok  [/green]" if passed else "[red]FAIL[/red]"
    console.print(f"{mark} {name:<8}", Text(text))
    return passed


def _versions() -> str:
    """Python and the packages that kernels and hooks depend on, with their versions."""
    known = {"Python": platform.python_version(), **supported.installed_versions()}
    return ", ".join(f"{name} {number}" for name, number in known.items())


def _device() -> str:
    if not torch.cuda.is_available():
        return "no GPU: serving on the CPU with the PyTorch path"
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    name = f"{properties.name}, sm_{properties.major}{properties.minor}"
    if capability < MIN_CAPABILITY:
        raise KvqError(f"{name}: expected sm_80 or newer; use another GPU or the CPU")
    free, total = torch.cuda.mem_get_info()
    return (
        f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA {torch.version.cuda}, "
        f"{torch.cuda.device_count()} visible"
    )


def _hooks() -> str:
    host.load_plugins()
    from sgl_kvq.host import plugin

    plugin.check_hooks()
    return "all live, attention backend kvq registered"


def _kernels(
    layout: PageLayout,
    on_gpu: bool,
    errors: dict[str, KernelErrors],
    report: Callable[[str], None],
) -> str:
    """Measure one format; keep the figures in `errors`.

    Raises:
        KvqError: a kernel is further off than rounding explains.
    """
    name, doing = layout.format.name, "compiling and running" if on_gpu else "running"
    found = measure(
        layout,
        "cuda" if on_gpu else "cpu",
        use_kernels=on_gpu,
        report=lambda operation: report(f"{name}: {doing} {operation}"),
    )
    errors[name] = found
    path = "GPU kernels" if on_gpu else "PyTorch path"
    text = (
        f"{path}: append {found.wrong_bytes} of {found.total_bytes:,} bytes differ from the "
        f"specification; against float64, decode error {found.decode_error:.1e}, extend error "
        f"{found.extend_error:.1e}"
    )
    errors_fit = found.decode_error <= MAX_ERROR and found.extend_error <= MAX_ERROR
    if found.wrong_bytes or not errors_fit:
        raise KvqError(f"{text} (allowed: no byte, errors of {MAX_ERROR})")
    return text


def _formats_table(head_dim: int, errors: dict[str, KernelErrors]) -> Table:
    table = Table(title=f"closed pages, one layer and KV head of {head_dim}")
    for column in ("--kv-quant", "bytes/token", "x bf16", "decode error", "extend error"):
        table.add_column(column, justify="left" if column == "--kv-quant" else "right")
    for name in format_names():
        layout = PageLayout(get_format(name), head_dim, 1)
        error = errors.get(name)
        table.add_row(
            name,
            f"{layout.bytes_per_token:g}",
            f"{layout.row_page_bytes / layout.page_bytes:.2f}",
            "-" if error is None else f"{error.decode_error:.1e}",
            "-" if error is None else f"{error.extend_error:.1e}",
        )
    return table
