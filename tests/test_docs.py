from __future__ import annotations

from conftest import ROOT

from scripts.draw_kv_layout import bytes_table, field_table


def test_layout_tables_are_what_the_code_says() -> None:
    text = (ROOT / "docs" / "kv_layout.md").read_text()
    assert bytes_table() in text
    assert field_table("hack2", 128) in text
