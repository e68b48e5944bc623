"""A bare pyzmq loop to compare with: blocks of one size, nothing is done with them.

ROUTER to DEALER over loopback, four frames a block, the payload zero-copy at both ends, small
frames copied (cheaper than sharing them), and the same limits as ours: so many unacknowledged
bytes, no high-water mark, acknowledgements for whatever has arrived, in bulk. The receiver looks
at no byte. The sender walks over as much memory as it is told to: over one block again and again,
which stays in a cache, or over as much as a pool, which does not.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq

HEADER = bytes(80)
MESSAGES_A_ROUND = 64
_MORE, _LAST = int(zmq.SNDMORE), int(zmq.NOBLOCK)


def _receive(pipe: Any) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.ROUTING_ID, b"bare")
        socket.rcvhwm = socket.linger = 0
        socket.connect(pipe.recv())
        socket.send(b"0")
        while True:
            arrived = 0
            while arrived < MESSAGES_A_ROUND and socket.poll(0 if arrived else None):
                if len(socket.recv_multipart(copy=False)) == 1:
                    return
                arrived += 1
            socket.send(str(arrived).encode())


def _send(pipe: Any, window_bytes: int) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.sndhwm = 0
        pipe.send(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
        identity, _ = socket.recv_multipart()
        while (order := pipe.recv()) is not None:
            block_bytes, count, walk_bytes = order
            memory = memoryview(bytearray(max(walk_bytes, block_bytes)))
            starts = range(0, len(memory) - block_bytes + 1, block_bytes)
            payloads = [memory[start : start + block_bytes] for start in starts]
            in_flight = max(1, window_bytes // block_bytes)
            began = time.perf_counter()
            sent = acknowledged = 0
            while acknowledged < count:
                while sent < count and sent - acknowledged < in_flight:
                    for frame in (identity, b"B", HEADER):
                        socket.send(frame, _MORE)
                    socket.send(payloads[sent % len(payloads)], _LAST, copy=False)
                    sent += 1
                acknowledged += int(socket.recv_multipart()[1])
                while acknowledged < sent and socket.poll(0):
                    acknowledged += int(socket.recv_multipart()[1])
            pipe.send(time.perf_counter() - began)
        socket.send_multipart([identity, b"end"])


class BareLoop:
    """Both ends, started."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def transfer(self, block_bytes: int, count: int, walk_bytes: int = 0) -> float:
        """Seconds from the first block to the last acknowledgement.

        Args:
            block_bytes: Size of each block.
            count: Number of blocks.
            walk_bytes: Memory that they are sent from in turns; one block's at least.
        """
        self._sender.send((block_bytes, count, walk_bytes))
        return float(self._sender.recv())


@contextmanager
def bare_loop(window_bytes: int) -> Iterator[BareLoop]:
    """Start both ends and stop them at exit.

    Forked, because a spawned process would import for seconds: call it before this process has
    any ZeroMQ context.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(2)]
    targets = ((_send, (pipes[0][1], window_bytes)), (_receive, (pipes[1][1],)))
    ends = [context.Process(target=target, args=args, daemon=True) for target, args in targets]
    for end in ends:
        end.start()
    sender, receiver = (near for near, _ in pipes)
    try:
        receiver.send(sender.recv())
        yield BareLoop(sender)
    finally:
        sender.send(None)
        for end in ends:
            end.join(10)
            end.kill()
