"""Measure an agent's turn: a few fresh tokens behind a cached context, while others decode."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import aiohttp
import numpy as np

from testbed.servers import Server, ServerError

FIRST_WORD, LAST_WORD = 1000, 40_000
"""Random tokens come from here: plain words in every vocabulary that is used."""
ANSWER_TOKENS = 4
"""What a turn writes: enough to measure times between tokens."""
BACKGROUND_ANSWER_TOKENS = 2048
"""What a background request may write; it is aborted long before."""
HEADERS = {"Content-Type": "application/json"}
STALL_S = 120.0
"""A stream without a token for so long has failed."""
GAP_S = 0.03
"""Pause between an answer and the next turn."""


class CaseError(RuntimeError):
    """A case did not measure what was meant, so that it has no result."""


@dataclass(frozen=True)
class Case:
    """What a turn meets.

    Attributes:
        fresh: Tokens of its prompt that the server has to compute.
        cached: Tokens before them that the radix cache holds.
        running: Other requests that decode meanwhile.
    """

    fresh: int
    cached: int
    running: int

    def __str__(self) -> str:
        return f"{self.fresh} fresh, {self.cached} cached, {self.running} running"


@dataclass(frozen=True)
class Times:
    """What a case took.

    Attributes:
        ttft_ms: Milliseconds from sending a turn to its first token, one for each repetition.
        itl_ms: Milliseconds between tokens: of all other requests from the first turn's start to
            the last one's end, or of the turns themselves when nothing else runs.
    """

    ttft_ms: list[float]
    itl_ms: list[float]


class Prompts:
    """Random token sequences of which no two begin with the same token.

    So a prompt finds in the radix cache what is meant, and never a token more.

    Args:
        background_tokens: Context of a background request.
    """

    def __init__(self, background_tokens: int) -> None:
        self._background_tokens = background_tokens
        self._first = count(FIRST_WORD)
        self._random = np.random.default_rng(0)
        self._background: list[list[int]] = []

    def take(self, length: int) -> list[int]:
        """Return a new sequence."""
        if not length:
            return []
        rest = self._random.integers(FIRST_WORD, LAST_WORD, length - 1)
        return [next(self._first), *rest.tolist()]

    def background(self, number: int) -> list[list[int]]:
        """Return the prompts of `number` background requests, the same at each call."""
        while len(self._background) < number:
            self._background.append(self.take(self._background_tokens))
        return self._background[:number]


class TokenStream:
    """A streamed request.

    Attributes:
        arrivals: When each token came, in seconds of `time.perf_counter`.
        decodes: Set once the request has got its second token, or ended.
    """

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.decodes = asyncio.Event()

    async def run(self, session: aiohttp.ClientSession, body: bytes) -> dict[str, Any]:
        """Send the request and read its answer to the end.

        Args:
            session: Of the server.
            body: As `_encode` made it.

        Returns:
            SGLang's `meta_info` of the last token.

        Raises:
            ServerError: The server answered with an error.
        """
        last = b""
        try:
            async with session.post("/generate", data=body, headers=HEADERS) as response:
                response.raise_for_status()
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        self.arrivals.append(time.perf_counter())
                        last = line
                        if len(self.arrivals) == 2:
                            self.decodes.set()
        finally:
            self.decodes.set()
        answer = json.loads(last.removeprefix(b"data: ") or "{}")
        if "meta_info" not in answer:
            raise ServerError(f"expected tokens, got {last[:200]!r}")
        return dict(answer["meta_info"])


def put_prefix(server: Server, prefix: Sequence[int], timeout_s: float) -> None:
    """Empty the radix cache, then compute `prefix` into it."""
    server.abort_all()
    if prefix:
        server.generate(generate_payload(prefix, 1, stream=False), timeout_s)


def measure(
    server: Server,
    case: Case,
    prefix: Sequence[int],
    prompts: Prompts,
    repetitions: int,
    timeout_s: float,
) -> Times:
    """Send a turn `repetitions` times, each with other fresh tokens, after one that is not counted.

    Args:
        server: Its radix cache holds `prefix`.
        case: What to measure.
        prefix: `case.cached` tokens.
        prompts: Where fresh tokens come from.
        repetitions: Turns that count.
        timeout_s: Limit of the whole case.

    Raises:
        CaseError: The server found other tokens in its cache than those of `prefix`, or a
            background request ended before the last turn.
        ServerError: A request failed, or the time was over.
    """
    try:
        case_run = _measure(server.url, case, prefix, prompts, repetitions)
        return asyncio.run(asyncio.wait_for(case_run, timeout_s))
    except TimeoutError as error:
        raise ServerError(f"{case}: not done in {timeout_s:.0f} s") from error
    except aiohttp.ClientError as error:
        raise ServerError(f"{case}: {error!r}") from error


async def _measure(
    url: str, case: Case, prefix: Sequence[int], prompts: Prompts, repetitions: int
) -> Times:
    # Encoded before anything is timed: 100,000 tokens take long enough to delay all arrivals.
    bodies = [
        _encode([*prefix, *prompts.take(case.fresh)], ANSWER_TOKENS) for _ in range(1 + repetitions)
    ]
    others = [TokenStream() for _ in range(case.running)]
    async with _session(url) as session:
        tasks = [
            asyncio.create_task(other.run(session, _encode(prompt, BACKGROUND_ANSWER_TOKENS)))
            for other, prompt in zip(others, prompts.background(case.running), strict=True)
        ]
        try:
            for other in others:
                await other.decodes.wait()
            turns = []
            for body in bodies:
                turns.append(await _take_turn(session, case, body))
                await asyncio.sleep(GAP_S)
            for task in tasks:
                if task.done():
                    raise CaseError(f"{case}: another request ended early: {task.exception()!r}")
        finally:
            if tasks:
                await session.post("/abort_request", json={"abort_all": True})
                await asyncio.gather(*tasks, return_exceptions=True)
    return times_of(turns[1:], [other.arrivals for other in others])


def _session(url: str) -> aiohttp.ClientSession:
    """Return a session with any number of connections, which a stalled stream ends."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=STALL_S)
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


