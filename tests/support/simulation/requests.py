"""The requests of an instance, as its scheduler sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sgl_kvq.memory_pool.page_io.span import PageIds
from sgl_kvq.transfer.decode.assembly import IncomingTransfer
from sgl_kvq.transfer.protocol.prompt import Prompt, describe_prompt
from sgl_kvq.transfer.runtime.request_state import RequestState
from tests.support.simulation.pools import Content
from tests.support.simulation.scenario import RoomPlan

OPEN, REQUESTED, SUCCESS, FAILED = "open", "requested", "success", "failed"


@dataclass(eq=False)
class SideOfRoom:
    """One side of a request, over all ranks of its instance.

    Args:
        plan: The request.
        side: "prefill" or "decode".
        num_ranks: Ranks of the instance.
        content: Its KV.
        now: When it arrived.

    Attributes:
        status: Of each rank.
        over_at: When the scheduler was done with it.
        result: "success" or "failed", once it is over.
        begun_at: When its pages were allocated.
        pages: Those behind the prefix on the decode side, all on the prefill side.
    """

    plan: RoomPlan
    side: str
    num_ranks: int
    content: Content
    now: float
    status: list[str] = field(default_factory=list)
    states: list[RequestState] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    nonces: list[int] = field(default_factory=list)
    endpoints: list[list[str]] = field(default_factory=list)
    transfers: list[IncomingTransfer] = field(default_factory=list)
    pages: PageIds = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    prefix_pages: int = 0
    begun_at: float | None = None
    over_at: float | None = None
    result: str = ""

    def __post_init__(self) -> None:
        self.status = [OPEN] * self.num_ranks

    @property
    def prompt(self) -> Prompt:
        fault = self.plan.fault if self.side == "decode" else ""
        ids = [self.plan.key, self.plan.num_tokens, int(fault == "prompt")]
        return describe_prompt(ids, "new" if fault == "weights" else "old")

    def add_state(self, on_change: Callable[[], None]) -> RequestState:
        """State of the next rank."""
        rank = len(self.states)

        def fail(reason: str) -> None:
            self.status[rank] = FAILED
            self.reasons.append(reason)
            on_change()

        self.states.append(RequestState(fail))
        return self.states[-1]

    @property
    def failed(self) -> bool:
        return FAILED in self.status

    @property
    def succeeded(self) -> bool:
        return all(status == SUCCESS for status in self.status)
