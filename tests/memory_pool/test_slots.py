from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_kvq.errors import PoolExhaustedError
from sgl_kvq.memory_pool.slots import SlotTable

NUM_SLOTS, NUM_PAGES = 4, 12


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["acquire", "release", "transfer"]),
            st.lists(st.integers(1, NUM_PAGES), min_size=1, max_size=4, unique=True),
        ),
        max_size=30,
    )
)
def test_against_a_dictionary(operations: list[tuple[str, list[int]]]) -> None:
    table = SlotTable("test", NUM_SLOTS, NUM_PAGES, "cpu")
    held: dict[int, int] = {}
    for name, pages in operations:
        if name == "acquire":
            new = [page for page in pages if page not in held]
            if len(held) + len(new) > NUM_SLOTS:
                with pytest.raises(PoolExhaustedError, match="slots wanted"):
                    table.acquire(torch.tensor(new))
                continue
            table.acquire(torch.tensor(new, dtype=torch.int64))
            held |= {page: int(table.step_view()[page]) for page in new}
        elif name == "release":
            table.release(torch.tensor(pages))
            held = {page: slot for page, slot in held.items() if page not in pages}
        else:
            old = [page for page in pages if page in held][:1]
            new = [page for page in pages if page not in held][:1]
            if not old or not new:
                continue
            table.transfer(torch.tensor(old), torch.tensor(new))
            held[new[0]] = held.pop(old[0])
        assert table.num_used() == len(held)
        assert len(set(held.values())) == len(held)
        assert 0 not in held.values()
        expected = [held.get(page, 0) for page in range(NUM_PAGES + 1)]
        assert table.held_slot(torch.arange(NUM_PAGES + 1)).tolist() == expected


def test_rows_of_a_released_slot_are_still_found() -> None:
    """Work already queued on the device reads a closed page's slot after it was given up."""
    table = SlotTable("test", NUM_SLOTS, NUM_PAGES, "cpu")
    table.acquire(torch.tensor([3]))
    slot = int(table.step_view()[3])
    table.release(torch.tensor([3]))
    assert int(table.step_view()[3]) == slot
    table.acquire(torch.tensor([5]))
    table.release(torch.tensor([3]))  # a stale entry takes nothing from the new owner
    assert table.held_slot(torch.tensor([5])).item() == table.step_view()[5]
    assert table.num_used() == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_gpu_never_hands_out_a_slot_twice() -> None:
    """The device's assertion ends the process, so another one runs into it."""
    code = """
import torch
from sgl_kvq.memory_pool.slots import SlotTable
table = SlotTable("open pages", 2, 12, "cuda")
table.acquire(torch.tensor([3, 4], device="cuda"))
table.release(torch.tensor([3], device="cuda"))
table.acquire(torch.tensor([5], device="cuda"))
torch.cuda.synchronize()
print("so far well", flush=True)
table.acquire(torch.tensor([6], device="cuda"))
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "so far well" in done.stdout
    assert done.returncode != 0
    assert "ssert" in done.stderr
