"""Start SGLang's servers for the examples, and stop them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODEL = ".model/smollm2-135m"  # what `make model` fetches
START_TIMEOUT_S = 600.0
QUESTION = (  # more than the 64 tokens of a page, so that one is quantized
    "Paris is the capital of France and lies on the river Seine. It is known for its museums, "
    "its cafes and the Eiffel Tower, which was built in 1889. Which city is the capital of France?"
)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def running(module: str, port: int, *flags: str, ready: str = "/health") -> Iterator[str]:
    """Run a server module of SGLang's and yield its URL; the whole process group ends with it.

    Args:
        module: What `python -m` runs.
        port: Where it listens.
        flags: Its other options.
        ready: Path that answers 200 once it can serve.

    Raises:
        RuntimeError: it ended, or was not ready in time; names its log.
    """
    url = f"http://127.0.0.1:{port}"
    log = Path("out") / f"{module}-{port}.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(url + ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{module} did not start; see {log}")
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(url: str, question: str) -> str:
    """One chat completion through the OpenAI client."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": question}],
        max_tokens=24,
        temperature=0,
    )
    return answer.choices[0].message.content or ""
