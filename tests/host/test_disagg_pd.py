"""Requests that PD cannot serve end at once on both instances, with the reason."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from testbed.pd_cluster import launch_pd
from testbed.servers import Server, dtype_flags

pytestmark = pytest.mark.long

DEADLINE_S = 60


def test_several_samples_of_a_prompt_are_refused_on_both_sides(
    tiny_model_path: str, tmp_path: Path
) -> None:
    """SGLang sends `n` requests with one room; a deadline later would be too late."""
    flags = ["--kv-quant", "hack2", "--kv-quant-memory-gb", "0.05", "--skip-server-warmup"]
    flags += ["--kv-quant-transfer-deadline-s", str(DEADLINE_S), *dtype_flags()]
    with launch_pd(tiny_model_path, flags, tmp_path) as cluster:
        payload: dict[str, Any] = {
            "input_ids": list(range(1000, 1100)),
            "sampling_params": {"temperature": 0.5, "max_new_tokens": 4, "n": 3},
        }
        body = cluster._with_room(payload)
        began = time.monotonic()

        def ask(server: Server) -> tuple[int, str, float]:
            answer = requests.post(f"{server.url}/generate", json=body, timeout=120)
            return answer.status_code, answer.text, time.monotonic() - began

        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(ask, (cluster.prefill, cluster.decode)))
        print(answers)
        for status, text, seconds in answers:
            assert status != 200
            assert "is taken" in text
            assert "n > 1" in text
            assert seconds < DEADLINE_S / 3
        payload["sampling_params"]["n"] = 1
        assert cluster.generate(payload).status_code == 200
