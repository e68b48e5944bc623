"""A multi-agent workload: agents share one long context and ask in turn, round after round.

Every agent's first message is `shared documents + its own documents + a question`; the later
ones continue its transcript with a summary of what other agents answered. All documents are
CPython's own (`pydoc_data.topics`). From one round to the next a server can reuse an agent's
whole transcript, if its KV cache still holds it: the working set is what the cache would have
to hold to never compute a token twice.

The order of the agents is reversed after each round. In a fixed order a least-recently-used
cache that is only a little too small always evicts what is asked for next and looks useless;
reversed, every cache gets hits in proportion to what it holds.

The workload is deterministic: greedy sampling, one request at a time, fixed documents. Only the
answers (and so the quoted ones, a few dozen tokens) differ between servers.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any, Protocol

import httpx
import numpy as np
import openai

from testbed.servers import Server, ServerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION_TOKENS = 128
"""Upper estimate of what a turn adds besides the answer: template, question, quoted answers."""
QUOTED_ANSWERS = 3
REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class WorkloadSizes:
    """Size of the workload, in tokens of the model's tokenizer.

    Attributes:
        num_agents: Agents that take part.
        num_rounds: How often each agent asks.
        shared_tokens: Documents that every agent reads first.
        private_tokens: Documents that only one agent reads.
        answer_tokens: Upper limit of an answer.
    """

    num_agents: int
    num_rounds: int
    shared_tokens: int
    private_tokens: int
    answer_tokens: int

    @property
    def transcript_tokens(self) -> int:
        """Upper estimate of one agent's transcript after the last round."""
        turns = self.num_rounds * (QUESTION_TOKENS + self.answer_tokens)
        return self.shared_tokens + self.private_tokens + turns

    @property
    def working_set_tokens(self) -> int:
        """Upper estimate of the distinct tokens of all transcripts: the shared part counts once."""
        own_tokens = self.transcript_tokens - self.shared_tokens
        return self.shared_tokens + self.num_agents * own_tokens


@dataclass(frozen=True)
class Request:
    """One answered request.

    Attributes:
        round_index: Round, from 0.
        agent_index: Agent, from 0.
        prompt_ids: Token ids of the rendered prompt.
        text: The answer.
        ttft_s: Seconds to the first piece of text.
        total_s: Seconds to the end of the answer.
        prompt_tokens: Prompt length as the server counted it.
        cached_tokens: Prompt tokens whose KV the server had in its cache.
        known_tokens: Prompt tokens the server had computed before, for whatever request; a cache
            that never evicts would have them, except for a page that is not full.
    """

    round_index: int
    agent_index: int
    prompt_ids: list[int]
    text: str
    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    known_tokens: int


@dataclass(frozen=True)
class Summary:
    """Totals of a workload.

    Attributes:
        prompt_tokens: Sum over all requests.
        cached_tokens: Prompt tokens found in the prefix cache.
        hit_rate: `cached_tokens / prompt_tokens`.
        prompt_tokens_computed: Prompt tokens not found in the cache.
        prompt_tokens_recomputed: Those among them that the server had computed before, and lost.
        ttft_p50_s: Median time to first token.
        ttft_p95_s: 95th percentile of it.
        total_s: Sum of the requests' times.
    """

    prompt_tokens: int
    cached_tokens: int
    hit_rate: float
    prompt_tokens_computed: int
    prompt_tokens_recomputed: int
    ttft_p50_s: float
    ttft_p95_s: float
    total_s: float


@dataclass(frozen=True)
class Agreement:
    """Result of `score_agreement`.

    Attributes:
        share: Share of the scored tokens that the server would have chosen too, 0 to 1.
        num_tokens: Number of scored tokens.
        cached_share: Share of the context, in whole pages, that was read from the KV cache.
    """

    share: float
    num_tokens: int
    cached_share: float


