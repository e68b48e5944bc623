"""SGLang's side of PD transfer on a rank: owns the transfer thread, knows pool and metadata."""

from __future__ import annotations

import ctypes
import os
import secrets
from collections import Counter
from typing import Any

from sgl_kvq.errors import TransferError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.host.disagg.model_identity import model_identity
from sgl_kvq.host.disagg.weights import ServedWeights
from sgl_kvq.host.names import CommonKVManager, KVPoll
from sgl_kvq.host.options import quant_config
from sgl_kvq.host.pool import QuantizedKVPool
from sgl_kvq.host.rank_basis import model_calibration
from sgl_kvq.host.transfer_args import transfer_config
from sgl_kvq.memory_pool.page_io.factory import open_pool
from sgl_kvq.transfer.blocks import heads_of_rank
from sgl_kvq.transfer.decode.client import DecodeThread
from sgl_kvq.transfer.prefill.server import PrefillThread
from sgl_kvq.transfer.protocol.handshake import make_fingerprint, weights_digest
from sgl_kvq.transfer.protocol.messages import Request
from sgl_kvq.transfer.runtime.rank import Rank
from sgl_kvq.transfer.runtime.request_state import RequestState

MAX_RANKS = 4096
_SIZES = ("attn_tp_size", "attn_cp_size", "dp_size", "pp_size")


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
        self.weights = ServedWeights(server_args.weight_version)

    def start(self, pool: QuantizedKVPool, model_config: Any, forward_stream: Any) -> None:
        """Open the transfer thread; `plugin` calls this once the pool is known.

        Args:
            pool: The pool of this rank.
            model_config: SGLang's `ModelConfig`.
            forward_stream: Stream that SGLang runs the model on.

        Raises:
            ConfigError: the address or the keys cannot be used.
        """
        config = quant_config(self.server_args)
        assert config is not None
        self.pool = pool.store
        num_kv_heads = model_config.get_total_num_kv_heads()
        heads = heads_of_rank(num_kv_heads, self.attn_tp_size, self.attn_tp_rank)
        self.access = open_pool(self.pool, heads, forward_stream)
        fingerprint = make_fingerprint(
            config,
            pool.plan.layouts,
            num_kv_heads,
            weights_digest(self.server_args.model_path),
            model_calibration(config, model_config).digest,
            model_identity(model_config, self.server_args),
        )
        rank = Rank(self.config, self.access, fingerprint, secrets.randbits(64))
        if str(pool.device) == "cpu":
            # SGLang's early sending of cached pages waits for a CUDA event.
            os.environ["SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"] = "0"
        if self.disaggregation_mode.value == "prefill":
            self.thread = PrefillThread(
                rank,
                self.attn_tp_rank,
                self._on_requested,
                lambda room: self.update_status(room, KVPoll.Transferring),
                lambda room: self.update_status(room, KVPoll.Success),
            )
            host, port = self.config.advertise
            self.rank_port = port + self.attn_tp_rank if port else self.thread.port
            if host is not None or self.config.host not in ("0.0.0.0", "::"):
                self.local_ip = host or self.config.host
            self._started = True
            self.register_to_bootstrap()
        else:
            self.thread = DecodeThread(
                rank,
                lambda transfer: self.update_status(transfer.room, KVPoll.Success),
                self._on_disconnect,
            )
        self.thread.start()

    def register_to_bootstrap(self) -> None:
        """Tell the bootstrap server where this rank listens, once it does."""
        if self._started:
            super().register_to_bootstrap()

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """Call SGLang's; a prefill instance that does not fit fails its requests, not this rank."""
        try:
            known = bool(super().try_ensure_parallel_info(bootstrap_addr))
        except Exception as error:  # SGLang looks at no field before it uses it
            self.refusals[bootstrap_addr] = describe_answer(bootstrap_addr, error)
            return False
        if known:
            self.refusals.pop(bootstrap_addr, None)
        return known

    def _resolve_rank_mapping(self, info: Any) -> None:
        """Call SGLang's, which divides by these numbers and makes lists as long.

        Raises:
            TransferError: a number is out of range.
        """
        for name in _SIZES:
            size = getattr(info, name)
            if not 1 <= size <= MAX_RANKS:
                raise TransferError(f"expected {name} of 1 to {MAX_RANKS}, got {size}")
        super()._resolve_rank_mapping(info)

    def _on_requested(self, room: int, request: Request) -> None:
        self.req_to_decode_prefix_len[room] = request.prefix_pages * PAGE_SIZE
        self.update_status(room, KVPoll.WaitingForInput)

    def _on_disconnect(self, endpoint: str) -> None:
        """The prefill instance may come back elsewhere: ask its bootstrap server again."""
        with self.connection_lock:
            for key, infos in list(self.connection_pool.items()):
                if endpoint in endpoints_of(infos):
                    del self.connection_pool[key]

    def forget_bootstrap(self, bootstrap_addr: str) -> None:
        """Ask a bootstrap server again at the next request."""
        with self.connection_lock:
            for key in list(self.connection_pool):
                if key.startswith(f"{bootstrap_addr}_"):
                    del self.connection_pool[key]

    def make_request_state(self, room: int) -> RequestState:
        """State of a request; a failure shows up in its next poll."""

        def fail(reason: str) -> None:
            self.record_failure(room, reason)
            self.update_status(room, KVPoll.Failed)

        return RequestState(fail)

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


def describe_answer(bootstrap_addr: str, error: Exception) -> str:
    """One line on a bootstrap server's answer that cannot be used."""
    reason = str(error) if isinstance(error, TransferError) else repr(error)
    return f"bootstrap server {bootstrap_addr}: cannot use its answer ({' '.join(reason.split())})"


def endpoints_of(bootstrap_infos: list[dict[str, Any]]) -> list[str]:
    """tcp:// addresses of prefill ranks.

    Args:
        bootstrap_infos: What the bootstrap server told about each.

    Raises:
        TransferError: two ranks have the same address.
    """
    endpoints = [_endpoint_of(info) for info in bootstrap_infos]
    for endpoint, count in Counter(endpoints).items():
        if count > 1:
            raise TransferError(
                f"expected one address for each prefill rank, but the bootstrap server names "
                f"{endpoint} for {count} of them"
            )
    return endpoints


def _endpoint_of(bootstrap_info: dict[str, Any]) -> str:
    host, port = bootstrap_info.get("rank_ip"), bootstrap_info.get("rank_port")
    if not isinstance(host, str) or not isinstance(port, int) or not 0 < port < 2**16:
        raise TransferError(f"expected rank_ip and a rank_port up to 65535, got {host} and {port}")
    return f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
