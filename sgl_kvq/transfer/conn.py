"""SGLang's side of PD transfer: manager, sender, receiver and bootstrap server of `kvq-zmq`."""

from __future__ import annotations

import ctypes
import os
import secrets
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sgl_kvq.config import PAGE_SIZE
from sgl_kvq.errors import TransferError
from sgl_kvq.host import (
    CommonKVBootstrapServer,
    CommonKVManager,
    CommonKVReceiver,
    CommonKVSender,
    KVPoll,
    KVTransferError,
)
from sgl_kvq.memory_pool.quantized_pool import QuantizedKVPool
from sgl_kvq.server_args import quant_config
from sgl_kvq.transfer.blocks import Block, PoolAccess, cut_pages, heads_of_rank
from sgl_kvq.transfer.decode_link import DecodeThread, LinkState
from sgl_kvq.transfer.handshake import make_fingerprint, weights_digest
from sgl_kvq.transfer.inbound import InTransfer
from sgl_kvq.transfer.messages import Request
from sgl_kvq.transfer.options import transfer_config
from sgl_kvq.transfer.prefill_link import PrefillThread
from sgl_kvq.transfer.thread import Ticket
from sgl_kvq.transfer.wire import BlockKind


class KvqManager(CommonKVManager):
    """Owns the transfer thread of a rank; SGLang polls what it writes into `request_status`.

    SGLang registers a prefill rank while it builds the manager, before our socket exists. So
    `register_to_bootstrap` waits until `start`.
    """

    def __init__(
        self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool = False
    ) -> None:
        self._started = False
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        # SGLang's own socket would listen beyond loopback, and nothing reads it.
        self.server_socket.close(linger=0)
        self._zmq_ctx.term()
        self.config = transfer_config(server_args)
        self.thread: Any = None
        self.access: Any = None
        self.refusals: dict[str, str] = {}

    def start(self, pool: QuantizedKVPool, num_kv_heads: int) -> None:
        """Open the transfer thread; `plugin` calls this once the pool is known.

        Args:
            pool: Of this rank.
            num_kv_heads: KV heads of the model, over all ranks.

        Raises:
            ConfigError: the address or the keys cannot be used.
        """
        config = quant_config(self.server_args)
        assert config is not None
        self.pool = pool
        heads = heads_of_rank(num_kv_heads, self.attn_tp_size, self.attn_tp_rank)
        self.access = PoolAccess(pool, heads)
        fingerprint = make_fingerprint(
            config,
            pool.layout,
            pool.plan.num_layers,
            num_kv_heads,
            weights_digest(self.server_args.model_path),
        )
        instance = secrets.randbits(64)
        if str(pool.device) == "cpu":
            # SGLang's early sending of cached pages waits for a CUDA event.
            os.environ["SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"] = "0"
        if self.disaggregation_mode.value == "prefill":
            self.thread = PrefillThread(
                self.config,
                self.access,
                fingerprint,
                instance,
                self.attn_tp_rank,
                self._on_asked,
                lambda room: self.update_status(room, KVPoll.Transferring),
                lambda room: self.update_status(room, KVPoll.Success),
            )
            host, port = self.config.advertise
            self.rank_port = port or self.thread.port
            if host is not None or self.config.host not in ("0.0.0.0", "::"):
                self.local_ip = host or self.config.host
            self._started = True
            self.register_to_bootstrap()
        else:
            self.thread = DecodeThread(
                self.config,
                self.access,
                fingerprint,
                instance,
                lambda transfer: self.update_status(transfer.room, KVPoll.Success),
                self._on_link_down,
            )
        self.thread.start()

    def register_to_bootstrap(self) -> None:
        """Tell the bootstrap server where this rank listens, once it does."""
        if self._started:
            super().register_to_bootstrap()

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """As SGLang's, but a prefill instance that does not fit fails its requests, not us."""
        try:
            return bool(super().try_ensure_parallel_info(bootstrap_addr))
        except (RuntimeError, AssertionError) as error:
            self.refusals[bootstrap_addr] = str(error)
            return False

    def _on_asked(self, room: int, request: Request) -> None:
        self.req_to_decode_prefix_len[room] = request.prefix_pages * PAGE_SIZE
        self.update_status(room, KVPoll.WaitingForInput)

    def _on_link_down(self, endpoint: str) -> None:
        """The prefill instance may come back elsewhere: ask its bootstrap server again."""
        with self.connection_lock:
            for key, infos in list(self.connection_pool.items()):
                if any(endpoint_of(info) == endpoint for info in infos):
                    del self.connection_pool[key]

    def make_ticket(self, room: int) -> Ticket:
        """State of a request; a failure shows up in its next poll."""

        def fail(reason: str) -> None:
            self.record_failure(room, reason)
            self.update_status(room, KVPoll.Failed)

        return Ticket(fail)

    def read_metadata(self, index: int) -> bytes:
        """SGLang's record of a request's first token: one row of each metadata buffer."""
        args = self.kv_args
        return b"".join(
            ctypes.string_at(pointer + index * size, size)
            for pointer, size in zip(args.aux_data_ptrs, args.aux_item_lens, strict=True)
        )

    def write_metadata(self, index: int, data: bytes) -> None:
        """Store what `read_metadata` returned on the other side.

        Raises:
            TransferError: another size than this instance's buffers have.
        """
        args = self.kv_args
        if len(data) != sum(args.aux_item_lens):
            raise TransferError(
                f"first-token record: expected {sum(args.aux_item_lens)} bytes, got {len(data)}; "
                f"run the same SGLang on both instances"
            )
        offset = 0
        for pointer, size in zip(args.aux_data_ptrs, args.aux_item_lens, strict=True):
            ctypes.memmove(pointer + index * size, data[offset : offset + size], size)
            offset += size


