"""The pool's gauges in a real server's `/metrics`."""

from __future__ import annotations

import json
import re
import time

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from sgl_kvq.host.metrics import GAUGES, NONFINITE, PREFIX
from testbed.servers import Server
from tests.support import ROOT

PAGES = 40  # of `small_server`


@pytest.fixture
def server(small_server: Server) -> Server:
    return small_server


def scrape(server: Server) -> dict[str, float]:
    """Our metrics by name, without the prefix."""
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    return {
        sample.name.removeprefix(PREFIX): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(PREFIX) and not sample.name.endswith("_created")
    }


def scrape_until(server: Server, name: str, value: float) -> dict[str, float]:
    """SGLang publishes once more when it becomes idle, a moment after the answer."""
    deadline = time.monotonic() + 20
    while (found := scrape(server))[name] != value and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def generate(server: Server, ids: list[int], new_tokens: int) -> None:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    server.generate({"input_ids": ids, "sampling_params": sampling})


def test_every_metric_is_there_with_labels(server: Server) -> None:
    generate(server, [9] * 5, 2)
    found = scrape(server)
    assert set(found) == {*GAUGES, f"{NONFINITE}_total"}
    assert found["bytes_per_token"] == 2 * 2 * 40  # layers, KV heads, docs/kv_layout.md
    assert found["open_slots"] == 2
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    (line,) = (row for row in text.splitlines() if row.startswith(f"{PREFIX}open_slots{{"))
    assert 'format="hack2"' in line
    assert 'tp_rank="0"' in line


def test_pages_open_close_and_stay_cached(server: Server) -> None:
    server.flush_cache()
    generate(server, list(range(1000, 1150)), 10)
    idle = scrape_until(server, "open_pages", 0)
    assert (idle["closed_pages"], idle["open_pages"], idle["free_pages"]) == (2, 0, PAGES - 2)
    assert idle["tokens_held"] == 128
    assert idle["sink_pages"] == 1


def test_a_flushed_cache_shows_at_once(server: Server) -> None:
    generate(server, list(range(4000, 4150)), 10)
    assert scrape_until(server, "open_pages", 0)["closed_pages"] >= 2
    server.flush_cache()
    found = scrape_until(server, "closed_pages", 0)
    assert (found["closed_pages"], found["free_pages"]) == (0, PAGES)
    assert (found["tokens_held"], found["sink_pages"]) == (0, 0)


def test_a_running_request_holds_an_open_page(server: Server) -> None:
    server.flush_cache()
    payload = {
        "input_ids": list(range(2000, 2070)),
        "sampling_params": {"temperature": 0, "max_new_tokens": 50, "ignore_eos": True},
        "stream": True,
    }
    seen = []
    with requests.post(f"{server.url}/generate", json=payload, stream=True, timeout=60) as stream:
        for number, _ in enumerate(stream.iter_lines()):
            if number in (20, 40):
                seen.append(scrape(server))
    for found in seen:
        assert (found["open_pages"], found["closed_pages"]) == (1, 1)


def test_nonfinite_elements_are_counted(server: Server) -> None:
    server.flush_cache()
    before = scrape(server)[f"{NONFINITE}_total"]
    generate(server, list(range(3000, 3128)), 2)
    after = scrape_until(server, "open_pages", 0)[f"{NONFINITE}_total"]
    # One channel of one head in one layer, of the two pages that closed.
    assert 0 < after - before <= 128


def test_the_dashboard_asks_for_metrics_that_exist(server: Server) -> None:
    dashboard = json.loads((ROOT / "examples/grafana/sgl_kvq-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = set(re.findall(r"\b(?:sgl_kvq|sglang):\w+", " ".join(expressions)))
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    exported = {row.split("{")[0] for row in text.splitlines() if not row.startswith("#")}
    assert asked <= exported
    ours = {PREFIX + name for name in GAUGES}
    assert ours <= asked
