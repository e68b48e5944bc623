"""Registers, spills, shared memory and instructions of each kernel and format; needs no GPU.

Usage: python -m benchmarks.kernels.resources [--formats ...] [--head-dims 64 128] [--arch 90]

`ptx` is a hash of the kernel's PTX without its name and line numbers: a change of source that
leaves it alone leaves the kernel alone.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from tabulate import tabulate

from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.kernels.append.kernel import _append_fwd_kernel, _close_fwd_kernel
from sgl_kvq.kernels.common.compile import compile_for
from sgl_kvq.kernels.common.page_spec import PageSpec, page_spec
from sgl_kvq.kernels.decode.api import MAX_REGISTERS
from sgl_kvq.kernels.decode.configs import tail_units
from sgl_kvq.kernels.decode.kernel import _decode_fwd_kernel
from sgl_kvq.kernels.extend.configs import prefill_head_dim
from sgl_kvq.kernels.extend.kernel import _copy_rows_kernel, _dequantize_pages_kernel
from testbed.formats import named_format

FORMATS = ("hack2", "hack4", "kvq2", "kvq4", "saw4", "bf16")
NUM_KV_HEADS, GQA_GROUP, SINK_TOKENS = 8, 4, 4
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", re.MULTILINE)


def kernels(spec: PageSpec, arch: int) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """Name, kernel, compile-time arguments and launch options of what serves a format."""
    pages = {"SINKS": SINK_TOKENS, "SPEC": spec}
    decoding = {
        **pages, "FRESH": True, "HEADS": 8, "GQA": GQA_GROUP, "STAGES": 2,
        "TAIL": tail_units(SINK_TOKENS), "PDL": arch >= 90,
    }  # fmt: skip
    yield "decode", _decode_fwd_kernel, decoding, {"num_warps": 1, "maxnreg": MAX_REGISTERS}
    copying = {"OUT_DIM": prefill_head_dim(spec.head_dim), "SPEC": spec}
    yield "copy", _copy_rows_kernel, copying, {"num_warps": 4}
    dequantizing = {"SINKS": SINK_TOKENS, **copying}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    yield "dequantize", _dequantize_pages_kernel, dequantizing, options
    yield "append", _append_fwd_kernel, pages, {"num_warps": 8, "enable_fp_fusion": False}
    yield "close", _close_fwd_kernel, pages, {"num_warps": 8, "enable_fp_fusion": False}


def ptx_hash(ptx: str, name: str) -> str:
    """Hash of PTX without what depends on names and lines of the source."""
    ptx = re.sub(r"//.*|\.(?:loc|file)\b.*", "", ptx).replace(name, "kernel")
    return hashlib.sha256("".join(ptx.split()).encode()).hexdigest()[:12]


def resources(compiled: Any) -> dict[str, Any]:
    """What a compiled kernel takes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        texts = [
            subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        ]
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", texts[0]))
    instructions = [name for name in _INSTRUCTION.findall(texts[1]) if name != "NOP"]
    return {
        "registers": int(usage["REG"]),
        "stack_bytes": int(usage["STACK"]),
        "spill_instructions": sum(name in ("LDL", "STL") for name in instructions),
        "shared_bytes": compiled.metadata.shared,
        "instructions": len(instructions),
        "ptx": ptx_hash(compiled.asm["ptx"], compiled.metadata.name),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for 9.0")
    args = parser.parse_args()
    triton.knobs.compilation.disable_line_info = True
    rows = []
    for head_dim in args.head_dims:
        for name in args.formats:
            spec = page_spec(PageLayout(named_format(name), head_dim, NUM_KV_HEADS))
            for kernel_name, kernel, constants, options in kernels(spec, args.arch):
                compiled = compile_for(kernel, args.arch, constants, **options)
                case = {"kernel": kernel_name, "format": name, "head_dim": head_dim}
                rows.append(case | resources(compiled))
    print(tabulate(rows, headers="keys"))


if __name__ == "__main__":
    main()
