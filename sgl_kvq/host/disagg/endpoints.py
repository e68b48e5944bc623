"""SGLang's side of one request's transfer: sender, receiver; and the bootstrap server."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sgl_kvq.errors import TransferError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.host.disagg.manager import KvqManager, describe_answer, endpoints_of
from sgl_kvq.host.names import (
    CommonKVBootstrapServer,
    CommonKVReceiver,
    CommonKVSender,
    KVPoll,
    KVTransferError,
)
from sgl_kvq.host.versions.supported import install_advice
from sgl_kvq.transfer.blocks import Block, cut_pages, cut_rows, metadata_block
from sgl_kvq.transfer.decode.assembly import IncomingTransfer
from sgl_kvq.transfer.decode.connections import ConnectionState
from sgl_kvq.transfer.protocol.header import BlockKind
from sgl_kvq.transfer.protocol.prompt import describe_prompt
from sgl_kvq.transfer.runtime.request_state import RequestState


class _Poller:
    """Base of sender and receiver: SGLang polls them for the status and the failure.

    The manager's tables have one entry a room. A second request with the room of one that is not
    over has failed from the start and touches none of them.

    Attributes:
        room_is_taken: Whether this is such a second request.
    """

    kv_mgr: KvqManager
    bootstrap_room: int
    conclude_state: Any
    request_state: RequestState
    room_is_taken: bool

    def poll(self) -> Any:
        """SGLang's `KVPoll` of this request."""
        if self.conclude_state is None:
            if not self.kv_mgr.thread.is_alive():
                self.request_state.fail("the transfer thread has ended")
            status = self.kv_mgr.request_status.get(self.bootstrap_room, KVPoll.Failed)
            if status not in (KVPoll.Success, KVPoll.Failed):
                return status
            self.conclude_state = status
        return self.conclude_state

    def failure_exception(self) -> None:
        """Raise why the transfer failed."""
        self.conclude_state = KVPoll.Failed
        if self.room_is_taken:
            raise KVTransferError(
                self.bootstrap_room,
                taken_room(self.bootstrap_room),
            )
        with self.kv_mgr.failure_lock:
            reason = self.kv_mgr.failure_records.pop(self.bootstrap_room, None)
        self.clear()
        raise KVTransferError(
            self.bootstrap_room,
            reason or "failed on another rank",
            is_from_another_rank=reason is None,
        )

    def clear(self) -> None:
        """Forget the request."""
        raise NotImplementedError