class Workload:
    """The agents' documents and conversation, independent of the server that answers.

    Args:
        tokenizer: The model's tokenizer, with a chat template.
        sizes: How much of everything.

    Raises:
        ValueError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sizes: WorkloadSizes) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("model: expected a chat model, its tokenizer has no chat template")
        self.sizes = sizes
        self._tokenizer = tokenizer
        documents = itertools.cycle(sorted(topics.items()))
        shared, _ = self._take(documents, sizes.shared_tokens)
        self._system = (
            "You are one of several agents who study the Python language reference together. "
            f"Answer in one short sentence.\n\n{shared}"
        )
        self._private = [
            self._take(documents, sizes.private_tokens) for _ in range(sizes.num_agents)
        ]

    def run(
        self, server: Server, on_request: Callable[[Request], None], flush: bool = True
    ) -> list[Request]:
        """Let all agents ask in all rounds.

        Args:
            server: An idle server started with `--enable-cache-report`; its cache is emptied.
            on_request: Called after each answer.
            flush: Whether to empty the cache; a router cannot.

        Returns:
            The requests in the order in which they were sent.

        Raises:
            ServerError: A request failed.
        """
        if flush:
            server.flush_cache()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        transcripts = [[{"role": "system", "content": self._system}] for _ in self._private]
        answers: dict[int, str] = {}
        computed: list[list[int]] = []
        requests: list[Request] = []
        for round_index, agent_index in self._turns():
            messages = transcripts[agent_index]
            question = self._question(round_index, agent_index, answers)
            messages.append({"role": "user", "content": question})
            try:
                request = self._ask(client, model, messages, round_index, agent_index, computed)
            except (openai.APIError, httpx.HTTPError) as error:
                raise ServerError(f"request of agent {agent_index} failed: {error}") from error
            messages.append({"role": "assistant", "content": request.text})
            answers[agent_index] = request.text
            computed.append(request.prompt_ids + self._encode(request.text))
            requests.append(request)
            on_request(request)
        return requests

    def score_agreement(self, server: Server, reference: Sequence[Request]) -> Agreement:
        """Return how often the server's first choice is the reference's token, teacher-forced.

        Free-running greedy answers part for ever at the first token that differs, so comparing
        them measures luck more than the cache. Here each reference answer is sent back as text
        that follows its own prompt, and the model is asked which token it would have chosen at
        each position: one wrong choice costs one token. Prompts are read from the KV cache, in
        whole pages (a request that misses is sent once more: the first one filled the cache), so
        a quantized cache is really used; without a hit the prompt would be computed in 16 bits.
        Close calls that the other order of a sum decides count against the server as well, and
        so does an answer that the tokenizer would split in another way than the model wrote it.

        Args:
            server: Server to score, page size 64.
            reference: Requests of a server with an unquantized cache. Its own share is 1 by
                definition: the answers are its first choices.

        Returns:
            The agreement over all tokens of all answers.
        """
        matches = num_tokens = cached = expected = 0
        for request in reversed(reference):
            answer_ids = self._encode(request.text)
            if not answer_ids:
                continue
            start = len(request.prompt_ids) - 1
            whole_pages = start // 64 * 64
            choices, hit = _forced_choices(server, request.prompt_ids + answer_ids, start)
            if hit < whole_pages:
                choices, hit = _forced_choices(server, request.prompt_ids + answer_ids, start)
            matches += sum(a == b for a, b in zip(choices, answer_ids, strict=True))
            num_tokens += len(answer_ids)
            cached += hit
            expected += whole_pages
        return Agreement(matches / max(num_tokens, 1), num_tokens, cached / max(expected, 1))

    def _turns(self) -> Iterator[tuple[int, int]]:
        """Yield (round, agent) in order; every second round goes backwards."""
        for round_index in range(self.sizes.num_rounds):
            agents = range(self.sizes.num_agents)
            for agent_index in agents if round_index % 2 == 0 else reversed(agents):
                yield round_index, agent_index

    def _question(self, round_index: int, agent_index: int, answers: dict[int, str]) -> str:
        """Return the next user message of an agent; `answers` holds each agent's last one."""
        documents, names = self._private[agent_index]
        topic = names[round_index % len(names)]
        if round_index == 0:
            return (
                f"You are agent {agent_index}. Your own documents:\n\n{documents}\n\n"
                f'Explain "{topic}" in Python.'
            )
        others = [(agent_index + 1 + i) % self.sizes.num_agents for i in range(QUOTED_ANSWERS)]
        quotes = "\n".join(
            f"Agent {other}: {answers[other]}"
            for other in dict.fromkeys(others)
            if other != agent_index
        )
        return f'The other agents answered:\n{quotes}\n\nNow explain "{topic}" in Python.'

    def _ask(
        self,
        client: openai.OpenAI,
        model: str,
        messages: list[Any],
        round_index: int,
        agent_index: int,
        computed: Sequence[Sequence[int]],
    ) -> Request:
        """Send one streaming chat request and time it."""
        prompt_ids = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        begin = time.perf_counter()
        stream = client.chat.completions.create(
            model=model,
            messages=messages,
            temperature=0,
            max_tokens=self.sizes.answer_tokens,
            stream=True,
            stream_options={"include_usage": True},
            timeout=REQUEST_TIMEOUT_S,
        )
        ttft_s, pieces, usage = None, [], None
        for chunk in stream:
            usage = chunk.usage or usage
            if chunk.choices and chunk.choices[0].delta.content:
                ttft_s = ttft_s or time.perf_counter() - begin
                pieces.append(chunk.choices[0].delta.content)
        total_s = time.perf_counter() - begin
        if usage is None:
            raise ServerError("the server ended the stream without usage figures")
        details = usage.prompt_tokens_details
        return Request(
            round_index=round_index,
            agent_index=agent_index,
            prompt_ids=prompt_ids,
            text="".join(pieces),
            ttft_s=ttft_s or total_s,
            total_s=total_s,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=(details.cached_tokens if details else None) or 0,
            known_tokens=max((_common_prefix(prompt_ids, ids) for ids in computed), default=0),
        )

    def _take(self, documents: Iterator[tuple[str, str]], num_tokens: int) -> tuple[str, list[str]]:
        """Return documents of `num_tokens` tokens, the last one cut, and their names."""
        ids: list[int] = []
        names: list[str] = []
        while len(ids) < num_tokens:
            name, text = next(documents)
            names.append(name)
            ids += self._encode(f"# {name}\n\n{text.strip()}\n\n")
        text = self._tokenizer.decode(ids[:num_tokens], clean_up_tokenization_spaces=False)
        return text.strip(), names

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


