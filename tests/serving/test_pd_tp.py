"""PD between instances of different tensor-parallel sizes, prefill on the first of two GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from testbed.pd_cluster import Cluster
from testbed.servers import Launch, Server, free_port, launch_servers
from tests.serving.test_pd import (
    PATIENT,
    ask,
    assert_nothing_is_held,
    generate_payload,
    read_answer,
)
from tests.serving.test_tp import BUDGET, MEAN_BUDGET, make_shared_model
from tests.support.compare import logprob_differences
from tests.support.scheduler import Result

START_TIMEOUT_S = 300.0
LENGTHS = (1, 63, 64, 65, 450, 2000)

pytestmark = [
    pytest.mark.long,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

Servers = dict[tuple[str, int], tuple[Server, int]]


@pytest.fixture(scope="module", params=["hack4"])
def servers(
    request: pytest.FixtureRequest, model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """A prefill, a decode and an ordinary server of one and of two ranks, with bootstrap ports.

    Instances of one rank sit on the first GPU for prefill, on the second otherwise.
    """
    folder = tmp_path_factory.mktemp("pd-tp")
    make_shared_model(folder / "model", model_path, num_kv_heads=2)
    common = ["--kv-quant", request.param, "--kv-quant-prefill", "quantized", "--random-seed", "0"]
    common += ["--kv-quant-memory-gb", "0.2", "--chunked-prefill-size", "512", "--enable-metrics"]
    common += ["--max-running-requests", "4", "--skip-server-warmup", "--sampling-backend"]
    common += ["pytorch", "--mm-feature-transport", "cpu", *PATIENT]
    names = [(mode, tp) for mode in ("prefill", "decode", "null") for tp in (1, 2)]
    ports = [free_port() for _ in names]
    launches = []
    for (mode, tp), port in zip(names, ports, strict=True):
        flags = [*common, "--tp-size", str(tp)]
        if mode != "null":
            flags += ["--disaggregation-mode", mode, "--disaggregation-bootstrap-port", str(port)]
            flags += ["--disaggregation-transfer-backend", "kvq-zmq"]
        env = {"CUDA_VISIBLE_DEVICES": "0,1" if tp == 2 else "0" if mode == "prefill" else "1"}
        launches.append(Launch(flags, folder / f"{mode}{tp}.log", env=env))
    with launch_servers(folder / "model", launches, START_TIMEOUT_S) as running:
        yield dict(zip(names, zip(running, ports, strict=True), strict=True))


@pytest.fixture(scope="module")
def alone(servers: Servers, text_ids: list[int]) -> Callable[[int], list[Result]]:
    """What one server of so many ranks answers."""

    def answers(tp: int) -> list[Result]:
        server = servers["null", tp][0]
        return [
            read_answer(server.generate(generate_payload(prompt)))
            for prompt in make_prompts(text_ids)
        ]

    known = {tp: answers(tp) for tp in (1, 2)}
    return known.__getitem__


def make_prompts(text_ids: list[int]) -> list[list[int]]:
    return [text_ids[n : n + n] for n in LENGTHS]


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (2, 1), (1, 1), (2, 2)])
def test_pd_equals_one_server(
    prefill: int,
    decode: int,
    servers: Servers,
    alone: Callable[[int], list[Result]],
    text_ids: list[int],
) -> None:
    """Token for token, bit for bit where both instances have as many ranks as the one server.

    With other sizes the prefill instance rounds its ranks' partial sums where the one server has
    none, or the other way round: logprobs are then equal to that rounding, and texts up to ties.
    """
    prefill_server, port = servers["prefill", prefill]
    prefill_server.flush_cache()  # cached prefixes make other batches, and those other last bits
    cluster = Cluster(prefill_server, servers["decode", decode][0], port)
    answers = [ask(cluster, prompt) for prompt in make_prompts(text_ids)]
    expected = alone(decode)
    assert_nothing_is_held(cluster, decode_caches=False)
    if prefill == decode:
        assert [a.output_ids for a in answers] == [e.output_ids for e in expected]
        assert [a.output_logprobs for a in answers] == [e.output_logprobs for e in expected]
    same = sum(a.output_ids == e.output_ids for a, e in zip(answers, expected, strict=True))
    found = logprob_differences(answers, expected, BUDGET)
    print(f"TP {prefill} -> {decode}: mean {found.mean():.4f}, {same} of {len(answers)} the same")
    assert found.max() < BUDGET
    assert found.mean() < MEAN_BUDGET
