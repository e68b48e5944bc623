"""The pieces of `python -m benchmarks.pd.bench_gpu` that need no server."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pd import bench_gpu
from testbed import servers
from testbed.servers import Launch

BEFORE = {
    "sgl_kvq:transfer_wire_bytes_total:pages": 1e6,
    "sgl_kvq:transfer_state_seconds_sum:transferring": 1.0,
    "sgl_kvq:transfer_state_seconds_count:transferring": 2.0,
    "sgl_kvq:transfer_state_seconds_sum:bootstrapping": 0.5,
}
AFTER = {
    # Two requests of two ranks each: 0.25 s after 0.05 s of waiting for the decode instance.
    "sgl_kvq:transfer_wire_bytes_total:pages": 1e6 + 2 * 0.4e9,
    "sgl_kvq:transfer_state_seconds_sum:transferring": 1.0 + 4 * 0.3,
    "sgl_kvq:transfer_state_seconds_count:transferring": 6.0,
    "sgl_kvq:transfer_state_seconds_sum:bootstrapping": 0.5 + 4 * 0.05,
}


def test_the_transfer_is_a_mean_over_requests_and_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = bench_gpu.parse_args(["--prefill-tp", "2", "--gbit-s", "0", "--prompt-tokens", "3"])
    bench = bench_gpu.PairBench(args, "hack2", "1", tmp_path / "hack2.json")
    bench._start_s = 1.0
    metrics = iter((BEFORE, AFTER))
    monkeypatch.setattr(bench_gpu, "transfer_metrics", lambda _server: next(metrics))
    monkeypatch.setattr(bench, "_ask", lambda _cluster, _prompt: bench_gpu.Answer(0.1, 0.2))
    cluster: Any = bench_gpu.Cluster(None, None, 0)  # type: ignore[arg-type]
    bench._measure(cluster, "one at a time", bench._prompts(2))
    (row,) = bench.rows
    assert row.kv_mb_a_request == 400
    assert row.transfer_s == pytest.approx(0.25)
    assert row.transfer_gb_s == pytest.approx(1.6)
    assert (row.prefill_tp, row.decode_tp, row.relay_gbit_s) == (2, 1, None)


def test_each_instance_sees_its_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, list[str]]] = []

    def run(command: list[str], env: dict[str, str], **_options: Any) -> None:
        started.append((env["CUDA_VISIBLE_DEVICES"], command[command.index("--only") + 1 :]))

    monkeypatch.setattr(subprocess, "run", run)
    argv = ["--formats", "bf16", "hack2", "--devices", "0", "2", "--decode-devices", "0,1", "2,3"]
    bench_gpu.run_all(bench_gpu.parse_args(argv), tmp_path)
    folder = str(tmp_path)
    assert sorted(started) == [("0", ["bf16", "0,1", folder]), ("2", ["hack2", "2,3", folder])]
    log = tmp_path / "server.log"
    prefix = ("sh", "-c", 'echo "$CUDA_VISIBLE_DEVICES"')
    launch = Launch([], log, prefix=prefix, env={"CUDA_VISIBLE_DEVICES": "2,3"})
    process, _ = servers._start("model", launch)
    process.wait(10)
    assert log.read_text() == "2,3\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--devices", "0", "1", "--decode-devices", "1"], "one for each of --devices"),
        (["--prefill-tp", "2"], "use --gbit-s 0"),
    ],
)
def test_what_does_not_go_together_is_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_gpu.parse_args(argv)
    assert message in capsys.readouterr().err
