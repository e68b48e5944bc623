"""From graded answers to rows: pairs, the file of answers, a run that goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from benchmarks.common.records import read_csv
from benchmarks.tasks import __main__ as driver
from benchmarks.tasks.answers import AnswerFile, Source
from benchmarks.tasks.cases import Case, Grade
from benchmarks.tasks.client import ask_all
from benchmarks.tasks.paired import Pair, compare, sign_test
from benchmarks.tasks.prompts import Prompt
from testbed.servers import ServerError


def pairs(both: int, lost: int, won: int, neither: int) -> list[Pair]:
    grades = [(True, True)] * both + [(False, True)] * lost + [(True, False)] * won
    grades += [(False, False)] * neither
    return [Pair(str(index), *grade) for index, grade in enumerate(grades)]


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 2), (2, 9), (14, 14), (40, 3)])
def test_independent_pairs_are_mcnemars_exact_test(lost: int, won: int) -> None:
    found = compare(pairs(50, lost, won, 30))
    assert (found.lost, found.won, found.n) == (lost, won, 80 + lost + won)
    assert (found.passed, found.bf16_passed) == (50 + won, 50 + lost)
    expected = binomtest(won, lost + won).pvalue if lost + won else 1.0
    assert found.p == pytest.approx(expected)
    # Wald's interval of a difference of paired shares, of a table with half a pair more a cell.
    n, lost_more, won_more = found.n + 2, lost + 0.5, won + 0.5
    difference = (won_more - lost_more) / n
    error = ((lost_more + won_more) / n - difference**2) ** 0.5 / n**0.5
    assert (found.low + found.high) / 2 == pytest.approx(difference)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=1e-4)


def test_pairs_of_a_group_count_as_one() -> None:
    """Three wordings of each problem that all say the same tell no more than one."""
    one = pairs(50, 9, 1, 30)
    three = compare(one * 3)
    alone = compare(one)
    assert three.n == 3 * alone.n
    assert (three.low, three.high, three.p) == pytest.approx((alone.low, alone.high, alone.p))


def test_the_sign_test_of_groups_of_several_sizes() -> None:
    """3 + 1 of either sign: -4, -2, 2, 4, each one time in four."""
    assert sign_test([3, 1]) == 0.5
    assert sign_test([3, -1]) == 1.0
    assert sign_test([3, 1, 0]) == 0.5
    assert sign_test([]) == 1.0


def case(name: str, group: str = "", right: str = "yes") -> Case:
    return Case("task", name, group or name, "?", "", (), 4, lambda text: Grade(text == right))


def prompt(name: str, digest: str = "0") -> Prompt:
    return Prompt(case(name), [len(name)], digest)


SOURCE = Source("model", "hack4", "", "cpu")


def test_answers_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    kept = AnswerFile(path)
    kept.add(SOURCE, prompt("a"), Grade(True), answer="one\ntwo\u2028three")
    kept.add(SOURCE, prompt("b"), Grade(False, 0.5), answer="")
    for answers in (kept, AnswerFile(path)):
        assert answers.grade(SOURCE, prompt("a")) == Grade(True)
        assert answers.grade(SOURCE, prompt("b")) == Grade(False, 0.5)
        assert answers.grade(SOURCE, prompt("c")) is None
        assert answers.grade(SOURCE, prompt("a", "1")) is None  # the prompt has changed
        for other in ("model2", "kvq2"):
            source = Source(*(other if x == "hack4" else x for x in vars(SOURCE).values()))
            assert answers.grade(source, prompt("a")) is None


def test_a_line_that_is_no_answer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path).add(SOURCE, prompt("a"), Grade(True), answer="")
    with path.open("a") as file:
        file.write('{"model": "mod')
    before = path.read_text()
    with pytest.raises(ValueError, match=r"line 2: expected an answer, .*; delete the line"):
        AnswerFile(path)
    assert path.read_text() == before


class FakeServer(BaseHTTPRequestHandler):
    """Answers `/generate` by the length of the prompt: "yes" below 10 tokens, 100 not at once."""

    protocol_version = "HTTP/1.1"
    running = 0
    most_running = 0
    lock = threading.Lock()
    released: threading.Event

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/generate"
        assert body["sampling_params"]["temperature"] == 0
        cls = type(self)
        with cls.lock:
            cls.running += 1
            cls.most_running = max(cls.most_running, cls.running)
        time.sleep(0.1)
        with cls.lock:
            cls.running -= 1
        length = len(body["input_ids"])
        if length == 100:
            cls.released.wait()
        reason = "abort" if length == 400 else "stop"
        meta = {"completion_tokens": 1, "cached_tokens": 0, "finish_reason": {"type": reason}}
        reply = json.dumps({"text": "yes" if length < 10 else "no", "meta_info": meta}).encode()
        self.send_response(500 if length == 500 else 200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    FakeServer.running = FakeServer.most_running = 0
    FakeServer.released = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    FakeServer.released.set()
    server.shutdown()
    thread.join()


def sized(lengths: Sequence[int]) -> list[Prompt]:
    return [Prompt(case(f"{i}"), [0] * length, "0") for i, length in enumerate(lengths)]


def test_all_are_asked_and_graded(url: str) -> None:
    found: dict[str, tuple[bool, str]] = {}
    ask_all(
        url,
        sized([3] * 20 + [11] * 5),
        4,
        30.0,
        lambda prompt, grade, reply: found.update(
            {prompt.case.name: (grade.passed, reply["text"])}
        ),
    )
    assert found == {str(i): (True, "yes") if i < 20 else (False, "no") for i in range(25)}
    assert 1 < FakeServer.most_running <= 4


def test_what_is_answered_in_time_is_kept(url: str) -> None:
    found: list[str] = []
    ask_all(url, sized([100, 3, 3]), 2, 5.0, lambda p, *_: found.append(p.case.name))
    assert sorted(found) == ["1", "2"]


def test_a_refused_request_is_named(url: str) -> None:
    with pytest.raises(ServerError, match=r"task, 1: .*500"):
        ask_all(url, sized([3, 500, 3]), 1, 30.0, lambda *_: None)


def test_an_aborted_answer_is_not_graded(url: str) -> None:
    """A server that has no room for a request has not answered wrongly."""
    found: list[str] = []
    with pytest.raises(ServerError, match=r"task, 1: .*abort"):
        ask_all(url, sized([3, 400]), 1, 30.0, lambda p, *_: found.append(p.case.name))
    assert found == ["0"]


class Served:
    """Takes the place of servers: which systems were started, and what they answer."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        self.flags: dict[str, Sequence[str]] = {}
        self.right: dict[str, bool] = {}
        self.stops_after = 10_000

    @contextmanager
    def launch(self, _model: Path, flags: Sequence[str], log: Path, *_: Any) -> Iterator[Any]:
        name = log.stem.removeprefix("server-")
        self.flags[name] = flags
        yield type("Server", (), {"url": name, "start_s": 0.0})

    def ask(self, url: str, prompts: Sequence[Prompt], *rest: Any) -> None:
        on_answer = rest[-1]
        self.asked[url] = len(prompts)
        meta = {"completion_tokens": 1, "cached_tokens": 0, "finish_reason": {"type": "stop"}}
        for prompt in prompts[: self.stops_after]:
            on_answer(prompt, Grade(self.right[url], 0.5), {"text": "answer", "meta_info": meta})


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    served = Served()
    served.right = {"bf16": True, "bf16#2": True, "hack4": False, "kvq2": True}
    monkeypatch.setattr(driver, "launch_server", served.launch)
    monkeypatch.setattr(driver, "ask_all", served.ask)
    return served


