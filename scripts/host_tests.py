"""Run SGLang's own tests of what this plugin replaces: on stock SGLang and with `--kv-quant`.

The tests are those of the installed version, which lie in SGLang's repository and not in its wheel.
Each module runs in a process of its own, every server and engine that it starts on one local model.

Usage: python -m scripts.host_tests [MODULE ...] [--source DIR] [--formats bf16 hack4]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tabulate import tabulate

from testbed.servers import dtype_flags, stop_group

ROOT = Path(__file__).parent.parent
ARCHIVE = "https://github.com/sgl-project/sglang/archive/refs/tags/v{}.tar.gz"
STOCK = "stock"
MODULES = (
    "unit/disaggregation/test_register_to_bootstrap.py",
    "unit/managers/test_kv_page_invariants.py",
    "unit/mem_cache/test_paged_free_segment.py",
    "unit/plugins/test_hook_registry.py",
    "unit/plugins/test_load_plugins.py",
    "unit/server_args/test_server_args.py",
    "unit/test_runtime_context.py",
    "unit/test_server_args_cli_metadata.py",
    "unit/test_server_args_namespaces.py",
    "constrained_decoding/test_constrained_decoding.py",
    "core/test_srt_endpoint.py",
    "core/test_srt_engine.py",
    "openai_server/validation/test_matched_stop.py",
    "radix_cache/test_radix_cache_hit.py",
    "rl/test_update_weights_from_tensor.py",
    "sampling/test_original_logprobs.py",
    "sampling/test_penalty.py",
    "scheduler/test_load_snapshot_server.py",
    "scheduler/test_scheduler_control.py",
)
"""Under `test/registered`: modules that start servers, or test what this plugin stands behind."""

CANNOT_HOLD: dict[str, str] = {}
"""Tests (a part of their names) that pages of 64 quantized tokens cannot pass, and why."""

COMMAND_LINE_LIMITS = {"--max-total-tokens": "40000"}
"""Options of every server and engine here, unless a test sets them: a CPU's memory is shared."""

FORMAT_ENV, MODEL_ENV, OUTPUT_ENV, LOG_ENV = (
    f"HOST_TESTS_{name}" for name in ("FORMAT", "MODEL", "OUTPUT", "LOG")
)
_REFUSAL = re.compile(r"^(?:error|E .*ConfigError): (--.*)", re.MULTILINE)
_ERROR = re.compile(r"^(?:E +)?(\w*(?:Error|Exception)\b.*)", re.MULTILINE)
_outcomes: dict[str, tuple[str, str]] = {}
_refused: dict[str, str] = {}  # class: the line that its server ended with
_log_begin = 0


def pytest_configure() -> None:
    """Give every server and engine that a test starts the local model and the options."""
    from sglang.srt.entrypoints import engine
    from sglang.srt.plugins import load_plugins
    from sglang.test import test_utils

    load_plugins()
    model, quantization = os.environ[MODEL_ENV], os.environ[FORMAT_ENV]
    for name, value in vars(test_utils).items():
        if re.fullmatch(r"DEFAULT_\w*MODEL\w*TEST\w*", name) and isinstance(value, str):
            setattr(test_utils, name, model)
    options = dict(COMMAND_LINE_LIMITS)
    if quantization != STOCK:
        options["--kv-quant"] = quantization
    flags = [*dtype_flags(), *(part for option in options.items() for part in option)]
    start_process, start_engine = test_utils._subprocess_popen_with_outputs, engine.Engine.__init__

    def process_with_options(command: list[str], *args: Any, **kwargs: Any) -> Any:
        if "--model-path" in command:
            at = command.index("--model-path") + 1
            command = [*command[:at], model, *flags, *command[at + 1 :]]
        return start_process(command, *args, **kwargs)

    def engine_with_options(self: Any, **kwargs: Any) -> None:
        if "server_args" not in kwargs:
            for flag, value in options.items():
                kwargs.setdefault(flag[2:].replace("-", "_"), json_value(value))
            kwargs["model_path"] = model
        start_engine(self, **kwargs)

    test_utils._subprocess_popen_with_outputs = process_with_options
    engine.Engine.__init__ = engine_with_options


def json_value(text: str) -> Any:
    """A number where the text is one."""
    return int(text) if text.isdigit() else text


def pytest_runtest_logstart() -> None:
    """Remember where the log of a test begins: servers write to the same file."""
    global _log_begin
    _log_begin = Path(os.environ[LOG_ENV]).stat().st_size


