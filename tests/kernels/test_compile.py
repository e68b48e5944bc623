"""Every GPU kernel compiles for Ampere, Ada and Hopper; needs no GPU."""

from __future__ import annotations

import os

import pytest

from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.kernels.append.kernel import _append_fwd_kernel, _close_fwd_kernel
from sgl_kvq.kernels.change_basis.kernel import _change_qkv_kernel
from sgl_kvq.kernels.common.compile import compile_for
from sgl_kvq.kernels.common.page_spec import PageSpec, page_spec
from sgl_kvq.kernels.common.rotation import _rotate_fwd_kernel
from sgl_kvq.kernels.decode.kernel import _decode_fwd_kernel, _decode_merge_kernel
from sgl_kvq.kernels.extend.kernel import _copy_rows_kernel, _dequantize_pages_kernel
from sgl_kvq.kernels.page_table.kernel import _tables_fwd_kernel
from testbed.formats import named_format

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


def spec_of(name: str, head_dim: int) -> PageSpec:
    return page_spec(PageLayout(named_format(name), head_dim, 8))


@pytest.mark.parametrize(
    ("arch", "name", "head_dim"),
    [
        *((arch, "hack2", 128) for arch in (80, 89, 90)),
        *(
            (90, "kvq2", 128),
            (80, "kvq4", 64),
            (90, "4:5:4", 128),
            (90, "2:7:2", 64),
            (90, "saw4", 96),
            (80, "bf16", 64),
            (90, "hack2-v1", 256),
            (89, "hack8", 80),
        ),
    ],
)
def test_decode(arch: int, name: str, head_dim: int) -> None:
    constants = {"SINKS": 4, "HEADS": 8, "GQA": 4, "STAGES": 2, "TAIL": 13, "PDL": arch >= 90}
    constants["FRESH"] = True
    constants["SPEC"] = spec_of(name, head_dim)
    compiled = compile_for(_decode_fwd_kernel, arch, constants, num_warps=1, maxnreg=248)
    ptx = compiled.asm["ptx"]
    assert ("cp.async" in ptx) == (name != "bf16")
    assert "movmatrix" in ptx
    # Eight programs must fit a Hopper multiprocessor (228 KiB) with hack2's pages.
    if (name, head_dim) == ("hack2", 128):
        assert 8 * (compiled.metadata.shared + 1024) <= 228 * 1024


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_merge(arch: int) -> None:
    constants = {"GQA": 4, "HEAD_DIM": 80, "KV_HEADS": 8, "TAIL": 13, "BLOCK_D": 128, "BLOCK_S": 32}
    assert compile_for(_decode_merge_kernel, arch, {**constants, "PDL": arch >= 90}, num_warps=4)


@pytest.mark.parametrize(
    ("arch", "name", "head_dim"),
    [(80, "hack2", 128), (89, "saw4", 80), (90, "kvq2", 128), (90, "4:5:4", 128)],
)
def test_append_and_close(arch: int, name: str, head_dim: int) -> None:
    constants = {"SINKS": 4, "SPEC": spec_of(name, head_dim)}
    for kernel in (_append_fwd_kernel, _close_fwd_kernel):
        compiled = compile_for(kernel, arch, constants, num_warps=8, enable_fp_fusion=False)
        # Codes equal the reference's to the bit.
        assert "div.rn.f32" in compiled.asm["ptx"]
        assert "fma.rn.f32" in compiled.asm["ptx"]


@pytest.mark.parametrize("arch", [80, 90])
def test_rotation(arch: int) -> None:
    constants = {"HEAD_DIM": 128, "ORDER": 128, "BLOCK_R": 4, "BLOCK_D": 128}
    assert compile_for(_rotate_fwd_kernel, arch, constants, num_warps=2, enable_fp_fusion=False)


@pytest.mark.parametrize(
    ("arch", "name", "head_dim"), [(80, "kvq2", 128), (89, "saw4", 80), (90, "bf16", 128)]
)
def test_scratch_fill(arch: int, name: str, head_dim: int) -> None:
    constants = {"OUT_DIM": 128, "SPEC": spec_of(name, head_dim)}
    assert compile_for(_copy_rows_kernel, arch, constants, num_warps=4)
    constants["SINKS"] = 4
    assert compile_for(
        _dequantize_pages_kernel, arch, constants, num_warps=4, enable_fp_fusion=False
    )


@pytest.mark.parametrize("arch", [80, 90])
def test_tables(arch: int) -> None:
    assert compile_for(_tables_fwd_kernel, arch, {}, num_warps=4)


@pytest.mark.parametrize(
    ("arch", "head_dim", "rows"), [(80, 128, 64), (90, 128, 64), (89, 80, 16), (90, 256, 16)]
)
def test_change_of_basis(arch: int, head_dim: int, rows: int) -> None:
    constants = {"GROUP": 4, "KV_HEADS": 8, "HEAD_DIM": head_dim}
    constants |= {"BLOCK_R": rows, "BLOCK_K": 32, "BLOCK_N": 128}
    assert compile_for(_change_qkv_kernel, arch, constants, num_warps=4)
