"""PD transfer over slow links between two network namespaces. Needs root and iproute2.

Usage: python -m benchmarks.pd.bench [--agents] [--model DIR] [--links NAME ...] [--out FILE.csv]

Links without delay are a veth pair shaped by tc's tbf; the one with delay is
`benchmarks.pd.tun_link`, because netem is a module that many kernels lack. The column `how` says
which.
Each link carries bf16 and hack2 pages: the time to transfer a prompt of 2,048 tokens of an 8B
model's geometry, from the first block to the last answer, checksums and CURVE on. With `--agents` a
prefill instance in the other namespace and a decode instance with SGLang's router in this one serve
the agents of `benchmarks.agents.sessions` over the same links, and TTFT and JCT are reported. KV
travels in 16 bits or as codes, whatever the model computes in.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.agents.sessions import Workload, WorkloadSizes
from benchmarks.common.records import command_line, git_commit, write_csv
from benchmarks.pd.tun_link import MTU_BYTES, tun_link
from benchmarks.wire.ends import EndSpec, wire_pair
from scripts.fetch_model import DEFAULT_FOLDER, fetch
from sgl_kvq.transfer.runtime.curve import make_keys
from testbed.pd_cluster import launch_pd, launch_router, transfer_metrics
from testbed.servers import cpu_name, dtype_flags

NAMESPACE = "kvq-prefill"
INSIDE = ("ip", "netns", "exec", NAMESPACE)
ADDRESSES = ("10.213.77.1", "10.213.77.2")
DEVICES = ("kvq0", "kvq1")
NUM_PAGES = 32
BLOCK_BYTES = 2**20
FORMATS = ("bf16", "hack2")
AGENTS = WorkloadSizes(
    num_agents=2, num_rounds=2, shared_tokens=256, private_tokens=512, answer_tokens=8
)


@dataclass(frozen=True)
class Link:
    """A shaped link.

    Attributes:
        name: For the table.
        mbit_s: Speed in each direction.
        delay_ms: Delay in each direction.
    """

    name: str
    mbit_s: int
    delay_ms: float

    @property
    def how(self) -> str:
        """What makes the link."""
        return "tun, process between" if self.delay_ms else "veth, tbf"


LINKS = (
    Link("1 Gbit/s", 1000, 0.0),
    Link("100 Mbit/s", 100, 0.0),
    Link("100 Mbit/s, 10 ms", 100, 10.0),
)


@dataclass(frozen=True)
class Row:
    """One link and format; field names are the columns."""

    link: str
    how: str
    what: str
    format: str
    wire_bytes: int
    transfer_s: float | None
    ttft_p50_s: float | None
    jct_mean_s: float | None
    gain_over_bf16: float | None
    repeats: int
    machine: str
    commit: str
    command: str


def run_ip(*arguments: str) -> None:
    """Run one command of iproute2."""
    subprocess.run(arguments, check=True, capture_output=True)


@contextmanager
def shaped(link: Link) -> Iterator[None]:
    """A namespace for the prefill instance, and a slow link to it."""
    _remove()
    try:
        run_ip("ip", "netns", "add", NAMESPACE)
        run_ip(*INSIDE, "ip", "link", "set", "lo", "up")
        with _devices(link):
            for where, name, address in zip((INSIDE, ()), DEVICES, ADDRESSES, strict=True):
                peer = ADDRESSES[1 - ADDRESSES.index(address)]
                run_ip(*where, "ip", "addr", "add", address, "peer", peer, "dev", name)
                run_ip(*where, "ip", "link", "set", name, "up")
            yield
    finally:
        _remove()


@contextmanager
def _devices(link: Link) -> Iterator[None]:
    """The two ends of a link, not up yet."""
    if link.delay_ms:
        with tun_link(DEVICES, NAMESPACE, link.mbit_s, link.delay_ms):
            for where, name in ((INSIDE, DEVICES[0]), ((), DEVICES[1])):
                run_ip(*where, "ip", "link", "set", name, "mtu", str(MTU_BYTES))
            yield
        return
    run_ip("ip", "link", "add", DEVICES[0], "type", "veth", "peer", "name", DEVICES[1])
    run_ip("ip", "link", "set", DEVICES[0], "netns", NAMESPACE)
    shape = ("tbf", "rate", f"{link.mbit_s}mbit", "burst", "256kb", "latency", "400ms")
    for where, name in ((INSIDE, DEVICES[0]), ((), DEVICES[1])):
        run_ip(*where, "tc", "qdisc", "add", "dev", name, "root", *shape)
    yield


def _remove() -> None:
    for command in (("ip", "netns", "del", NAMESPACE), ("ip", "link", "del", DEVICES[1])):
        with suppress(subprocess.CalledProcessError):
            run_ip(*command)


def measure_transfer(link: Link, keys: Path, repeats: int, command: str) -> list[Row]:
    """Transfer times of both formats over one link."""
    seconds: dict[str, float] = {}
    sizes: dict[str, int] = {}
    with shaped(link):
        for name in FORMATS:
            spec = EndSpec(
                name, NUM_PAGES, host=ADDRESSES[0], keys=keys, sender_namespace=NAMESPACE
            )
            with wire_pair(spec) as pair:
                pair.transfer(BLOCK_BYTES)
                times = [pair.transfer(BLOCK_BYTES) for _ in range(repeats)]
                seconds[name] = statistics.median(times)
                sizes[name] = pair.total_bytes
    return [
        Row(
            link=link.name,
            how=link.how,
            what=f"{NUM_PAGES * 64} tokens, 8B geometry",
            format=name,
            wire_bytes=sizes[name],
            transfer_s=round(seconds[name], 4),
            ttft_p50_s=None,
            jct_mean_s=None,
            gain_over_bf16=round(seconds["bf16"] / seconds[name], 2),
            repeats=repeats,
            machine=cpu_name(),
            commit=git_commit(),
            command=command,
        )
        for name in FORMATS
    ]


def measure_agents(link: Link, model: Path, keys: Path, folder: Path, command: str) -> list[Row]:
    """TTFT and JCT of the agents over one link; the client sits beside the decode instance."""
    from transformers import AutoTokenizer

    workload = Workload(AutoTokenizer.from_pretrained(model), AGENTS)
    rows: list[Row] = []
    with shaped(link):
        for name in FORMATS:
            flags = ["--kv-quant", name, "--kv-quant-memory-gb", "0.25", "--random-seed", "0"]
            flags += ["--max-running-requests", "4", "--chunked-prefill-size", "512"]
            flags += ["--enable-cache-report", "--enable-metrics", *dtype_flags()]
            flags += ["--kv-quant-transfer-keys", str(keys)]
            with launch_pd(
                model,
                flags,
                folder / name,
                prefill_flags=["--kv-quant-transfer-host", ADDRESSES[0]],
                prefill_host=ADDRESSES[0],
                # SGLang looks for its own address on a route that the namespace lacks.
                prefill_prefix=(*INSIDE, "env", f"SGLANG_HOST_IP={ADDRESSES[0]}"),
            ) as cluster:
                with launch_router(cluster, folder / name / "router.log") as router:
                    answers = workload.run(router, lambda request: None, flush=False)
                metrics = transfer_metrics(cluster.prefill)
            prefix = "sgl_kvq:transfer_wire_bytes_total"
            wire = sum(value for key, value in metrics.items() if key.startswith(prefix))
            rows.append(
                Row(
                    link=link.name,
                    how=link.how,
                    what=f"{AGENTS.num_agents} agents x {AGENTS.num_rounds}, SmolLM2-135M",
                    format=name,
                    wire_bytes=int(wire),
                    transfer_s=None,
                    ttft_p50_s=round(statistics.median(r.ttft_s for r in answers), 3),
                    jct_mean_s=round(statistics.mean(r.total_s for r in answers), 3),
                    gain_over_bf16=None,
                    repeats=1,
                    machine=cpu_name(),
                    commit=git_commit(),
                    command=command,
                )
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all links and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--agents", action="store_true", help="serve the agents, too")
    names = [link.name for link in LINKS]
    parser.add_argument("--links", nargs="+", choices=names, default=names)
    parser.add_argument("--model", type=Path, help=f"Hugging Face folder ({DEFAULT_FOLDER})")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu/pd.csv"))
    args = parser.parse_args(argv)
    command = command_line("pd.bench", sys.argv[1:] if argv is None else argv)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        make_keys(keys, ["decode"])
        for link in [link for link in LINKS if link.name in args.links]:
            fresh = measure_transfer(link, keys, args.repeats, command)
            if args.agents:
                model = args.model or fetch(DEFAULT_FOLDER)
                fresh += measure_agents(link, model, keys, Path("out/bench_pd"), command)
            rows += fresh
            for row in fresh:
                print(
                    f"{row.link:18} {row.what:28} {row.format:6} {row.wire_bytes / 1e6:8.1f} MB  "
                    f"transfer {row.transfer_s} s  gain {row.gain_over_bf16}  "
                    f"TTFT p50 {row.ttft_p50_s} s  JCT {row.jct_mean_s} s",
                    flush=True,
                )
            write_csv(args.out, [asdict(row) for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
