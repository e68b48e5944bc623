"""What SGLang's bootstrap server may answer, and what becomes of the request that asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

from sgl_kvq.transfer.options import TransferConfig
from tests.support.transfer_pair import DecodeSide, stopped

TOPOLOGY = {
    "attn_tp_size": 2,
    "attn_cp_size": 1,
    "dp_size": 1,
    "pp_size": 1,
    "page_size": 64,
    "kv_cache_dtype": "auto",
    "follow_bootstrap_room": True,
}
RANKS = [{"rank_ip": "127.0.0.1", "rank_port": 9000 + rank} for rank in range(2)]


class Bootstrap:
    """An HTTP server that answers as SGLang's bootstrap server does, with what it was told."""

    def __init__(self) -> None:
        self.topology: Any = dict(TOPOLOGY)
        self.ranks: list[Any] = [dict(rank) for rank in RANKS]
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                rank = int(parse_qs(urlparse(self.path).query)["target_tp_rank"][0])
                body = json.dumps(outer.topology if rank == -1 else outer.ranks[rank]).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def bootstrap() -> Iterator[Bootstrap]:
    bootstrap = Bootstrap()
    yield bootstrap
    bootstrap.server.shutdown()
    bootstrap.server.server_close()


@pytest.fixture(scope="session")
def decode_args() -> Any:
    """Options of a PD decode instance; SGLang's placeholder of a model needs no files."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt import runtime_context, server_args

    args = server_args.ServerArgs(
        model_path="dummy",
        device="cpu",
        kv_quant="hack2",
        disaggregation_mode="decode",
        disaggregation_transfer_backend="kvq-zmq",
    )
    runtime_context.publish(args, role="scheduler")
    return args


@pytest.fixture
def manager(decode_args: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's manager with our thread, of the only rank of a decode instance."""
    from sglang.srt.disaggregation.utils import DisaggregationMode
    from sglang.srt.layers import dp_attention
    from sglang.srt.runtime_context import get_parallel

    from sgl_kvq.host.disagg.manager import KvqManager

    for name, value in (("_ATTN_DP_SIZE", 1), ("_ATTN_DP_RANK", 0)):
        monkeypatch.setattr(dp_attention, name, value, raising=False)
    args = SimpleNamespace(
        kv_cache_dtype_str="auto",
        kv_layout=None,
        kv_item_lens=[1],
        state_item_lens=[],
        system_dp_rank=0,
        pp_rank=0,
        engine_rank=0,
        page_size=64,
    )
    ranks = {"attn_tp_size": 1, "attn_cp_size": 1, "attn_dp_size": 1}
    ranks |= {"attn_tp_rank": 0, "attn_cp_rank": 0, "attn_dp_rank": 0, "dcp_rank": 0}
    decode = DecodeSide(TransferConfig(deadline_s=6.0))
    with get_parallel().override(**ranks), stopped(decode):
        made = KvqManager(args, DisaggregationMode.DECODE, decode_args)
        made.pool, made.access, made.thread = decode.pool, decode.thread.access, decode.thread
        yield made


def receiver(manager: Any, bootstrap: Bootstrap, room: int) -> Any:
    """A request as SGLang's decode queue makes it, up to its first poll."""
    from sgl_kvq.host.disagg.endpoints import KvqReceiver

    made = KvqReceiver(manager, bootstrap.address, room)
    if manager.try_ensure_parallel_info(bootstrap.address):
        made.init(0)
    return made


def failure(request: Any) -> str:
    """Why a request failed; SGLang calls this once its poll says Failed."""
    from sgl_kvq.host.names import KVPoll, KVTransferError

    assert request.poll() == KVPoll.Failed
    with pytest.raises(KVTransferError) as error:
        request.failure_exception()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_two_ranks_with_one_address_are_refused(manager: Any, bootstrap: Bootstrap) -> None:
    bootstrap.ranks[1] = bootstrap.ranks[0]
    reason = failure(receiver(manager, bootstrap, 1))
    assert "one address for each prefill rank" in reason
    assert "tcp://127.0.0.1:9000 for 2" in reason
    # Asked again, the server answers right: no wrong answer is kept.
    bootstrap.ranks[1] = RANKS[1]
    request = receiver(manager, bootstrap, 2)
    assert request.endpoints == ["tcp://127.0.0.1:9000", "tcp://127.0.0.1:9001"]
    request.abort()
    assert "aborted" in failure(request)


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ({"attn_tp_size": 0}, "expected attn_tp_size of 1 to 4096, got 0"),
        ({"attn_tp_size": -2}, "got -2"),
        ({"attn_tp_size": 10**9}, "got 1000000000"),
        ({"dp_size": 0}, "expected dp_size"),
        ({"pp_size": 3, "attn_cp_size": 0}, "expected attn_cp_size"),
        ({"page_size": 16}, "Page size mismatch"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(
    manager: Any, bootstrap: Bootstrap, topology: dict[str, int], words: str
) -> None:
    bootstrap.topology |= topology
    request = receiver(manager, bootstrap, 1)
    assert not manager.prefill_info_table
    request.abort()  # as SGLang does after some attempts
    assert words in failure(request)


@pytest.mark.parametrize(
    "rank",
    [{}, {"rank_port": 9000}, {"rank_ip": "127.0.0.1", "rank_port": 70000}, ["127.0.0.1"], None, 7],
)
def test_an_answer_without_an_address_fails_its_request_only(
    manager: Any, bootstrap: Bootstrap, rank: Any
) -> None:
    bootstrap.ranks[1] = rank
    assert failure(receiver(manager, bootstrap, 1))
    assert not manager.connection_pool
    bootstrap.ranks[1] = RANKS[1]
    assert len(receiver(manager, bootstrap, 2).endpoints) == 2


def test_a_reused_room_fails_the_second_request_only(manager: Any, bootstrap: Bootstrap) -> None:
    import numpy as np

    from sgl_kvq.host.names import KVPoll

    first = receiver(manager, bootstrap, 5)
    first.send_metadata(np.arange(2), 0, decode_prefix_len=0)
    assert first.poll() == KVPoll.Transferring
    second = receiver(manager, bootstrap, 5)
    assert second.poll() == KVPoll.Failed  # any other state ends SGLang's scheduler here
    second.abort()
    assert "bootstrap_room 5 is taken" in failure(second)
    assert first.poll() == KVPoll.Transferring
    assert manager.addr_to_rooms_tracker[bootstrap.address] == {5}
    first.abort()
    assert "aborted" in failure(first)
    third = receiver(manager, bootstrap, 5)
    assert not third.room_is_taken
    assert third.poll() == KVPoll.Bootstrapping
