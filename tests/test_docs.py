from __future__ import annotations

import re

from scripts.draw_kv_layout import bytes_table, field_table
from sgl_kvq.formats.page_layout import PageLayout
from sgl_kvq.formats.registry import format_names, get_format
from sgl_kvq.host.metrics import GAUGES, NONFINITE, PREFIX
from tests.support import ROOT
from tests.support.model_folders import FAMILIES


def test_layout_tables_are_what_the_code_says() -> None:
    text = (ROOT / "docs" / "kv_layout.md").read_text()
    assert bytes_table() in text
    assert field_table("hack2", 128) in text


def test_the_readme_says_what_a_format_gains() -> None:
    """Each row of its table: names, ..., times as many tokens as in bf16, in the same order."""
    text = (ROOT / "README.md").read_text().partition("## Formats")[2].partition("\n\n## ")[0]
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if re.fullmatch(r"[\d.x, ]+x", cells[-1]):
                found |= zip(re.findall("`(.+?)`", cells[0]), cells[-1].split(", "), strict=True)
    layouts = {name: PageLayout(get_format(name), 128, 1) for name in format_names()}
    assert found == {name: f"{16 / x.bits_per_element:.2f}x" for name, x in layouts.items()}


def test_every_metric_is_documented() -> None:
    text = (ROOT / "docs" / "observability.md").read_text()
    for name in (*GAUGES, f"{NONFINITE}_total"):
        assert f"`{PREFIX}{name}`" in text


def test_models_that_are_tested_are_those_the_docs_name() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+For\w+)`", row)}
    assert named == {family.served_class for family in FAMILIES.values()}
