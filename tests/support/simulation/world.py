"""Virtual time: a queue of events, one source of randomness, and the trace."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

START_S = 1000.0


class Violation(AssertionError):
    """A promise of the transfer was broken."""


class World:
    """Runs events in order of their time; those of one time in order of their making.

    Args:
        seed: Of everything that is drawn.
        tracing: Whether to note what happens.
    """

    def __init__(self, seed: int, tracing: bool = False) -> None:
        self.rng = random.Random(seed)
        self.now = START_S
        self.tracing = tracing
        self.lines: list[str] = []
        self.violation = ""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay_s, action)

    def run(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Run until a condition holds after an event; False if it did not within the limit."""
        end = self.now + limit_s
        self.check()
        while not until():
            if not self._events or self._events[0][0] > end:
                self.now = end
                return False
            self.now, _, action = heapq.heappop(self._events)
            action()
            self.check()
        return True

    def check(self) -> None:
        """Raise what was noted by `violate`."""
        if self.violation:
            raise Violation(self.violation)

    def violate(self, text: str) -> None:
        """End the run after this event: what runs now may catch an exception."""
        self.violation = self.violation or text
        self.trace("violation", text)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def between(self, low: float, high: float) -> float:
        """A number whose logarithm is uniform."""
        return low * (high / low) ** self.rng.random()

    def trace(self, who: str, what: str) -> None:
        """Note an event; callers ask `tracing` first where the text is costly."""
        if self.tracing:
            self.lines.append(f"{self.now - START_S:10.4f}  {who:9s} {what}")
