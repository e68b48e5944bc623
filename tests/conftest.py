"""What every test has: the device its kernels run on, and the marks `fast` and `host`.

Fixtures that need a model or SGLang are in `tests/support/fixtures.py`.
"""

from __future__ import annotations

import os

import pytest

from tests.support import ROOT

pytest_plugins = ["tests.support.fixtures"]

TESTS = ROOT / "tests"

WITHOUT_SGLANG = (
    "formats",
    "fidelity",
    "memory_pool",
    "kernels",
    "attention",
    "transfer",
    "test_config.py",
    "test_imports.py",
    "test_pythons.py",
)
"""Folders and modules of tests that run where SGLang is not installed."""

SMALLEST_HEAD_DIM = 64
MANY_PROGRAMS = 40
LARGE_TESTS = (
    "test_against_fp64_on_dequantized_pages",  # `test_head_dims` does the same with small heads
    "test_the_figures_of_the_check_command",
    "test_promises_are_kept",  # seeds that found a fault are run
    "test_same_bytes_and_outputs",  # each engine is tested by itself too
    # Transfer tests of four seconds and more.
    "test_strangers_at_the_door",
    "test_a_prefill_instance_that_is_none",
    "test_very_many_queued_rooms_all_end",
    "test_slow_clean_links_deliver",
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core, servers included
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Spinning OpenMP threads stall each other for milliseconds whenever another process runs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder: `host` needs SGLang; `fast` does not, and is of small shapes."""
    for item in items:
        if item.path.relative_to(TESTS).parts[0] not in WITHOUT_SGLANG:
            item.add_marker("host")
        elif is_small(item):
            item.add_marker("fast")


def is_small(item: pytest.Item) -> bool:
    """Whether a test takes a few seconds at most, under Triton's interpreter too."""
    name, _, _ = item.name.partition("[")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    fixtures = getattr(item, "fixturenames", ())
    return (
        item.get_closest_marker("long") is None
        and item.get_closest_marker("skipif") is None
        and "gpu" not in fixtures
        and name not in LARGE_TESTS
        and parameters.get("head_dim", 0) <= SMALLEST_HEAD_DIM
        and parameters.get("num_programs", 0) < MANY_PROGRAMS
    )


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels run: a GPU, or the CPU under Triton's interpreter."""
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 to interpret the kernels on the CPU")
    return "cuda"


@pytest.fixture
def gpu(device: str) -> str:
    """A GPU, for what cannot be interpreted."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture
def cpu() -> str:
    """A machine without a GPU, for models in float32: SGLang's GPU kernels take 16 bits only."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a model in float32, which SGLang serves on a CPU only")
    return "cpu"