def endpoint_of(bootstrap_info: dict[str, Any]) -> str:
    """tcp:// address of a prefill rank."""
    host = str(bootstrap_info["rank_ip"])
    return f"tcp://{f'[{host}]' if ':' in host else host}:{bootstrap_info['rank_port']}"


class _Poller:
    """What sender and receiver share: SGLang polls them and asks why they failed."""

    kv_mgr: KvqManager
    bootstrap_room: int
    conclude_state: Any
    ticket: Ticket

    def poll(self) -> Any:
        """SGLang's `KVPoll` of this request."""
        if self.conclude_state is None:
            if not self.kv_mgr.thread.is_alive():
                self.ticket.fail("the transfer thread has ended")
            status = self.kv_mgr.request_status.get(self.bootstrap_room, KVPoll.Failed)
            if status not in (KVPoll.Success, KVPoll.Failed):
                return status
            self.conclude_state = status
        return self.conclude_state

    def failure_exception(self) -> None:
        """Raise why the transfer failed."""
        self.conclude_state = KVPoll.Failed
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
        dest_tp_ranks: list[int],
        pp_rank: int,
        req_has_disagg_prefill_dp_rank: bool = False,
    ) -> None:
        super().__init__(
            mgr,
            bootstrap_addr,
            bootstrap_room,
            dest_tp_ranks,
            pp_rank,
            req_has_disagg_prefill_dp_rank,
        )
        self.ticket = mgr.make_ticket(bootstrap_room)
        self.num_tokens = 0
        mgr.thread.open_room(bootstrap_room, self.ticket)

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
    ) -> None:
        """Hand over the pages of a chunk; the transfer thread reads them from the pool.

        Args:
            kv_indices: [n] pages in order of position.
            state_indices: Unused: our pools have no other state.
            num_kv_tokens: Tokens in these pages; only the last one may be partly filled.

        Raises:
            TransferError: SGLang did not say how many tokens.
        """
        if num_kv_tokens is None:
            raise TransferError("send: expected num_kv_tokens, got None; install sglang==0.5.17")
        pages, _, is_last, should_skip = self._prepare_send_indices(kv_indices, state_indices)
        if should_skip:
            return
        self._record_transfer_indices(pages, state_indices)
        blocks = self._cut(pages, num_kv_tokens)
        if is_last:
            data = self.kv_mgr.read_metadata(self.aux_index)
            blocks.append(Block(BlockKind.METADATA, data=data))
        self.kv_mgr.thread.add_blocks(self.bootstrap_room, blocks, is_last)

    def _cut(self, page_indices: npt.NDArray[np.int32], num_new_tokens: int) -> list[Block]:
        manager = self.kv_mgr
        pool, access = manager.pool, manager.access
        first_page = self.num_tokens // PAGE_SIZE
        self.num_tokens += num_new_tokens
        pages = torch.as_tensor(page_indices, dtype=torch.int64, device=pool.device)
        num_rows = self.num_tokens % PAGE_SIZE
        closed = pages[:-1] if num_rows and len(pages) else pages
        # SGLang sets this event when the pages are cached ones of a batch that still runs.
        ready = self.__dict__.pop("_early_send_wait_event", None) or access.event()
        blocks: list[Block] = []
        if first_page == 0 and len(closed) and pool.plan.sink_tokens:
            slot = pool.sink_slots.slot_of[pages[:1]]
            rows = pool.plan.sink_tokens
            blocks.append(self._rows(BlockKind.SINK_ROWS, slot, rows, ready))
        blocks += cut_pages(
            first_page,
            closed,
            pool.plan.num_layers,
            pool.layout.page_bytes,
            manager.config.block_bytes,
            ready,
        )
        if num_rows and len(pages):
            slot = pool.open_slots.slot_of[pages[-1:]]
            blocks.append(self._rows(BlockKind.OPEN_ROWS, slot, num_rows, ready))
        return blocks

    def _rows(self, kind: BlockKind, slot: torch.Tensor, num_rows: int, ready: Any) -> Block:
        layers = self.kv_mgr.pool.plan.num_layers
        return Block(kind, num_layers=layers, num_rows=num_rows, slot=slot, ready=ready)

    def abort(self) -> None:
        """Give up and tell the decode instance; SGLang frees the pages right after."""
        reason = "the request was aborted at the prefill instance"
        self.ticket.fail(reason)
        self.conclude_state = KVPoll.Failed
        self.kv_mgr.thread.close_room(self.bootstrap_room, self.ticket, reason)

    def clear(self) -> None:
        """Forget the request; a decode instance that still waits is told."""
        with self.ticket.lock:
            self.ticket.over = True
        self.kv_mgr.thread.close_room(
            self.bootstrap_room, self.ticket, "the prefill instance dropped the request"
        )
        CommonKVSender.clear(self)


