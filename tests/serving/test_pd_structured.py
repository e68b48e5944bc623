"""Structured output through PD equals one server: schemas, expressions, grammars, and bad ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from testbed.pd_cluster import START_TIMEOUT_S, launch_pd
from testbed.servers import dtype_flags, launch_server

pytestmark = pytest.mark.long

FLAGS = [
    *("--kv-quant", "hack2", "--kv-quant-prefill", "quantized", "--kv-quant-memory-gb", "0.2"),
    *("--max-running-requests", "4", "--chunked-prefill-size", "256", "--random-seed", "0"),
    "--constrained-json-disable-any-whitespace",  # else a small model indents without an end
    *("--kv-quant-transfer-deadline-s", "300"),  # a busy machine is not what is tested
]
REQUEST_TIMEOUT_S = 300.0
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,11}$"},
        "population": {"type": "integer", "minimum": 1, "maximum": 99_999_999},
    },
    "required": ["name", "population"],
    "additionalProperties": False,
}
PLACE = r"(Paris|Rome) is the capital of [A-Z][a-z]{2,12}\."
GREETING = 'root ::= "Hello" | "Hi" | "Hey"'
PROMPTS = [
    "Here is the information of the capital of France in the JSON format.\n",
    "word " * 150 + "\nGive the capital of Italy as JSON:\n",
    "x " * 63,
]


def make_requests() -> list[dict[str, Any]]:
    """Constrained and free text in turn, constraints that no grammar has, and text after them."""
    constraints: list[dict[str, Any]] = [
        {"json_schema": json.dumps(SCHEMA)},
        {"regex": PLACE},
        {"ebnf": GREETING},
        {},
    ]
    asked = [(prompt, constraint) for prompt in PROMPTS for constraint in constraints]
    asked += [("bad", {"json_schema": "INVALID"}), ("bad", {"regex": "(unclosed["}), ("after", {})]
    return [
        {
            "text": text,
            "sampling_params": {"temperature": 0, "max_new_tokens": 40, **constraint},
            "return_logprob": True,
        }
        for text, constraint in asked
    ]


def ask_all(ask: Callable[[dict[str, Any]], requests.Response]) -> list[tuple[int, Any]]:
    """Status and what a client sees of each answer, one request at a time."""
    return [read_answer(ask(request)) for request in make_requests()]


def read_answer(answer: requests.Response) -> tuple[int, Any]:
    body = answer.json()
    if answer.status_code != 200:
        return answer.status_code, body
    meta = body["meta_info"]
    return 200, (body["text"], meta["output_token_logprobs"], meta["finish_reason"])


def test_pd_structured_output_equals_one_server(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # llguidance's mask is torch.compiled: a C++ compiler runs before the first constrained token.
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    flags = [*FLAGS, *dtype_flags()]
    with launch_pd(model_path, flags, tmp_path) as cluster:
        answers = ask_all(lambda request: cluster.generate(request, timeout_s=REQUEST_TIMEOUT_S))
    log = tmp_path / "one.log"
    with launch_server(model_path, flags, log, timeout_s=START_TIMEOUT_S) as server:
        expected = ask_all(
            lambda request: requests.post(
                f"{server.url}/generate", json=request, timeout=REQUEST_TIMEOUT_S
            )
        )
    assert answers == expected
    statuses = [status for status, _ in answers]
    assert statuses == [200] * 12 + [400, 400, 200]
    for case in range(0, 12, 4):
        schema, expression, grammar = (answers[case + i][1][0] for i in range(3))
        place = json.loads(schema)
        assert set(place) == set(SCHEMA["required"])
        assert re.fullmatch(SCHEMA["properties"]["name"]["pattern"], place["name"])
        assert 1 <= place["population"] <= 99_999_999
        assert re.fullmatch(PLACE, expression)
        assert grammar in ("Hello", "Hi", "Hey")
