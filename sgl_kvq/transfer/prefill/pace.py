"""How fast one decode rank takes blocks, and so how much may be on the way to it."""

from __future__ import annotations

from sgl_kvq.transfer.options import TransferConfig

START_BYTES = 64 * 2**10
DELAYS_A_DEADLINE = 12
"""What is on the way takes at most this part of a deadline: messages behind it are heard."""
PIECES_A_WINDOW = 8
"""Blocks and messages, which arrive as a whole."""


class Pace:
    """Window of bytes in flight that follows acknowledgements, as congestion windows of TCP do.

    It starts small and grows by what is acknowledged (doubling each round trip) while that takes
    less than the longest wanted delay. When it takes longer, bytes queue in front of the link: the
    window shrinks to what arrived within that delay.

    Args:
        config: Largest window, largest block and deadline.
        now: Present time, in seconds.
    """

    def __init__(self, config: TransferConfig, now: float) -> None:
        self._largest, self._block_bytes = config.window_bytes, config.block_bytes
        self._delay_s = config.deadline_s / DELAYS_A_DEADLINE
        self.window_bytes = min(START_BYTES, self._largest)
        self._began = now
        self._acked_bytes = 0

    @property
    def block_bytes(self) -> int:
        """Size of blocks, so that several fit into the window."""
        return min(self._block_bytes, max(self.window_bytes // PIECES_A_WINDOW, 4096))

    @property
    def message_bytes(self) -> int:
        """Size up to which blocks share a message."""
        return max(1, self.window_bytes // PIECES_A_WINDOW)

    def on_ack(self, wire_bytes: int, sent_at: float, now: float) -> None:
        """Adapt to an acknowledged block.

        Args:
            wire_bytes: Its payload.
            sent_at: When it was sent, in seconds.
            now: Present time, in seconds.
        """
        self._acked_bytes += wire_bytes
        if now - sent_at <= self._delay_s:
            self.window_bytes = min(self.window_bytes + wire_bytes, self._largest)
        if now - self._began >= self._delay_s:
            if now - sent_at > self._delay_s:
                arrived = self._acked_bytes * self._delay_s / (now - self._began)
                self.window_bytes = max(1, min(self.window_bytes, int(arrived)))
            self._began, self._acked_bytes = now, 0
