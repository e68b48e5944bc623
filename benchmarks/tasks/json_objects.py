"""JSON that must parse: an object by a schema that stands before a text of about 2,000 tokens."""

from __future__ import annotations

import json
import random
from functools import partial
from typing import Any

import jsonschema

from benchmarks.tasks.cases import FENCE_END, JSON_FENCE, Case, Grade
from sgl_kvq.fidelity.text import measured_topics

TASK = "json"
COUNT = 100
TEXT_CHARS = 8000
MAX_TOKENS = 640
KEYS = {
    "string": "title summary author language version category audience status license difficulty",
    "integer": "word_count year num_examples num_sections reading_minutes rank",
    "number": "score confidence ratio price",
    "boolean": "is_deprecated has_examples is_builtin needs_review",
    "array": "keywords related_topics functions exceptions warnings",
}
OBJECTS = ("source", "review", "publisher", "origin", "usage", "summary_of_examples")
NUM_KEYS, NUM_OBJECTS, NUM_INNER_KEYS = 8, 2, 3
QUESTION = """You are given a JSON schema and a text. The schema:

{schema}

The text:

{text}

Describe the text by one JSON object that follows the schema. It has every key of the schema and no
other; where the text does not say a value, make one up. Strings are one sentence at most, arrays
have two or three elements. Answer with the object alone.
"""


def cases() -> list[Case]:
    """Return `COUNT` cases, each with a schema and a text of its own."""
    text = "\n\n".join(measured_topics().values())
    made = []
    for index in range(COUNT):
        schema = make_schema(random.Random(index))
        begin = index * (len(text) - TEXT_CHARS) // COUNT
        question = QUESTION.format(
            schema=json.dumps(schema, indent=2), text=text[begin : begin + TEXT_CHARS].strip()
        )
        made.append(
            Case(
                task=TASK,
                name=f"schema {index}",
                group=f"schema {index}",
                text="",
                question=question,
                answer_begin=JSON_FENCE,
                stop=FENCE_END,
                max_tokens=MAX_TOKENS,
                grade=partial(grade, schema),
            )
        )
    return made


def make_schema(drawn: random.Random) -> dict[str, Any]:
    """Return a JSON schema of keys drawn at random, with objects in the object."""
    known = [(name, kind) for kind, names in KEYS.items() for name in names.split()]
    properties = {name: _typed(kind) for name, kind in drawn.sample(known, NUM_KEYS)}
    for name in drawn.sample(OBJECTS, NUM_OBJECTS):
        inner = drawn.sample(known, NUM_INNER_KEYS)
        properties[name] = _object({key: _typed(kind) for key, kind in inner})
    return _object(dict(drawn.sample(list(properties.items()), len(properties))))


def _typed(kind: str) -> dict[str, Any]:
    return {"type": kind} | ({"items": {"type": "string"}} if kind == "array" else {})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    rules = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **rules}


def grade(schema: dict[str, Any], answer: str) -> Grade:
    """Say whether the answer is JSON, with the keys and types of the schema."""
    try:
        jsonschema.validate(json.loads(answer), schema)
    except (json.JSONDecodeError, jsonschema.ValidationError, RecursionError):
        return Grade(False)
    return Grade(True)