class Answered(Protocol):
    """What `summarize` needs to know of a request; see `Request`."""

    @property
    def prompt_tokens(self) -> int: ...  # noqa: D102

    @property
    def cached_tokens(self) -> int: ...  # noqa: D102

    @property
    def known_tokens(self) -> int: ...  # noqa: D102

    @property
    def ttft_s(self) -> float: ...  # noqa: D102

    @property
    def total_s(self) -> float: ...  # noqa: D102


def summarize(requests: Sequence[Answered]) -> Summary:
    """Return the totals of a workload."""
    prompt_tokens = sum(request.prompt_tokens for request in requests)
    cached_tokens = sum(request.cached_tokens for request in requests)
    lost_tokens = sum(max(0, request.known_tokens - request.cached_tokens) for request in requests)
    ttft_p50_s, ttft_p95_s = np.percentile([request.ttft_s for request in requests], [50, 95])
    return Summary(
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        hit_rate=cached_tokens / prompt_tokens,
        prompt_tokens_computed=prompt_tokens - cached_tokens,
        prompt_tokens_recomputed=lost_tokens,
        ttft_p50_s=float(ttft_p50_s),
        ttft_p95_s=float(ttft_p95_s),
        total_s=sum(request.total_s for request in requests),
    )


def _forced_choices(server: Server, ids: list[int], start: int) -> tuple[list[int], int]:
    """Return the server's first choice for each token after `ids[start]`, and the cached tokens."""
    answer = server.generate(
        {
            "input_ids": ids,
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": 1,
        }
    )
    meta = answer["meta_info"]
    choices = [top[0][1] for top in meta["input_top_logprobs"][1:]]
    return choices, int(meta["cached_tokens"])


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
