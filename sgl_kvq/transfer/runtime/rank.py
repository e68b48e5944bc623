"""What a rank is, for its transfer thread."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sgl_kvq.memory_pool.page_io.base import PoolAccess
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.protocol.handshake import digest
from sgl_kvq.transfer.protocol.messages import Fingerprint


@dataclass(frozen=True, eq=False)
class Rank:
    """One rank of a prefill or decode instance.

    Args:
        config: The options.
        access: Its pool.
        fingerprint: Values that the other side must have as well.
        instance: Drawn by this process, uint64.
    """

    config: TransferConfig
    access: PoolAccess
    fingerprint: Fingerprint
    instance: int

    @cached_property
    def digest(self) -> int:
        """uint64 of the fingerprint."""
        return digest(self.fingerprint)