class KvqSender(_Poller, CommonKVSender):
    """Sends one request's pages; SGLang calls `send` after each chunk of its prefill."""

    def __init__(
        self,
        mgr: KvqManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        **options: Any,
    ) -> None:
        self.room_is_taken = bootstrap_room in mgr.request_status
        super().__init__(mgr, bootstrap_addr, bootstrap_room, **options)
        self.request_state = mgr.make_request_state(bootstrap_room)
        self.num_tokens = 0
        if self.room_is_taken:
            self.conclude_state = KVPoll.Failed
            mgr.thread.refuse_room(bootstrap_room, taken_room(bootstrap_room))

    def set_prompt(self, token_ids: Sequence[int]) -> None:
        """Open the room; the decode instance's request must be for the same tokens and weights."""
        if not self.room_is_taken:
            prompt = describe_prompt(token_ids, str(self.kv_mgr.weights))
            self.kv_mgr.thread.open_room(self.bootstrap_room, self.request_state, prompt)

    def pop_decode_prefix_len(self) -> int:
        """Tokens the decode instance has already, a multiple of the page size."""
        self.num_tokens = int(super().pop_decode_prefix_len())
        return self.num_tokens

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:
        """Note how many pages there will be, and where the first token's record lies."""
        super().init(num_kv_indices, aux_index)
        self.kv_mgr.thread.expect_pages(self.bootstrap_room, num_kv_indices)

    def send(
        self,
        kv_indices: npt.NDArray[np.int32],
        state_indices: list[Any] | None = None,
        num_kv_tokens: int | None = None,
        indices_event: Any = None,
    ) -> None:
        """Hand over the pages of a chunk; the transfer thread reads them from the pool.

        Args:
            kv_indices: [n] pages in order of position.
            state_indices: Unused: our pools have no other state.
            num_kv_tokens: Tokens in these pages; only the last one may be partly filled.
            indices_event: None: SGLang gives it to senders that ask for indices on their way to
                the host.

        Raises:
            TransferError: SGLang did not say how many tokens, or the indices are not there yet.
        """
        if num_kv_tokens is None or indices_event is not None:
            raise TransferError(
                "send: expected num_kv_tokens and no indices_event, "
                f"got {num_kv_tokens} and {indices_event}; {install_advice()}"
            )
        pages, _, is_last, should_skip = self._prepare_send_indices(kv_indices, state_indices)
        if should_skip:
            return
        self._record_transfer_indices(pages, state_indices)
        blocks = self._cut(pages, num_kv_tokens)
        if is_last:
            blocks.append(metadata_block(self.kv_mgr.read_metadata(self.aux_index)))
        self.kv_mgr.thread.add_blocks(self.bootstrap_room, blocks, is_last)

    def _cut(self, page_indices: npt.NDArray[np.int32], num_new_tokens: int) -> list[Block]:
        """Cut a chunk into blocks; nothing here waits for a GPU or copies to one.

        SGLang calls `send` once the results of the batch that wrote the pages are on the host. Only
        cached pages are sent earlier, and then it sets an event.
        """
        manager = self.kv_mgr
        plan = manager.pool.plan
        ready = self.__dict__.pop("_early_send_wait_event", None)
        row_bytes = manager.access.row_bytes(manager.access.heads)
        sizes = {"block_bytes": manager.thread.block_bytes(self.bootstrap_room), "ready": ready}
        first_page = self.num_tokens // PAGE_SIZE
        self.num_tokens += num_new_tokens
        pages = np.asarray(page_indices, dtype=np.int64)
        num_rows = self.num_tokens % PAGE_SIZE
        closed = pages[:-1] if num_rows and len(pages) else pages
        blocks: list[Block] = []
        if first_page == 0 and len(closed) and plan.sink_tokens:
            rows = (plan.sink_tokens, plan.num_layers, row_bytes)
            blocks += cut_rows(BlockKind.SINK_ROWS, pages[:1], *rows, **sizes)
        page_bytes = [layout.page_bytes for layout in plan.layouts]
        blocks += cut_pages(first_page, closed, page_bytes, **sizes)
        if num_rows and len(pages):
            rows = (num_rows, plan.num_layers, row_bytes)
            blocks += cut_rows(BlockKind.OPEN_ROWS, pages[-1:], *rows, **sizes)
        return blocks

    def abort(self) -> None:
        """Give up and tell the decode instance; SGLang frees the pages right after."""
        if self.room_is_taken:
            return
        reason = "the request was aborted at the prefill instance"
        self.request_state.fail(reason)
        self.conclude_state = KVPoll.Failed
        self.kv_mgr.thread.close_room(self.bootstrap_room, self.request_state, reason)

    def clear(self) -> None:
        """Forget the request; a decode instance that still waits is told."""
        if self.room_is_taken:
            return
        self.request_state.forget()
        self.kv_mgr.thread.close_room(
            self.bootstrap_room, self.request_state, "the prefill instance dropped the request"
        )
        CommonKVSender.clear(self)


