"""Gluon, Triton's dialect with explicit register layouts, and a stand-in for Triton's interpreter.

Kernels import `gl`, `jit`, `mma_v2`, `async_copy`, `barrier` and `constexpr_function` from here.
With TRITON_INTERPRET=1 they resolve to plain Triton without layouts, so that the logic of the same
source runs on a CPU; Gluon itself has no interpreter. Inline assembly has none either: callers
branch on `INTERPRET`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gluon_language
from triton.experimental.gluon.language.nvidia import ampere

_FORWARDED = (
    *("abs", "broadcast", "exp2", "expand_dims", "join", "load", "log2", "max", "maximum"),
    *("minimum", "num_programs", "permute", "program_id", "reshape", "split", "store", "sum"),
    "where",
)
_LAYOUTS = (
    *("BlockedLayout", "DistributedLinearLayout", "DotOperandLayout", "NVMMADistributedLayout"),
    *("SliceLayout", "SwizzledSharedLayout"),
)
INTERPRET: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


class _InterpretedBuffer:
    """Shared memory without layouts: [stages, rows, columns], or a view of one of its stages."""

    def __init__(self, shape: Any, whole: _InterpretedBuffer | None = None) -> None:
        self.shape = [int(size) for size in shape]
        self.whole = whole
        self.parts: dict[int, _InterpretedBuffer] = {}
        self.value: Any = None

    def index(self, index: Any) -> _InterpretedBuffer:
        position = int(index if isinstance(index, int) else index.handle.data.item())
        return self.parts.setdefault(position, _InterpretedBuffer(self.shape[1:]))

    def slice(self, start: int, length: int, dim: int = 0) -> _InterpretedBuffer:
        part = _InterpretedBuffer([length, self.shape[1]])
        rows = tl.arange(0, self.shape[0])[:, None] == start
        picked = tl.sum(tl.where(rows, self.value.to(tl.float32), 0.0), axis=0)
        part.value = tl.reshape(picked.to(self.value.dtype), part.shape)
        return part

    def reshape(self, shape: Any) -> _InterpretedBuffer:
        return _InterpretedBuffer(shape, self)

    def load(self, layout: Any) -> Any:
        return self.value

    def store(self, value: Any) -> None:
        if self.whole is None:
            self.value = value
        else:
            self.whole.store(tl.reshape(value, self.whole.shape))


def _interpreted_async_copy() -> SimpleNamespace:
    def copy(buffer: _InterpretedBuffer, pointer: Any, mask: Any) -> None:
        buffer.store(tl.load(pointer, mask=mask, other=0))

    return SimpleNamespace(
        async_copy_global_to_shared=copy,
        commit_group=lambda: None,
        wait_group=lambda num_outstanding: None,
    )


def _interpreted_language() -> SimpleNamespace:
    """The part of Gluon's language that our kernels use, in Triton's terms, layouts ignored."""

    def arange(start: int, end: int, layout: Any = None) -> Any:
        return tl.arange(start, end)

    def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Any:
        return tl.full(shape, value, dtype)

    def zeros(shape: Any, dtype: Any, layout: Any = None) -> Any:
        return tl.full(shape, 0, dtype)

    def convert_layout(x: Any, layout: Any, assert_trivial: bool = False) -> Any:
        return x

    def forward(name: str) -> Any:
        # Looked up at each call: the interpreter patches triton.language while a kernel runs.
        return lambda *args, **kwargs: getattr(tl, name)(*args, **kwargs)

    namespace = SimpleNamespace(**{name: forward(name) for name in _FORWARDED})
    for name in ("float16", "bfloat16", "float32", "int16", "int32", "int64"):
        setattr(namespace, name, getattr(tl, name))
    for name in _LAYOUTS:
        setattr(namespace, name, getattr(gluon_language, name))
    namespace.allocate_shared_memory = lambda dtype, shape, layout: _InterpretedBuffer(shape)
    namespace.pointer_type = tl.pointer_type
    namespace.to_tensor = lambda number: number
    namespace.arange, namespace.full, namespace.zeros = arange, full, zeros
    namespace.convert_layout = convert_layout
    return namespace


def _interpreted_mma(a: Any, b: Any, acc: Any) -> Any:
    # The interpreter multiplies the bits of bfloat16 as integers.
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


def _no_barrier() -> None:
    """The interpreter runs a whole program at once."""


def _barrier() -> Any:
    """Gluon's barrier among the threads of a program: `thread_barrier` before Triton 3.7."""
    if INTERPRET:
        return _no_barrier
    name = "barrier" if hasattr(gluon_language, "barrier") else "thread_barrier"
    return getattr(gluon_language, name)


constexpr_function = gluon.constexpr_function
barrier: Any = _barrier()
gl: Any = _interpreted_language() if INTERPRET else gluon_language
jit: Any = triton.jit if INTERPRET else gluon.jit
mma_v2: Any = _interpreted_mma if INTERPRET else ampere.mma_v2
async_copy: Any = _interpreted_async_copy() if INTERPRET else ampere.async_copy