def pytest_runtest_logreport(report: Any) -> None:
    """Note how a test ended, and with which line of ours if a server refused to start."""
    if report.when != "call" and report.outcome == "passed":
        return
    outcome, reason, owner = report.outcome, "", report.nodeid.rpartition("::")[0]
    if outcome == "failed":
        log = Path(os.environ[LOG_ENV]).read_bytes()[_log_begin:].decode(errors="replace")
        if refusal := _REFUSAL.search(f"{log}\n{report.longreprtext}"):
            _refused[owner] = refusal[1]
        errors = _ERROR.findall(log) or _ERROR.findall(report.longreprtext)
        reason = errors[-1] if errors else ""
        if owner in _refused and (refusal or report.when == "setup"):
            outcome, reason = "refused", _refused[owner]
    _outcomes.setdefault(report.nodeid, (outcome, reason))
    Path(os.environ[OUTPUT_ENV]).write_text(json.dumps(_outcomes))


def fetch_source(folder: Path) -> Path:
    """Download the source of the installed SGLang; return its folder.

    Raises:
        SystemExit: the network does not have it.
    """
    url = ARCHIVE.format(version("sglang"))
    try:
        with (
            urllib.request.urlopen(url, timeout=60) as answer,
            tarfile.open(fileobj=answer, mode="r|gz") as archive,
        ):
            archive.extractall(folder, filter="data")
    except (urllib.error.URLError, OSError) as error:
        sys.exit(
            f"error: expected {url}, got {error}; give a checkout of that version with --source"
        )
    return next(folder.iterdir())


def run_tests(
    module: str, tests: list[str], column: str, source: Path, args: argparse.Namespace
) -> dict[str, tuple[str, str]]:
    """Run tests of one module in a process of its own.

    Args:
        module: Path under `test/registered`.
        tests: Their names; all of the module if empty.
        column: A format of `--kv-quant`, or `STOCK`.
        source: SGLang's source.
        args: Of the command line.

    Returns:
        For each test its outcome (passed, skipped, refused, failed or timeout) and the reason.
    """
    log = (args.output / f"{module.replace('/', '.')}.{column}.log").resolve()
    outcomes = log.with_suffix(".json")
    outcomes.unlink(missing_ok=True)
    environment = os.environ | {
        # Servers unpickle what a test sends them from its module.
        "PYTHONPATH": f"{ROOT}:{(source / 'test/registered' / module).parent}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "true",  # not 1, with which SGLang's tests start a server twice
        "OMP_WAIT_POLICY": "passive",
        FORMAT_ENV: column,
        MODEL_ENV: str(args.model.resolve()),
        OUTPUT_ENV: str(outcomes),
        LOG_ENV: str(log),
    }
    command = [sys.executable, "-m", "pytest", "-p", "scripts.host_tests", "-p", "no:cacheprovider"]
    command += ["-c", "pytest.ini", "-v", "-s", *(tests or [f"registered/{module}"])]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=source / "test",
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with suppress(subprocess.TimeoutExpired):
            process.wait(args.timeout)
        late = process.poll() is None
        stop_group(process)
    results = json.loads(outcomes.read_text()) if outcomes.exists() else {}
    end = ("timeout", f"not ended after {args.timeout:.0f} s") if late else ("failed", "no result")
    return {test: tuple(results.get(test, end)) for test in [*tests, *results]}


def main() -> int:
    """Run the modules on stock, then what passed there with each format; print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=MODULES, help="under test/registered")
    parser.add_argument(
        "--source", type=Path, help="checkout of the installed version; else GitHub"
    )
    parser.add_argument("--formats", nargs="+", default=["bf16", "hack4"], metavar="FORMAT")
    parser.add_argument("--model", type=Path, default=ROOT / ".model" / "smollm2-135m")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a module and column")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "host_tests")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows, others = [], []
    with tempfile.TemporaryDirectory() as temporary:
        source = args.source or fetch_source(Path(temporary))
        for module in args.modules:
            stock = run_tests(module, [], STOCK, source, args)
            passed = [test for test, (outcome, _) in stock.items() if outcome == "passed"]
            row = [module, f"{len(passed)} of {len(stock)}"]
            for column in args.formats if passed else ():
                found = run_tests(module, passed, column, source, args)
                judged = {test: judge(test, *result) for test, result in found.items()}
                row.append(
                    ", ".join(f"{n} {v}" for v, n in Counter(v for v, _ in judged.values()).items())
                )
                others += [
                    [t.partition("/")[2], column, *j] for t, j in judged.items() if j[0] != "passed"
                ]
            rows.append(row)
            print(*row, sep=" | ", flush=True)
    print(tabulate(rows, ["module", "passed on stock", *args.formats], tablefmt="github"))
    print(tabulate(others, ["test", "format", "", "why"], tablefmt="github"))
    return int(any(verdict in ("failed", "timeout") for _, _, verdict, _ in others))


def judge(test: str, outcome: str, reason: str) -> tuple[str, str]:
    """Excuse a failure that is known to be inherent; return outcome and reason."""
    excuse = next((why for part, why in CANNOT_HOLD.items() if part in test), None)
    return ("cannot hold", excuse) if outcome == "failed" and excuse else (outcome, reason)


if __name__ == "__main__":
    sys.exit(main())
