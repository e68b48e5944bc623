"""States of the blocks of one part: what follows what, and what is held in each state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgl_kvq.memory_pool.page_io.span import Bytes
from sgl_kvq.transfer.blocks import metadata_block
from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.prefill.buffers import SendBuffers
from sgl_kvq.transfer.prefill.pace import Pace
from sgl_kvq.transfer.prefill.rooms import (
    BlockState,
    OutgoingPart,
    OutgoingTransfer,
    Peer,
    next_seqno,
)
from sgl_kvq.transfer.protocol.messages import Request

NUM_BLOCKS, WIRE_BYTES = 5, 100
SEQS = st.lists(st.integers(0, NUM_BLOCKS + 1), max_size=4)
STEPS = st.one_of(
    st.just(("read", [])),
    st.tuples(st.sampled_from(["send", "requeue"]), SEQS),
    st.tuples(st.sampled_from(["acknowledge", "retransmit", "resume"]), SEQS),
)


def make_part(made: list[Bytes]) -> tuple[OutgoingPart, SendBuffers]:
    """A part of five queued blocks; buffers that are made are appended to `made`."""

    def make(nbytes: int) -> Bytes:
        made.append(np.empty(nbytes, dtype=np.uint8))
        return made[-1]

    transfer = OutgoingTransfer(1, now=0.0)
    transfer.add_blocks([metadata_block(b"")] * NUM_BLOCKS, True)
    buffers = SendBuffers(make)
    request = Request(1, 2, 0, 0, 0, 1, 1, 0, 0, "", [])
    peer = Peer(b"peer", 1, Pace(TransferConfig(), now=0.0), last_heard=0.0)
    return OutgoingPart(transfer, peer, request, buffers), buffers


@settings(deadline=None, max_examples=300)
@example([("read", []), ("send", [0]), ("retransmit", [0, 0])])  # a peer names a block twice
@given(st.lists(STEPS, max_size=40))
def test_what_is_counted_follows_the_states(steps: list[tuple[str, list[int]]]) -> None:
    """Bytes, buffers, queue and tries are those of the states, whatever happens in any order."""
    made: list[Bytes] = []
    sent: dict[int, list[int]] = {}
    on_the_way: set[int] = set()  # what ZeroMQ may hold: sent, and not known to have arrived
    part, buffers = make_part(made)
    for step, seqs in steps:
        before = {seq: part.state_of(seq) for seq in range(NUM_BLOCKS)}
        if step == "read":
            seq = part.next_queued()
            if seq is not None:
                part.transition(seq, BlockState.READING)
        elif step in ("send", "requeue"):
            for seq in dict.fromkeys(seqs):
                if part.state_of(seq) is not BlockState.READING:
                    continue
                if step == "requeue":
                    part.transition(seq, BlockState.QUEUED)
                else:
                    buffer = buffers.take(WIRE_BYTES)
                    assert id(buffer) not in on_the_way
                    on_the_way.add(id(buffer))
                    sent.setdefault(seq, []).append(id(buffer))
                    part.mark_sent(seq, WIRE_BYTES, buffer, now=0.0)
        else:
            now = {"now": 0.0} if step == "acknowledge" else {}
            again = getattr(part, step)(seqs, **now)
            assert all(before[seq] is BlockState.IN_FLIGHT for seq in again or [])
        states = {seq: part.state_of(seq) for seq in range(NUM_BLOCKS)}
        for seq, state in states.items():
            if before[seq] is BlockState.IN_FLIGHT and state is BlockState.ACKED:
                on_the_way -= set(sent[seq]) if len(sent[seq]) == 1 else set()
            assert before[seq] is not BlockState.ACKED or state is BlockState.ACKED
        in_flight = sum(state is BlockState.IN_FLIGHT for state in states.values())
        assert part.peer.bytes_in_flight == in_flight * WIRE_BYTES
        assert part in part.peer.round_robin
        if step == "resume":
            assert in_flight == 0
            held = [seq for seq in seqs if seq < NUM_BLOCKS]
            assert all(states[seq] is BlockState.ACKED for seq in held)
    waiting = [seq for seq in range(NUM_BLOCKS) if part.state_of(seq) is BlockState.QUEUED]
    assert sorted(iter(part.next_queued, None)) == waiting
    part.drop()
    assert part.peer.bytes_in_flight == 0
    assert not part.peer.round_robin
    assert part.next_queued() is None
    free = [id(buffer) for size in buffers._free.values() for buffer in size]
    assert sorted([*free, *on_the_way]) == sorted(map(id, made))


def test_an_acknowledgement_after_the_end_changes_nothing() -> None:
    part, _ = make_part([])
    for state in (BlockState.READING, BlockState.IN_FLIGHT, BlockState.QUEUED):
        if state is BlockState.IN_FLIGHT:
            part.mark_sent(0, WIRE_BYTES, None, now=0.0)
        else:
            part.transition(0, state)
    part.drop()
    assert part.acknowledge([0], now=1.0) == []
    assert part.state_of(0) is None


def test_a_gap_in_the_acknowledgements_is_a_loss() -> None:
    part, _ = make_part([])
    for seq in (0, 1, 2, 3):
        part.transition(seq, BlockState.READING)
        part.mark_sent(seq, WIRE_BYTES, None, now=0.0)
    assert part.acknowledge([0, 2], now=0.0) == [1]
    assert part.state_of(1) is BlockState.QUEUED
    assert part.state_of(3) is BlockState.IN_FLIGHT  # sent later
    assert part.acknowledge([3], now=0.0) == []
    assert part.tries == {1: 1}


@pytest.mark.parametrize("state", [BlockState.IN_FLIGHT, BlockState.QUEUED])
def test_a_step_that_cannot_be_is_refused(state: BlockState) -> None:
    part, _ = make_part([])
    with pytest.raises(ValueError, match="block 0: expected one of"):
        part.transition(0, state)
    part.transition(0, BlockState.ACKED)
    with pytest.raises(ValueError, match="block 0"):
        part.transition(0, BlockState.QUEUED)


def send(part: OutgoingPart, *seqs: int) -> None:
    for seq in seqs:
        assert part.next_queued() == seq
        part.transition(seq, BlockState.READING)
        part.mark_sent(seq, WIRE_BYTES, None, now=0.0)


def test_what_left_on_a_new_connection_is_not_lost() -> None:
    """It left after the Hello and before the peer could say what it has."""
    part, _ = make_part([])
    send(part, 0, 1)
    part.peer.connected = next_seqno()
    send(part, 2)
    part.resume([0])
    assert [part.state_of(seq) for seq in range(3)] == [
        BlockState.ACKED,
        BlockState.QUEUED,
        BlockState.IN_FLIGHT,
    ]
    part.resume([0])  # it asks again on the same connection: that one is lost
    assert part.state_of(2) is BlockState.QUEUED


def test_the_first_of_two_copies_may_arrive() -> None:
    part, _ = make_part([])
    send(part, 0, 1, 2)
    part.retransmit([0, 1])
    assert part.acknowledge([0], now=0.0) == []  # it is queued again
    assert part.state_of(0) is BlockState.ACKED
    send(part, 3, 4, 1)
    # Which of the two copies of 1 arrived is not known, so nothing is known of what left between.
    assert part.acknowledge([1], now=0.0) == []
    assert part.acknowledge([3], now=0.0) == [2]
    part.drop()
    assert part.acknowledge([2, 4], now=0.0) == []  # late
