"""KV of weights that were updated on one side of a PD pair is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sgl_kvq.host.disagg.weights import MAX_NAME, ServedWeights
from sgl_kvq.transfer.decode.connections import ConnectionState
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.prefill.server import PrefillThread
from sgl_kvq.transfer.protocol.prompt import describe_prompt
from sgl_kvq.transfer.runtime.rank import Rank
from sgl_kvq.transfer.runtime.request_state import RequestState
from tests.support.transfer_pair import wait_for

TOKEN_IDS = range(64)


def update(scheduler: Any, version: str | None = None, path: str | None = None) -> None:
    """Have a scheduler load weights, as it does when `/update_weights_from_disk` is called."""
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    model_path = path or scheduler.server_args.model_path
    request = UpdateWeightFromDiskReqInput(
        model_path=model_path, load_format="auto", weight_version=version
    )
    result = scheduler.weight_updater.update_weights_from_disk(request)
    assert result.success is (path is None), result.message


def ask(manager: Any, prefill: PrefillThread, room: int) -> str:
    """Why a prefill rank with weights of version "default" refuses a request; "" if it does not."""
    from sgl_kvq.host.disagg.endpoints import KvqReceiver
    from sgl_kvq.host.names import KVPoll

    endpoint, reasons, requested = f"tcp://127.0.0.1:{prefill.port}", [], []
    prefill._on_requested = lambda room, request: requested.append(room)
    prefill.open_room(room, RequestState(reasons.append), describe_prompt(TOKEN_IDS, "default"))
    request = KvqReceiver(manager, "127.0.0.1:9", room)
    request.set_prompt(TOKEN_IDS)
    request.endpoints, request.required_dst_info_num = [endpoint], 1
    manager.thread.announce([endpoint], room, request.nonce, request.request_state)
    wait_for(lambda: manager.thread.connection_state(endpoint)[0] is ConnectionState.READY)
    request.send_metadata(np.array([3]), 0)
    wait_for(lambda: bool(reasons or requested))
    if reasons:
        wait_for(lambda: request.poll() == KVPoll.Failed)
        assert manager.failure_records[room] == f"prefill instance gave up: {reasons[0]}"
    request.clear()
    return "".join(reasons)


def test_an_update_without_a_name_is_another_version() -> None:
    weights = ServedWeights("default")
    assert str(weights) == "default"
    weights.begin_update()
    assert str(weights) == "default + 1 updates"
    weights.begin_update()
    weights.name("v2")
    assert str(weights) == "v2"
    weights.name("v" * 10_000)
    assert len(str(weights)) == MAX_NAME


def test_weights_of_a_scheduler_that_were_updated_are_compared(
    tiny_model_path: str, start_scheduler: Callable[..., Any]
) -> None:
    """A decode instance asks a prefill rank that has the weights of the start."""
    scheduler = start_scheduler(
        tiny_model_path,
        kv_quant="hack2",
        kv_quant_memory_gb=0.02,
        disaggregation_mode="decode",
        disaggregation_transfer_backend="kvq-zmq",
    ).scheduler
    manager = scheduler.kvq_manager
    thread = manager.thread
    prefill = PrefillThread(
        Rank(TransferConfig(deadline_s=6.0), manager.access, thread.fingerprint, 1)
    )
    prefill.start()
    try:
        assert ask(manager, prefill, 1) == ""
        update(scheduler)
        reason = ask(manager, prefill, 2)
        assert "prefill serves version 'default', decode 'default + 1 updates'" in reason
        update(scheduler, "v2")
        assert "decode 'v2'" in ask(manager, prefill, 3)
        update(scheduler, "default")
        assert ask(manager, prefill, 4) == ""
        update(scheduler, "v3", path="/nowhere")  # a failed update may have changed some
        assert "decode 'default + 1 updates'" in ask(manager, prefill, 5)
    finally:
        prefill.stop()
        thread.stop()