async def _take_turn(session: aiohttp.ClientSession, case: Case, body: bytes) -> list[float]:
    """Send a turn; return when it was sent, then when its tokens came."""
    stream, sent_s = TokenStream(), time.perf_counter()
    meta = await stream.run(session, body)
    if meta["cached_tokens"] != case.cached:
        raise CaseError(f"{case}: the server found {meta['cached_tokens']} cached tokens")
    return [sent_s, *stream.arrivals]


def times_of(turns: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> Times:
    """Return what turns took, and the times between tokens while they were taken.

    Args:
        turns: When each was sent and its tokens came.
        others: When the tokens of each other request came.
    """
    start_s, end_s = turns[0][0], turns[-1][-1]
    return Times(
        ttft_ms=[1e3 * (turn[1] - turn[0]) for turn in turns],
        itl_ms=[
            1e3 * (later - earlier)
            for arrivals in (others or [turn[1:] for turn in turns])
            for earlier, later in pairwise(arrivals)
            if start_s <= earlier and later <= end_s
        ],
    )


def generate_payload(prompt: Sequence[int], answer_tokens: int, stream: bool) -> dict[str, Any]:
    """Return the body of a greedy request to `/generate` that writes exactly so many tokens."""
    sampling = {"temperature": 0, "max_new_tokens": answer_tokens, "ignore_eos": True}
    return {"input_ids": list(prompt), "sampling_params": sampling, "stream": stream}


def _encode(prompt: Sequence[int], answer_tokens: int) -> bytes:
    """Return the body of a streamed request."""
    return json.dumps(generate_payload(prompt, answer_tokens, stream=True)).encode()