def run(served: Served, model: str, out: Path, *more: str) -> int:
    served.asked.clear()
    argv = ["--model", model, "--out", str(out), "--tasks", "humaneval", "json", "--limit", "5"]
    return driver.main([*argv, *more])


def test_a_second_run_goes_on_with_what_is_missing(
    served: Served, tiny_model_path: str, tmp_path: Path
) -> None:
    out = tmp_path / "tasks.csv"
    served.stops_after = 7
    assert run(served, tiny_model_path, out, "--systems", "hack4") == 1
    assert served.asked == {"bf16": 10, "hack4": 10}
    assert [row["task"] for row in read_csv(out)] == [
        "humaneval",
        "humaneval",
    ]  # json has two answers
    served.stops_after = 10_000
    assert run(served, tiny_model_path, out, "--systems", "hack4") == 0
    assert served.asked == {"bf16": 3, "hack4": 3}
    assert run(served, tiny_model_path, out, "--systems", "hack4") == 0
    assert served.asked == {}
    rows = {(row["system"], row["task"]): row for row in read_csv(out)}
    assert len(rows) == 4
    row = rows["hack4", "humaneval"]
    assert [row[name] for name in ("n", "passed", "bf16_passed", "lost", "won")] == list("50550")
    assert out.with_suffix(".png").exists()


def test_rows_need_no_answers_but_new_systems_need_bf16s(
    served: Served, tiny_model_path: str, tmp_path: Path
) -> None:
    out = tmp_path / "tasks.csv"
    run(served, tiny_model_path, out, "--systems", "hack4")
    out.with_suffix(".jsonl").unlink()  # as in a fresh clone
    run(served, tiny_model_path, out, "--systems", "hack4")
    assert served.asked == {}
    run(served, tiny_model_path, out, "--systems", "hack4", "bf16#2")
    assert served.asked == {"bf16": 10, "bf16#2": 10}
    assert served.flags["bf16#2"] == served.flags["bf16"]


def test_a_system_may_have_flags_of_its_own(
    served: Served, tiny_model_path: str, tmp_path: Path
) -> None:
    out, system = tmp_path / "tasks.csv", "kvq2#2 --kv-quant-prefill quantized"
    served.right["kvq2#2-kv-quant-prefill-quantized"] = True
    run(served, tiny_model_path, out, "--systems", "kvq2", system)
    plain, own = served.flags["kvq2"], served.flags["kvq2#2-kv-quant-prefill-quantized"]
    assert own == [*plain, "--kv-quant-prefill", "quantized"]
    assert {row["system"] for row in read_csv(out)} == {"bf16", "kvq2", system}


def test_with_and_without_a_file_are_two_measurements(
    served: Served, tiny_model_path: str, tmp_path: Path
) -> None:
    out = tmp_path / "tasks.csv"
    run(served, tiny_model_path, out, "--systems", "kvq2")
    assert "--kv-quant-config" not in served.flags["kvq2"]
    run(served, tiny_model_path, out, "--systems", "kvq2", "--calibration", "bases.safetensors")
    assert served.asked == {"kvq2": 10}
    assert "--kv-quant-config" in served.flags["kvq2"]
    assert {row["calibration"] for row in read_csv(out)} == {"", "bases.safetensors"}


def test_a_server_that_does_not_start_ends_only_its_system(
    served: Served, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def launch(model: Path, flags: Sequence[str], log: Path, *rest: Any) -> Iterator[Any]:
        if "hack4" in log.name:
            raise ServerError("did not start")
        with served.launch(model, flags, log, *rest) as server:
            yield server

    monkeypatch.setattr(driver, "launch_server", launch)
    out = tmp_path / "tasks.csv"
    assert run(served, tiny_model_path, out, "--systems", "hack4", "kvq2", "--at-once", "2") == 1
    assert {row["system"] for row in read_csv(out)} == {"bf16", "kvq2"}
