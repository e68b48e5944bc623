"""Formats by name, and formats of other packages."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sgl_kvq.errors import ConfigError
from sgl_kvq.formats.base import PAGE_SIZE, Coding, FieldSpec, KOrV, QuantFormat
from sgl_kvq.formats.dequantize import decode_keys, decode_values
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.quantize import encode_pages
from sgl_kvq.formats.registry import get_format, register
from sgl_kvq.formats.scalar import ScalarFormat
from tests.support import ROOT

OUTSIDE = """
from sgl_kvq.formats.base import Coding, QuantFormat
from sgl_kvq.formats.registry import register
from sgl_kvq.formats.scalar import ScalarFormat

OURS = register(
    ScalarFormat(
        name="outside8",
        k=Coding(8, axis="token", rotated=True),
        v=Coding(4, axis="channel", rounding="half_up"),
        help="axes that no format of sgl_kvq has",
        source="test",
    )
)
"""

SERVE = """
import torch
from sgl_kvq.config import KVQuantConfig
from sgl_kvq.formats.registry import format_names, get_format
from sgl_kvq.kernels.decode import reference
from sgl_kvq.kernels.decode.cpu import decode, plan_decode
from tests.support.attention import random_cache, relative_error

assert KVQuantConfig("outside8").format in format_names()
generator = torch.Generator().manual_seed(0)
data = random_cache("outside8", 64, 2, [1, 64, 65, 700], 4, generator)
q = torch.randn(4, 6, 64, generator=generator)
out, _ = decode(q, data.cache, plan_decode(data.table, 4), data.layout, 0.125)
expected, _ = reference.decode(q, data.cache, data.table, data.layout, 0.125)
assert relative_error(out, expected) < 1e-5
import outside
assert get_format("outside8") is outside.OURS
print(data.layout.bytes_per_token)
"""


def python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (*paths, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def install(folder: Path, module: str, code: str) -> None:
    """What pip leaves of a package with one module that an entry point names."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sgl_kvq.formats]\n{module} = {module}\n")


def test_another_package_adds_a_format_with_one_module(tmp_path: Path) -> None:
    install(tmp_path, "outside", OUTSIDE)
    done = python(SERVE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 2 * (64 + 4 + 32 + 4)  # heads; codes and bfloat16 pairs of K, V


def test_a_broken_package_does_not_stop_the_others(tmp_path: Path) -> None:
    install(tmp_path, "broken", "import no_such_module")
    install(tmp_path, "outside", OUTSIDE)
    done = python(
        "from sgl_kvq.formats.registry import format_names; print(*format_names())", tmp_path
    )
    assert {"outside8", "kvq2"} <= set(done.stdout.split())
    assert "formats of broken are left out: No module named 'no_such_module'" in done.stderr


@pytest.mark.parametrize(
    "imports",
    ["import sgl_kvq.config", "import sgl_kvq.formats.base, sgl_kvq.formats.registry"],
)
def test_descriptions_need_no_torch(imports: str) -> None:
    names = "from sgl_kvq.formats.registry import format_names; assert 'kvq2' in format_names()"
    code = f"import sys; {imports}; {names}; assert not {{'torch', 'sglang'}} & set(sys.modules)"
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_a_name_belongs_to_one_format() -> None:
    kvq2 = get_format("kvq2")
    with pytest.raises(ValueError, match="expected one that no format has, got 'kvq2'"):
        register(replace(kvq2, k=Coding(4)))
    assert get_format("kvq2") is kvq2
    with pytest.raises(ConfigError, match=r"expected one of bf16, .*saw4, got 'kvq3'"):
        get_format("kvq3")


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        (Coding(4), Coding(4, rotated=True), "v: expected values neither rotated"),
        (Coding(4), Coding(4, "channel", outlier_16ths=1), "nor with outlier channels"),
        (Coding(16), Coding(4), "expected 16 bits in both or in neither, got 16 and 4"),
        (Coding(2), Coding(16), "expected 16 bits in both or in neither, got 2 and 16"),
    ],
    ids=str,
)
def test_codings_that_no_kernel_reads_are_refused(k: Coding, v: Coding, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalarFormat("mix", k, v, help="test", source="test")


def test_a_taken_name_is_refused_before_anybody_looked_one_up() -> None:
    done = python(OUTSIDE.replace("outside8", "saw4"))
    assert "ValueError: name: expected one that no format has, got 'saw4'" in done.stderr


class Float8Format(QuantFormat):
    """A family with other fields: rows as float8, without metadata."""

    def fields(self, head_dim: int) -> list[FieldSpec]:
        return [FieldSpec(f"{tensor}_float8", (PAGE_SIZE, head_dim), "uint8") for tensor in "kv"]

    def quantize(
        self, k: torch.Tensor, v: torch.Tensor, num_sinks: torch.Tensor, layout: PageLayout
    ) -> torch.Tensor:
        pages = k.new_zeros(len(k), layout.page_bytes, dtype=torch.uint8)
        for name, x in (("k_float8", k), ("v_float8", v)):
            coded = x.transpose(1, 2).to(torch.float8_e4m3fn).view(torch.uint8)
            layout.view(pages, name).copy_(coded)
        return pages

    def dequantize(self, pages: torch.Tensor, layout: PageLayout, tensor: KOrV) -> torch.Tensor:
        return layout.view(pages, f"{tensor}_float8").view(torch.float8_e4m3fn).float()


def test_a_family_with_other_fields() -> None:
    float8 = Float8Format("float8", Coding(8), Coding(8), help="float8 rows", source="test")
    layout = PageLayout(float8, 96, 2)
    assert layout.bits_per_element == 8
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 3, PAGE_SIZE, 2, 96, generator=generator).to(torch.bfloat16)
    pages = encode_pages(k, v, torch.zeros(3, dtype=torch.int32), layout)
    for x, decode in ((k, decode_keys), (v, decode_values)):
        expected = x.float().transpose(1, 2)
        torch.testing.assert_close(decode(pages, layout), expected, rtol=2**-4, atol=2**-9)
    with pytest.raises(ValueError, match="k: expected finite values"):
        encode_pages(k * torch.nan, v, torch.zeros(3, dtype=torch.int32), layout)
