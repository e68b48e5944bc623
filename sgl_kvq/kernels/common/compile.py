"""Compile a kernel for a GPU that need not be there, for tests and reports of its resources."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

_ROWS = ("k_ptr", "v_ptr", "q_ptr", "x_ptr", "open_rows_ptr", "prior_rows_ptr", "sink_rows_ptr")
_TYPES = {
    **dict.fromkeys(_ROWS, "*bf16"),
    **dict.fromkeys(("q_codes_ptr", "final_ptr", "q_out_ptr", "k_out_ptr", "v_out_ptr"), "*bf16"),
    **dict.fromkeys(("out_ptr", "stat_ptr", "lse_ptr"), "*fp32"),
    **dict.fromkeys(("q_matrix_ptr", "k_matrix_ptr", "v_matrix_ptr"), "*fp32"),
    **dict.fromkeys(("seq_lens_ptr", "rows_ptr"), "*i64"),
    **dict.fromkeys(("open_slot_of_ptr", "sink_page_of_ptr"), "*i64"),
    **dict.fromkeys(("num_nonfinite_ptr", "displacements_ptr"), "*i64"),
    "pages_ptr": "*u8",
    "sm_scale_log2": "fp32",
}


def compile_for(kernel: Any, arch: int, constants: dict[str, Any], **options: Any) -> Any:
    """Compile a Triton or Gluon kernel as a launch with bfloat16 rows would.

    Args:
        kernel: A jitted function of this package; argument types follow from their names.
        arch: Compute capability, 90 for 9.0.
        constants: Values of its compile-time arguments.
        options: Launch options such as `num_warps`.

    Returns:
        Triton's `CompiledKernel`: `asm` holds each stage, `metadata` the shared memory.
    """

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        return _TYPES.get(name, "*i32" if name.endswith("_ptr") else "i32")

    signature = {name: type_of(name) for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(
        source(kernel, signature, constants, aligned), target=target, options=options
    )
