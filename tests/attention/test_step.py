"""What a step may read of the table of slots, and that nobody else reads it."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

from sgl_kvq.attention.step import step_slots
from tests.support.growing_requests import make_store
from tests.support.sink_rows import give_sink_rows

PACKAGE = Path(__file__).parent.parent.parent / "sgl_kvq"


def test_a_step_finds_the_slot_that_its_page_gives_up() -> None:
    """The views follow the tables: a CUDA graph keeps their addresses."""
    store = make_store("hack2")
    slots = step_slots(store)
    page = torch.tensor([7])
    store.open_slots.acquire(page)
    row = give_sink_rows(store, page)
    held = int(store.open_slots.held_slot(page))
    store.open_slots.release(page)
    assert int(slots.open_slot_of[7]) == held > 0
    assert int(store.open_slots.held_slot(page)) == 0
    assert int(slots.sink_page_of[7]) == row
    store.open_slots.clear()
    assert not slots.open_slot_of.any()


def test_only_a_step_reads_the_table_without_its_owners() -> None:
    readers = {"step_view": set(), "_slot_of": set()}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in readers:
                readers[node.attr].add(path.relative_to(PACKAGE).as_posix())
    assert readers == {"step_view": {"attention/step.py"}, "_slot_of": {"memory_pool/slots.py"}}
