from __future__ import annotations

import pytest

from sgl_kvq.commands.check.command import MAX_ERROR
from sgl_kvq.commands.check.kernel_errors import measure
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import get_format
from sgl_kvq.host import flash_attention_3
from tests.support.torch_attention import TorchAttention


@pytest.mark.parametrize("name", ["kvq2", "bf16", pytest.param("hack2", marks=pytest.mark.long)])
def test_the_figures_of_the_check_command(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        monkeypatch.setattr(flash_attention_3, "make_prefill_attention", TorchAttention)
    found = measure(PageLayout(get_format(name), 64, 2), device, use_kernels=True)
    assert found.wrong_bytes == 0
    assert 0 < found.decode_error < MAX_ERROR / 2
    assert 0 < found.extend_error < MAX_ERROR / 2
