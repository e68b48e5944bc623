"""A prefill instance, a decode instance and SGLang's router in front, as real processes."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from testbed.servers import (
    Launch,
    Server,
    ServerError,
    free_port,
    launch_servers,
    stop_group,
)

ROUTER_START_S = 300.0
START_TIMEOUT_S = 600.0  # both import SGLang at once, perhaps on few cores
_SAMPLE = re.compile(r"^(sgl_kvq:transfer_\w+)\{([^}]*)\} ([0-9.e+-]+)$", re.MULTILINE)


@dataclass(frozen=True)
class Cluster:
    """Both instances of a PD deployment.

    Attributes:
        prefill: The prefill instance.
        decode: The decode instance.
        bootstrap_port: Where the prefill instance answers decode instances.
    """

    prefill: Server
    decode: Server
    bootstrap_port: int

    def generate(self, payload: dict[str, Any], timeout_s: float = 120) -> requests.Response:
        """Send one request to both instances, as a router does; return the decode one's answer."""
        body = self._with_room(payload)
        with ThreadPoolExecutor(2) as pool:
            prefill, decode = (
                pool.submit(requests.post, f"{server.url}/generate", json=body, timeout=timeout_s)
                for server in (self.prefill, self.decode)
            )
            answer = decode.result()
            prefill.exception()
        return answer

    def stream(self, payload: dict[str, Any], timeout_s: float) -> Iterator[bytes]:
        """As `generate`, token by token: yields the decode instance's events as they come.

        Raises:
            ServerError: an instance refused the request.
        """
        body = self._with_room(payload) | {"stream": True}
        with ThreadPoolExecutor(1) as pool:
            url = f"{self.prefill.url}/generate"
            prefill = pool.submit(requests.post, url, json=body, timeout=timeout_s)
            url = f"{self.decode.url}/generate"
            with requests.post(url, json=body, timeout=timeout_s, stream=True) as answer:
                for line in answer.iter_lines(chunk_size=None):
                    if b'"error"' in line:
                        raise ServerError(line.decode(errors="replace"))
                    if line.startswith(b"data: {"):
                        yield line
            if prefill.result().status_code != 200:
                raise ServerError(prefill.result().text)

    def _with_room(self, payload: dict[str, Any]) -> dict[str, Any]:
        return payload | {
            "bootstrap_host": urlsplit(self.prefill.url).hostname,
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": random.getrandbits(62),
        }


def transfer_metrics(server: Server) -> dict[str, float]:
    """Return the transfer metrics of an instance, summed over ranks.

    A metric with a label `kind`, `result` or `state` is called NAME:VALUE.
    """
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    totals: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(text):
        found = re.search(r'(?:kind|result|state)="(\w+)"', labels)
        key = f"{name}:{found[1]}" if found else name
        totals[key] = totals.get(key, 0.0) + float(value)
    return totals


@contextmanager
def launch_pd(
    model: Path | str,
    flags: Sequence[str],
    log_folder: Path,
    prefill_flags: Sequence[str] = (),
    decode_flags: Sequence[str] = (),
    prefill_host: str = "127.0.0.1",
    prefill_prefix: tuple[str, ...] = (),
    decode_env: Mapping[str, str] | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Iterator[Cluster]:
    """Start both instances at once and stop them at exit.

    Args:
        model: Local Hugging Face folder.
        flags: For both, `--kv-quant` among them.
        log_folder: Receives prefill.log and decode.log.
        prefill_flags: For the prefill instance only.
        decode_flags: For the decode instance only.
        prefill_host: Address of the prefill instance.
        prefill_prefix: Command in front of it, as `ip netns exec NAME`.
        decode_env: Variables of the decode instance only.
        start_timeout_s: Longest start of either.

    Raises:
        ServerError: an instance did not start, or a request failed in the block.
    """
    port = free_port()
    backend = ["--disaggregation-transfer-backend", "kvq-zmq"]
    common = [*flags, *backend, "--disaggregation-bootstrap-port", str(port)]
    prefill_args = [*common, "--disaggregation-mode", "prefill", *prefill_flags]
    decode_args = [*common, "--disaggregation-mode", "decode", *decode_flags]
    commands = [
        Launch(prefill_args, log_folder / "prefill.log", prefill_host, prefill_prefix),
        Launch(decode_args, log_folder / "decode.log", env=decode_env or {}),
    ]
    with launch_servers(model, commands, start_timeout_s) as (prefill, decode):
        yield Cluster(prefill, decode, port)


@contextmanager
def launch_router(cluster: Cluster, log_path: Path) -> Iterator[Server]:
    """Start SGLang's router in front of a cluster and stop it at exit.

    Raises:
        ServerError: it did not start.
    """
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    command += ["--prefill", cluster.prefill.url, str(cluster.bootstrap_port)]
    command += ["--decode", cluster.decode.url, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(free_port()), "--disable-retries"]
    begin = time.monotonic()
    with ExitStack() as stack:
        log = stack.enter_context(log_path.open("wb"))
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        stack.callback(stop_group, process)
        url = f"http://127.0.0.1:{port}"
        while time.monotonic() - begin < ROUTER_START_S and process.poll() is None:
            try:
                if requests.get(f"{url}/readiness", timeout=5).status_code == 200:
                    yield Server(url, process, log_path, time.monotonic() - begin)
                    return
            except requests.RequestException:
                pass
            time.sleep(0.3)
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-8:])
        raise ServerError(f"router not ready; end of {log_path}:\n{tail}")
