"""A decode rank's connection to one prefill rank (the data; `decode_link` moves it)."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

import zmq

from sgl_kvq.transfer.blocks import HeadRange
from sgl_kvq.transfer.decode.assembly import InPart, Landing
from sgl_kvq.transfer.runtime.request_state import RequestState


class LinkState(Enum):
    """Of a connection: nothing heard yet, handshake passed, handshake refused."""

    CONNECTING = "connecting"
    READY = "ready"
    REFUSED = "refused"


@dataclass(eq=False)
class Link:
    """A connection to one prefill rank.

    Args:
        endpoint: tcp:// address.
        identity: Routing id; kept over reconnects, so that the prefill rank knows who it is.
        waiting: Nonce and ticket of rooms that have no pages yet.
        parts: Rooms whose blocks arrive here.
        landings: Blocks that are verified and written, in order of arrival.
        finished: Nonce of rooms that ended well, in case the last message is lost.
    """

    endpoint: str
    identity: bytes
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    state: LinkState = LinkState.CONNECTING
    reason: str = ""
    instance: int | None = None
    heads: HeadRange = field(default_factory=lambda: HeadRange(0, 0))
    said_hello: float = 0.0
    broken: bool = False
    opened: float = field(default_factory=time.monotonic)
    last_heard: float = field(default_factory=time.monotonic)
    waiting: dict[int, tuple[int, RequestState, float]] = field(default_factory=dict)
    parts: dict[int, InPart] = field(default_factory=dict)
    landings: deque[Landing] = field(default_factory=deque)
    finished: dict[int, int] = field(default_factory=dict)

    @property
    def in_use(self) -> bool:
        """Whether a room depends on it."""
        return bool(self.waiting or self.parts)