class KvqReceiver(_Poller, CommonKVReceiver):
    """Receives one request's pages into slots that SGLang has allocated."""

    def __init__(
        self, mgr: KvqManager, bootstrap_addr: str, bootstrap_room: int | None = None
    ) -> None:
        self.room_is_taken = bootstrap_room in mgr.request_status
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        self.request_state = mgr.make_request_state(self.bootstrap_room)
        self.nonce = secrets.randbits(64)
        self.prompt = describe_prompt(())
        self.endpoints: list[str] = []
        self.has_pages = False
        if self.room_is_taken:
            self.conclude_state = KVPoll.Failed

    def set_prompt(self, token_ids: Sequence[int]) -> None:
        """Note tokens and weights of the KV to come, for the prefill instance to compare."""
        self.prompt = describe_prompt(token_ids, str(self.kv_mgr.weights))

    def init(self, prefill_dp_rank: int) -> None:
        """Find the prefill ranks and connect to them; a wrong answer fails this request only."""
        if self.room_is_taken:
            return
        try:
            super().init(prefill_dp_rank)
            if self.conclude_state == KVPoll.Failed:
                return
            self.endpoints = endpoints_of(self.bootstrap_infos)
        except Exception as error:  # SGLang looks at no field before it uses it
            self.kv_mgr.forget_bootstrap(self.bootstrap_addr)
            self.request_state.fail(describe_answer(self.bootstrap_addr, error))
            return
        self.kv_mgr.thread.announce(
            self.endpoints, self.bootstrap_room, self.nonce, self.request_state
        )

    def _register_kv_args(self) -> bool:
        """Tell SGLang that nothing is left to register: our handshake does that."""
        return True

    def poll(self) -> Any:
        """SGLang's `KVPoll`; a request waits until all its prefill ranks passed the handshake."""
        status = super().poll()
        if status != KVPoll.WaitingForInput or self.has_pages:
            return status
        for endpoint in self.endpoints:
            state, reason = self.kv_mgr.thread.connection_state(endpoint)
            if state is ConnectionState.REFUSED:
                self.request_state.fail(reason)
                return super().poll()
            if state is ConnectionState.CONNECTING:
                return KVPoll.Bootstrapping
        return status

    def send_metadata(
        self,
        kv_indices: npt.NDArray[np.int32],
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        decode_prefix_len: int | None = None,
        destination: str = "device",
        device_kv_indices: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Ask for the pages.

        Args:
            kv_indices: [n] pages for what is not here, in order of position.
            aux_index: Row of the metadata buffers.
            state_indices: Unused.
            decode_prefix_len: Tokens that are here, a multiple of the page size.
            destination: Where the pages are to go.
            device_kv_indices: Unused: names pages on the device for transfers to the host.

        Raises:
            TransferError: the pages are to go to host memory.
        """
        if destination != "device":
            raise TransferError(f"send_metadata: expected destination device, got {destination}")
        self.has_pages = True
        manager = self.kv_mgr
        transfer = IncomingTransfer(
            self.bootstrap_room,
            self.nonce,
            self.request_state,
            (decode_prefix_len or 0) // PAGE_SIZE,
            np.asarray(kv_indices, dtype=np.int64),
            manager.access.fence(),
            self.prompt,
            lambda data: manager.write_metadata(aux_index or 0, data),
        )
        self.request_state.advance(
            lambda: manager.update_status(self.bootstrap_room, KVPoll.Transferring)
        )
        manager.thread.start_transfer(transfer, self.endpoints, self.required_dst_info_num)

    def abort(self) -> None:
        """Give up and tell the prefill instance; SGLang frees the pages right after."""
        if self.room_is_taken:
            return
        reason = self.kv_mgr.refusals.get(
            self.bootstrap_addr, "the request was aborted at the decode instance"
        )
        self.request_state.fail(reason)
        self.conclude_state = KVPoll.Failed
        self._close(reason)

    def clear(self) -> None:
        """Forget the request."""
        if self.room_is_taken:
            return
        self.request_state.forget()
        self._close("the decode instance dropped the request")
        self.kv_mgr.addr_to_rooms_tracker[self.bootstrap_addr].discard(self.bootstrap_room)
        CommonKVReceiver.clear(self)

    def _close(self, reason: str) -> None:
        self.kv_mgr.thread.close_room(
            self.endpoints, self.bootstrap_room, self.nonce, self.request_state, reason
        )


def taken_room(room: int) -> str:
    """Why a second request with a room fails."""
    return (
        f"bootstrap_room {room} is taken by a request that is not over; rooms must be unique "
        f"(SGLang gives all samples of a request with n > 1 one room: PD serves n = 1)"
    )


class KvqBootstrapServer(CommonKVBootstrapServer):
    """SGLang's own: it tells decode instances where the prefill ranks listen."""
