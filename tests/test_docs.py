from __future__ import annotations

from scripts.draw_kv_layout import bytes_table, field_table
from sgl_kvq.host.metrics import CONTAINED, GAUGES, PREFIX
from tests.support import ROOT


def test_layout_tables_are_what_the_code_says() -> None:
    text = (ROOT / "docs" / "kv_layout.md").read_text()
    assert bytes_table() in text
    assert field_table("hack2", 128) in text


def test_every_metric_is_documented() -> None:
    text = (ROOT / "docs" / "observability.md").read_text()
    for name in (*GAUGES, f"{CONTAINED}_total"):
        assert f"`{PREFIX}{name}`" in text
