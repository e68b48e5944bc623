"""PD through real servers equals one server that does both, token for token, bit for bit."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from testbed.pd_cluster import START_TIMEOUT_S, Cluster, launch_pd, transfer_metrics
from testbed.servers import Launch, dtype_flags, free_port, launch_servers
from tests.support.compare import logprob_differences
from tests.support.proxy import Proxy
from tests.support.scheduler import Result

pytestmark = pytest.mark.long

NEW_TOKENS = 8
MEMORY_GB = 0.2
# SGLang against itself in other batches: see tests/serving/test_control.py.
LOGPROB_BUDGET = 0.3
FLOAT64_BUDGET = 1e-4  # logprobs come back in float32
# The deadline is not what is tested, and two servers on a busy machine may need more.
PATIENT = ["--kv-quant-transfer-deadline-s", "300"]
VARIANTS = {
    "bf16": (["--kv-quant", "bf16"], True),
    "hack4": (["--kv-quant", "hack4"], False),
    "hack2": (["--kv-quant", "hack2"], True),
    "hack2-quantized": (["--kv-quant", "hack2", "--kv-quant-prefill", "quantized"], False),
}


def make_prompts(text_ids: list[int]) -> list[list[int]]:
    """Lengths around the page, a long one, and families with a shared prefix."""
    prompts = [text_ids[n : n + n] for n in (1, 63, 64, 65, 2000)]
    for tail in (1, 64, 100):
        prompts.append(text_ids[:320] + text_ids[3000 + tail : 3000 + 2 * tail])
    return [*prompts, prompts[2], prompts[4]]  # the last two are known in whole


def ask(cluster: Cluster, prompt: list[int]) -> Result:
    answer = cluster.generate(generate_payload(prompt), timeout_s=600)
    assert answer.status_code == 200, answer.text
    return read_answer(answer.json())


def generate_payload(prompt: list[int]) -> dict[str, Any]:
    return {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 2,
    }


def read_answer(answer: dict[str, Any]) -> Result:
    meta = answer["meta_info"]
    tokens = meta["output_token_logprobs"]
    return Result(
        output_ids=[token for _, token, _ in tokens],
        input_logprobs=None,
        output_logprobs=[logprob for logprob, _, _ in tokens],
        top=[[(pair[0], pair[1]) for pair in pairs] for pairs in meta["output_top_logprobs"]],
        cached_tokens=meta["cached_tokens"],
        finish_reason=meta["finish_reason"]["type"],
    )


def assert_nothing_is_held(cluster: Cluster, decode_caches: bool) -> None:
    """No open page on either side; no page at all where nothing is cached."""

    def held() -> tuple[float, float, float]:
        texts = [
            requests.get(f"{server.url}/metrics", timeout=30).text
            for server in (cluster.prefill, cluster.decode)
        ]
        open_pages = [sum(gauge(text, "open_pages")) for text in texts]
        closed = 0.0 if decode_caches else sum(gauge(texts[1], "closed_pages"))
        return open_pages[0], open_pages[1], closed

    deadline = time.monotonic() + 45  # SGLang sets gauges every 30 s while it is idle
    while any(held()):
        assert time.monotonic() < deadline, held()
        time.sleep(1)


def gauge(text: str, name: str) -> list[float]:
    values = re.findall(rf"^sgl_kvq:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)
    assert values, f"no gauge {name}"
    return [float(value) for value in values]


def options(flags: list[str]) -> dict[str, Any]:
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags[::2]]
    return dict(zip(names, flags[1::2], strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_pd_equals_one_server(
    variant: str,
    model_path: str,
    text_ids: list[int],
    tmp_path: Path,
    start_scheduler: Callable[..., Any],
) -> None:
    flags, with_radix = VARIANTS[variant]
    flags = [*flags, *dtype_flags()]
    prompts = make_prompts(text_ids)
    crowd = [text_ids[100 * i : 100 * i + 40 + 23 * i] for i in range(16)]
    common = ["--chunked-prefill-size", "512", "--max-running-requests", "4", "--random-seed", "0"]
    common += ["--kv-quant-memory-gb", str(MEMORY_GB), "--enable-metrics", *PATIENT, *flags]
    decode_flags = ["--disaggregation-decode-enable-radix-cache"] if with_radix else []
    with launch_pd(
        model_path, common, tmp_path, decode_flags=decode_flags, start_timeout_s=START_TIMEOUT_S
    ) as cluster:
        answers = [ask(cluster, prompt) for prompt in prompts]
        before = transfer_metrics(cluster.prefill)
        known = ask(cluster, prompts[4])
        after = transfer_metrics(cluster.prefill)
        with ThreadPoolExecutor(16) as pool:
            crowd_answers = list(pool.map(lambda prompt: ask(cluster, prompt), crowd))
        total = transfer_metrics(cluster.decode)
        assert_nothing_is_held(cluster, with_radix)
    scheduler = start_scheduler(
        model_path,
        chunked_prefill_size=512,
        max_running_requests=4,
        kv_quant_memory_gb=MEMORY_GB,
        **options(flags),
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        (expected,) = scheduler.generate([prompt], NEW_TOKENS)
        assert answer.output_ids == expected.output_ids, len(prompt)
        assert answer.output_logprobs == expected.output_logprobs, len(prompt)
    assert known.output_ids == answers[-1].output_ids
    # The batches of a crowd differ from run to run, and with them last bits, which codes amplify.
    assert all(len(answer.output_ids) == NEW_TOKENS for answer in crowd_answers)
    if variant == "bf16":
        expected_crowd = scheduler.generate(crowd, NEW_TOKENS)
        difference = logprob_differences(crowd_answers, expected_crowd, LOGPROB_BUDGET)
        assert difference.max() < LOGPROB_BUDGET

    page_tokens = "sgl_kvq:transfer_closed_page_tokens_total"
    sent = after[page_tokens] - before[page_tokens]
    assert sent == (0 if with_radix else len(prompts[4]) // 64 * 64)
    pool_bytes = scheduler.pool.plan.bytes_per_token
    wire = after["sgl_kvq:transfer_wire_bytes_total:pages"]
    wire += after["sgl_kvq:transfer_wire_bytes_total:header"]
    assert wire / after[page_tokens] <= 1.01 * pool_bytes
    assert total["sgl_kvq:transfer_transfers_total:success"] == len(prompts) + 1 + len(crowd)
    assert not total.get("sgl_kvq:transfer_checksum_failures_total")


@pytest.fixture
def in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers run their model in float64, by a plugin of SGLang that only they find."""
    folder = tmp_path / "plugin"
    dist_info = folder / "double_weights-1.dist-info"
    dist_info.mkdir(parents=True)
    (folder / "double_weights.py").write_text(DOUBLE_WEIGHTS)
    (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: double_weights\nVersion: 1\n")
    (dist_info / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\ndouble_weights = double_weights:register\n"
    )
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


DOUBLE_WEIGHTS = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def register():
    def load_model(original, runner, *args, **kwargs):
        result = original(runner, *args, **kwargs)
        runner.model.double()
        return result

    target = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
    HookRegistry.register(target, load_model, HookType.AROUND)
"""


@pytest.mark.usefixtures("cpu", "in_float64")
@pytest.mark.parametrize(("kv_format", "with_radix"), [("hack4", False), ("hack2", True)])
def test_sixteen_at_once_equal_one_server(
    kv_format: str,
    with_radix: bool,
    tiny_model_path: str,
    text_ids: list[int],
    tmp_path: Path,
    start_scheduler: Callable[..., Any],
) -> None:
    """In float64 batches of any composition give the same codes: see test_invariance."""
    crowd = [text_ids[100 * i : 100 * i + 40 + 23 * i] for i in range(16)]
    crowd[8:12] = [text_ids[:256] + prompt for prompt in crowd[8:12]]  # with a shared prefix
    flags = ["--kv-quant", kv_format, "--kv-quant-prefill", "quantized", "--dtype", "float32"]
    common = ["--chunked-prefill-size", "256", "--max-running-requests", "4", "--random-seed", "0"]
    common += ["--kv-quant-memory-gb", "0.02", "--enable-metrics", *PATIENT, *flags]
    decode_flags = ["--disaggregation-decode-enable-radix-cache"] if with_radix else []
    with (
        launch_pd(
            tiny_model_path,
            common,
            tmp_path,
            decode_flags=decode_flags,
            start_timeout_s=START_TIMEOUT_S,
        ) as cluster,
        ThreadPoolExecutor(16) as pool,
    ):
        answers = list(pool.map(lambda prompt: ask(cluster, prompt), crowd))
        assert_nothing_is_held(cluster, with_radix)
    scheduler = start_scheduler(
        tiny_model_path,
        chunked_prefill_size=256,
        max_running_requests=4,
        kv_quant_memory_gb=0.02,
        **options(flags),
    )
    scheduler.scheduler.tp_worker.model_runner.model.double()
    expected = [scheduler.generate([prompt], NEW_TOKENS)[0] for prompt in crowd]
    assert [answer.output_ids for answer in answers] == [result.output_ids for result in expected]
    assert logprob_differences(answers, expected, FLOAT64_BUDGET).max() < FLOAT64_BUDGET


def test_kill_and_restart_of_either_instance(
    tiny_model_path: str, text_ids: list[int], tmp_path: Path
) -> None:
    """kill -9 in the middle of a transfer: an error within the deadline, then all is well."""
    deadline_s, port, bootstrap_port = 4.0, free_port(), free_port()
    proxy = Proxy(port)
    common = ["--kv-quant", "bf16", "--kv-quant-memory-gb", "0.02", "--max-running-requests", "4"]
    common += ["--kv-quant-transfer-deadline-s", str(deadline_s), "--kv-quant-transfer-block-kb"]
    common += ["64", "--disaggregation-transfer-backend", "kvq-zmq", "--random-seed", "0"]
    common += ["--disaggregation-bootstrap-port", str(bootstrap_port)]
    prefill = [*common, "--disaggregation-mode", "prefill", "--kv-quant-transfer-port", str(port)]
    prefill += ["--kv-quant-transfer-advertise", f"127.0.0.1:{proxy.port}"]
    decode = [*common, "--disaggregation-mode", "decode"]
    prompt = text_ids[:2000]

    def interrupted(cluster: Cluster, victim: Any) -> None:
        """Stall a transfer half-way, kill one instance, wait for the other's answer."""
        proxy.damage_once(lambda data: (proxy.stalled.set(), data)[1])
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(lambda: ask_both(cluster, prompt))
            assert proxy.stalled.wait(30)
            os.killpg(victim.process.pid, signal.SIGKILL)
            began = time.monotonic()
            survivor = 1 if victim is cluster.prefill else 0
            status, text = answer.result()[survivor]
            assert time.monotonic() - began < 3 * deadline_s
            assert status == 500, text
            assert "instance" in text
        proxy.cut()
        proxy.stalled.clear()

    with launch_servers(
        tiny_model_path,
        [Launch(prefill, tmp_path / "prefill.log"), Launch(decode, tmp_path / "decode.log")],
        START_TIMEOUT_S,
    ) as (first_prefill, first_decode):
        cluster = Cluster(first_prefill, first_decode, bootstrap_port)
        expected = ask(cluster, prompt).output_ids
        interrupted(cluster, first_decode)
        with launch_servers(
            tiny_model_path, [Launch(decode, tmp_path / "decode2.log")], START_TIMEOUT_S
        ) as (again,):
            cluster = Cluster(first_prefill, again, bootstrap_port)
            assert ask(cluster, prompt).output_ids == expected
            interrupted(cluster, first_prefill)
            with launch_servers(
                tiny_model_path, [Launch(prefill, tmp_path / "prefill2.log")], START_TIMEOUT_S
            ) as (new,):
                assert ask(Cluster(new, again, bootstrap_port), prompt).output_ids == expected
    proxy.close()


def ask_both(cluster: Cluster, prompt: list[int]) -> list[tuple[int, str]]:
    """Status and text of both instances; 0 for one that hung up."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": cluster.bootstrap_port,
        "bootstrap_room": int.from_bytes(os.urandom(7), "little"),
    }

    def post(server: Any) -> tuple[int, str]:
        try:
            answer = requests.post(f"{server.url}/generate", json=body, timeout=60)
        except requests.RequestException as error:
            return 0, str(error)
        return answer.status_code, answer.text

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(post, (cluster.prefill, cluster.decode)))
