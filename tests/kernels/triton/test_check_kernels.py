from __future__ import annotations

import pytest

from sgl_kvq.commands.check import MAX_DECODE_ERROR
from sgl_kvq.commands.kernel_errors import measure
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format


@pytest.mark.parametrize("name", ["kvq2", "hack2", "bf16"])
def test_the_figures_of_the_check_command(name: str, device: str) -> None:
    found = measure(PageLayout(get_format(name), 64, 2), device, use_kernels=True)
    assert found.wrong_bytes == 0
    assert 0 < found.decode_error < MAX_DECODE_ERROR / 2
