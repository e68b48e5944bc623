"""All prompts of a server, sent at once as far as its concurrency goes, graded as they end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from benchmarks.tasks.cases import Grade
from benchmarks.tasks.prompts import Prompt
from testbed.servers import ServerError

OnAnswer = Callable[[Prompt, Grade, dict[str, Any]], None]


def ask_all(
    url: str, prompts: Sequence[Prompt], concurrency: int, limit_s: float, on_answer: OnAnswer
) -> None:
    """Ask for greedy answers and grade them; returns when all are done or the time is over.

    Args:
        url: Of the server.
        prompts: What to ask, in order.
        concurrency: Requests in flight.
        limit_s: Seconds; what has no answer by then is left out.
        on_answer: Called with each graded answer and the server's reply, in any thread.

    Raises:
        ServerError: a request failed.
    """
    with ThreadPoolExecutor(os.cpu_count()) as graders:
        asyncio.run(_ask_all(url, prompts, concurrency, limit_s, on_answer, graders))


async def _ask_all(
    url: str,
    prompts: Sequence[Prompt],
    concurrency: int,
    limit_s: float,
    on_answer: OnAnswer,
    graders: ThreadPoolExecutor,
) -> None:
    slots = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=None)

    def grade(prompt: Prompt, reply: dict[str, Any]) -> None:
        on_answer(prompt, prompt.case.grade(reply["text"]), reply)

    async def ask(client: httpx.AsyncClient, prompt: Prompt) -> None:
        async with slots:
            reply = await _generate(client, url, prompt)
        await asyncio.get_running_loop().run_in_executor(graders, grade, prompt, reply)

    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        tasks = [asyncio.create_task(ask(client, prompt)) for prompt in prompts]
        done, pending = await asyncio.wait(
            tasks, timeout=limit_s, return_when=asyncio.FIRST_EXCEPTION
        )
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()


async def _generate(client: httpx.AsyncClient, url: str, prompt: Prompt) -> dict[str, Any]:
    """Return SGLang's reply to one prompt.

    Raises:
        ServerError: there is no whole answer.
    """
    case = prompt.case
    sampling = {"temperature": 0, "max_new_tokens": case.max_tokens, "stop": list(case.stop)}
    payload = {"input_ids": prompt.ids, "sampling_params": sampling}
    try:
        response = await client.post(f"{url}/generate", json=payload)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise ServerError(f"{case.task}, {case.name}: {error!r}") from error
    reply: dict[str, Any] = response.json()
    if reply["meta_info"]["finish_reason"]["type"] == "abort":
        raise ServerError(f"{case.task}, {case.name}: {reply['meta_info']['finish_reason']}")
    return reply
