"""A link with delay between two network namespaces: two tun devices and a process between them.

For kernels without netem. Packets of real TCP connections pass at the link's speed, wait for the
delay, and are dropped when the queue is full, as on a wire with a router before it. Needs root.
"""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import select
import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN_WITHOUT_HEADER = 0x0001 | 0x1000
MTU_BYTES = 9000
QUEUE_S = 0.4
"""Longest wait for the link; a packet that would wait longer is dropped."""


def enter_namespace(path: str) -> None:
    """Move this thread into a network namespace.

    Raises:
        OSError: not allowed, or no such namespace.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(file, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {path}")
    finally:
        os.close(file)


def _open_tun(name: str) -> int:
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN_WITHOUT_HEADER))
    return file


class _Direction:
    """Packets on their way from one device to the other."""

    def __init__(self, source: int, sink: int, bytes_per_s: float, delay_s: float) -> None:
        self.source, self._sink = source, sink
        self._bytes_per_s, self._delay_s = bytes_per_s, delay_s
        self._free_at = 0.0
        self._on_the_way: deque[tuple[float, bytes]] = deque()

    def take(self) -> None:
        """Read what has come; drop it if too much waits."""
        with suppress(BlockingIOError):
            while packet := os.read(self.source, 65536):
                now = time.monotonic()
                if self._free_at - now > QUEUE_S:
                    continue
                self._free_at = max(now, self._free_at) + len(packet) / self._bytes_per_s
                self._on_the_way.append((self._free_at + self._delay_s, packet))

    def deliver(self) -> float:
        """Hand on what is due; return when the next packet is."""
        while self._on_the_way and self._on_the_way[0][0] <= time.monotonic():
            with suppress(OSError):
                os.write(self._sink, self._on_the_way.popleft()[1])
        return self._on_the_way[0][0] if self._on_the_way else time.monotonic() + 1.0


def _forward(ends: tuple[int, int], bytes_per_s: float, delay_s: float) -> None:
    directions = [
        _Direction(source, sink, bytes_per_s, delay_s) for source, sink in (ends, ends[::-1])
    ]
    while True:
        due = min(direction.deliver() for direction in directions)
        select.select(ends, (), (), max(0.0, due - time.monotonic()))
        for direction in directions:
            direction.take()


@contextmanager
def tun_link(
    names: tuple[str, str], namespace: str, mbit_s: float, delay_ms: float
) -> Iterator[None]:
    """Join this network namespace and another one; addresses are up to the caller.

    Args:
        names: Of the devices: in the other namespace, in this one.
        namespace: Of `ip netns`.
        mbit_s: Speed in each direction.
        delay_ms: Of every packet, in each direction.

    Raises:
        OSError: not root, or no /dev/net/tun.
    """
    here = f"/proc/{os.getpid()}/ns/net"
    home = os.open(here, os.O_RDONLY)
    try:
        enter_namespace(f"/var/run/netns/{namespace}")
        try:
            there_end = _open_tun(names[0])
        finally:
            ctypes.CDLL(None).setns(home, CLONE_NEWNET)
    finally:
        os.close(home)
    ends = (there_end, _open_tun(names[1]))
    process = multiprocessing.get_context("fork").Process(
        target=_forward, args=(ends, mbit_s * 1e6 / 8, delay_ms / 1e3), daemon=True
    )
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()
        for end in ends:
            os.close(end)