class KvqReceiver(_Poller, CommonKVReceiver):
    """Receives one request's pages into slots that SGLang has allocated."""

    def __init__(
        self, mgr: KvqManager, bootstrap_addr: str, bootstrap_room: int | None = None
    ) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        self.ticket = mgr.make_ticket(self.bootstrap_room)
        self.nonce = secrets.randbits(64)
        self.endpoints: list[str] = []
        self.has_pages = False

    def init(self, prefill_dp_rank: int) -> None:
        """Find the prefill ranks and connect to them."""
        super().init(prefill_dp_rank)
        if self.conclude_state == KVPoll.Failed:
            return
        self.endpoints = list(dict.fromkeys(endpoint_of(info) for info in self.bootstrap_infos))
        self.kv_mgr.thread.announce(self.endpoints, self.bootstrap_room, self.nonce, self.ticket)

    def poll(self) -> Any:
        """As the base; a request waits until all its prefill ranks passed the handshake."""
        status = super().poll()
        if status != KVPoll.WaitingForInput or self.has_pages:
            return status
        for endpoint in self.endpoints:
            state, reason = self.kv_mgr.thread.link_state(endpoint)
            if state is LinkState.REFUSED:
                self.ticket.fail(reason)
                return super().poll()
            if state is LinkState.CONNECTING:
                return KVPoll.Bootstrapping
        return status

    def send_metadata(
        self,
        kv_indices: npt.NDArray[np.int32],
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        decode_prefix_len: int | None = None,
    ) -> None:
        """Ask for the pages.

        Args:
            kv_indices: [n] pages for what is not here, in order of position.
            aux_index: Row of the metadata buffers.
            state_indices: Unused.
            decode_prefix_len: Tokens that are here, a multiple of the page size.
        """
        self.has_pages = True
        pool, manager = self.kv_mgr.pool, self.kv_mgr
        prefix_pages = (decode_prefix_len or 0) // PAGE_SIZE
        pages = torch.as_tensor(kv_indices, dtype=torch.int64)
        on_device = pages.to(pool.device)
        none = torch.zeros(1, dtype=torch.int64)
        first = prefix_pages == 0 and len(pages) > 0
        transfer = InTransfer(
            self.bootstrap_room,
            self.nonce,
            self.ticket,
            prefix_pages,
            pages,
            pool.open_slots.held_slot(on_device[-1:]).cpu() if len(pages) else none,
            pool.sink_slots.held_slot(on_device[:1]).cpu() if first else none,
            lambda data: manager.write_metadata(aux_index or 0, data),
        )
        self.ticket.advance(lambda: manager.update_status(self.bootstrap_room, KVPoll.Transferring))
        manager.thread.start_transfer(transfer, self.endpoints, self.required_dst_info_num)

    def abort(self) -> None:
        """Give up and tell the prefill instance; SGLang frees the pages right after."""
        reason = self.kv_mgr.refusals.get(
            self.bootstrap_addr, "the request was aborted at the decode instance"
        )
        self.ticket.fail(reason)
        self.conclude_state = KVPoll.Failed
        self._close(reason)

    def clear(self) -> None:
        """Forget the request."""
        with self.ticket.lock:
            self.ticket.over = True
        self._close("the decode instance dropped the request")
        self.kv_mgr.addr_to_rooms_tracker[self.bootstrap_addr].discard(self.bootstrap_room)
        CommonKVReceiver.clear(self)

    def _close(self, reason: str) -> None:
        self.kv_mgr.thread.close_room(
            self.endpoints, self.bootstrap_room, self.nonce, self.ticket, reason
        )


class KvqBootstrapServer(CommonKVBootstrapServer):
    """SGLang's own: it tells decode instances where the prefill ranks listen."""
