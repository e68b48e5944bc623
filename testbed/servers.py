"""Real `sglang.launch_server` processes for the benchmarks: start, wait, inspect, stop."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

POLL_INTERVAL_S = 0.5
STOP_TIMEOUT_S = 15.0
LOG_TAIL_LINES = 8
PR_SET_PDEATHSIG = 1
PORTS = range(20_000, 32_000)
_handed_out: set[int] = set()


class ServerError(RuntimeError):
    """A server did not start, died, or did not answer; the message ends with its log's tail."""


@dataclass(frozen=True)
class Server:
    """A running SGLang server.

    Attributes:
        url: Base address without a trailing slash.
        process: The launcher; its process group holds every worker.
        log_path: File that receives the standard output and error of the group.
        start_s: Seconds from launch to the first healthy answer.
    """

    url: str
    process: subprocess.Popen[bytes]
    log_path: Path
    start_s: float

    def info(self) -> dict[str, Any]:
        """Return what the server says about itself (`/server_info`)."""
        response = requests.get(f"{self.url}/server_info", timeout=30)
        response.raise_for_status()
        return response.json()

    def capacity_tokens(self) -> int:
        """Return how many tokens the server's KV pool holds."""
        return int(self.info()["max_total_num_tokens"])

    def flush_cache(self) -> None:
        """Empty the radix cache; the server must be idle."""
        requests.post(f"{self.url}/flush_cache", timeout=30).raise_for_status()

    def abort_all(self, timeout_s: float = 60) -> None:
        """Abort every request and wait until the server is idle, with an empty radix cache.

        Raises:
            ServerError: It is not idle in time.
        """
        requests.post(f"{self.url}/abort_request", json={"abort_all": True}, timeout=30)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if requests.post(f"{self.url}/flush_cache", timeout=30).ok:
                return
            time.sleep(POLL_INTERVAL_S)
        raise ServerError(f"server not idle {timeout_s:.0f} s after all requests were aborted")

    def pause(self) -> None:
        """Stop all processes of the server: an idle scheduler would keep polling on a core."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def generate(self, payload: dict[str, Any], timeout_s: float = 600) -> Any:
        """Post `payload` to the native `/generate` endpoint and return the decoded answer."""
        response = requests.post(f"{self.url}/generate", json=payload, timeout=timeout_s)
        response.raise_for_status()
        return response.json()


@dataclass(frozen=True)
class Launch:
    """How to start a server.

    Attributes:
        extra_args: Arguments besides host, port and model path.
        log_path: File for its output; overwritten.
        host: Address it listens on.
        prefix: Command in front, as `ip netns exec NAME`.
        env: Variables besides those of this process, such as CUDA_VISIBLE_DEVICES.
    """

    extra_args: Sequence[str]
    log_path: Path
    host: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def hardware_name() -> str:
    """Return the name of the accelerator SGLang will use, or of the CPU when there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """Return the CPU's model name with the number of usable cores."""
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def dtype_flags() -> list[str]:
    """Make the model compute in float32 on a CPU without bfloat16 instructions.

    There 16 bits take ten times as long. Pages of `--kv-quant` stay what they are; stock SGLang
    then keeps its KV in 32 bits, so give it a number of tokens, not of bytes.
    """
    import torch

    if torch.cuda.is_available():
        return []
    known = Path("/proc/cpuinfo").read_text().split()
    return [] if "avx512_bf16" in known or "amx_bf16" in known else ["--dtype", "float32"]


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on, another one each time.

    A server binds its port minutes after it was chosen. So it is none of those that Linux gives to
    whoever asks for any port, 32,768 and up: libraries of servers that start meanwhile do ask.
    """
    while True:
        port = secrets.choice(PORTS)
        if port not in _handed_out and _is_free(port):
            _handed_out.add(port)
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


def log_tail(path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """Return the last `lines` lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however that ends.

    SGLang's workers ask for the same, so a killed benchmark leaves no server behind.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def launch_server(
    model: Path | str,
    extra_args: Sequence[str],
    log_path: Path,
    timeout_s: float = 240,
    on_wait: Callable[[float], None] | None = None,
) -> Iterator[Server]:
    """Start `python -m sglang.launch_server` and stop its whole process group at exit.

    Args:
        model: Local Hugging Face folder.
        extra_args: Further arguments; host, port and model path are given here.
        log_path: File for the server's output; overwritten.
        timeout_s: Deadline for the first healthy answer.
        on_wait: Called with the seconds waited, about twice a second, until the server answers.

    Yields:
        The server, after it generated its first token.

    Raises:
        ServerError: The process ended or the deadline passed before the server was healthy, or
            a request failed in the block.
    """
    with launch_servers(model, [Launch(extra_args, log_path)], timeout_s, on_wait) as (server,):
        yield server


@contextmanager
def launch_servers(
    model: Path | str,
    commands: Sequence[Launch],
    timeout_s: float = 240,
    on_wait: Callable[[float], None] | None = None,
) -> Iterator[list[Server]]:
    """Start several servers at once, as `launch_server` starts one.

    Args:
        model: Local Hugging Face folder.
        commands: What to start.
        timeout_s: Deadline for the first healthy answer of each.
        on_wait: Called with the seconds waited for each.

    Yields:
        The servers, in order.

    Raises:
        ServerError: As `launch_server`.
    """
    started: list[tuple[subprocess.Popen[bytes], str, Path]] = []
    try:
        for launch in commands:
            process, url = _start(model, launch)
            started.append((process, url, launch.log_path))
        servers = [
            Server(url, process, log, _wait_until_healthy(process, url, log, timeout_s, on_wait))
            for process, url, log in started
        ]
        try:
            yield servers
        except (requests.RequestException, ServerError) as error:
            tails = "\n".join(f"end of {log}:\n{log_tail(log)}" for _, _, log in started)
            raise ServerError(f"{error}; {tails}") from error
    finally:
        for process, _, _ in started:
            stop_group(process)


def _start(model: Path | str, launch: Launch) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server process; return it with its address."""
    port = free_port()
    command = [*launch.prefix, sys.executable, "-m", "sglang.launch_server"]
    command += ["--model-path", str(model), "--host", launch.host, "--port", str(port)]
    command += launch.extra_args
    if "--kv-quant" in launch.extra_args:  # losses are a benchmark's subject, not a server's
        command.append("--kv-quant-accept-loss")
    launch.log_path.parent.mkdir(parents=True, exist_ok=True)
    with launch.log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **launch.env},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    return process, f"http://{launch.host}:{port}"


def _wait_until_healthy(
    process: subprocess.Popen[bytes],
    url: str,
    log_path: Path,
    timeout_s: float,
    on_wait: Callable[[float], None] | None,
) -> float:
    """Return the seconds until `/health_generate` answered, or raise `ServerError`."""
    begin = time.monotonic()
    while (waited := time.monotonic() - begin) < timeout_s:
        if process.poll() is not None:
            raise ServerError(
                f"server exited with code {process.returncode} while starting; "
                f"end of {log_path}:\n{log_tail(log_path)}"
            )
        if on_wait is not None:
            on_wait(waited)
        if _is_healthy(url):
            return time.monotonic() - begin
        time.sleep(POLL_INTERVAL_S)
    raise ServerError(
        f"server not healthy after {timeout_s:.0f} s; end of {log_path}:\n{log_tail(log_path)}"
    )


def _is_healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health_generate", timeout=30).status_code == 200
    except requests.RequestException:
        return False


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group: SGLang's graceful end takes 10 s and a benchmark keeps no state."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
