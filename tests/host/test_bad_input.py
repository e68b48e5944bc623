"""What a user gets wrong ends in one clear line and a non-zero exit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_kvq.errors import ConfigError
from sgl_kvq.host import server_options
from sgl_kvq.host.versions.records import fields_of


@pytest.fixture(scope="module")
def prepare() -> Callable[[list[str]], Any]:
    """SGLang's own argument parsing and resolution, the first things `launch_server` does."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    from sgl_kvq.host.versions.records import resolve

    def prepare_and_resolve(argv: list[str]) -> Any:
        args = prepare_server_args(argv)
        resolve(args)
        return args

    return prepare_and_resolve


def exit_line(prepare: Callable[[list[str]], Any], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        prepare(list(argv))
    assert caught.value.code not in (0, None)
    message = str(caught.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--page-size", "16"], "--page-size: expected 64, got 16; drop the option"),
        (["--attention-backend", "triton"], "--attention-backend: expected kvq, got triton"),
        (["--kv-cache-dtype", "fp8_e4m3"], "--kv-cache-dtype: expected auto, got fp8_e4m3"),
        (["--chunked-prefill-size", "100"], "expected a multiple of 64, got 100; use 64"),
        (["--speculative-algorithm", "EAGLE"], "run without speculative decoding"),
        (
            ["--enable-hierarchical-cache"],
            "--enable-hierarchical-cache: this option is not known to work with quantized pages",
        ),
        (["--enable-flexkv"], "--enable-flexkv: this option is not known to work"),
        (["--enable-deterministic-inference"], "expected False, got True; drop the option: --kv-q"),
        (["--rl-on-policy-target", "fsdp"], "--rl-on-policy-target: expected it unset, got fsdp"),
        (["--kv-canary", "log"], "--kv-canary: expected none, got log"),
        (["--radix-cache-backend", "other"], "--radix-cache-backend: expected it unset, got other"),
        (["--max-running-requests", "-3"], "--max-running-requests: expected at least 1, got -3"),
        (["--mem-fraction-static", "nan"], "--mem-fraction-static: expected a finite number"),
        (["--kv-quant-memory-gb", "nan"], "--kv-quant-memory-gb: expected a finite number"),
        (["--kv-quant-memory-gb", "inf"], "--kv-quant-memory-gb: expected a finite number"),
        (["--kv-quant-memory-gb", "-1"], "--kv-quant-memory-gb: expected a positive number"),
        (["--kv-quant-transfer-window-mb", "nan"], "window-mb: expected a finite number, got nan"),
        (["--kv-quant-transfer-deadline-s", "inf"], "deadline-s: expected a finite number"),
        (["--kv-quant-transfer-port", "-1"], "--kv-quant-transfer-port: expected 0 to 65535"),
        (["--kv-quant-transfer-advertise", "host:99999"], "a port up to 65535, got 'host:99999'"),
        (["--kv-quant-sink-tokens", "-1"], "expected 0 to 16, got -1"),
        (["--kv-quant-sink-tokens", "99"], "expected 0 to 16, got 99"),
        (["--kv-quant-hadamard-block", "128"], "divisor of head_dim 64, got 128"),
        (["--kv-quant-memory-gb", "0.0001"], "expected memory for at least 4 pages"),
        (["--max-total-tokens", "128"], "--max-total-tokens: expected at least 256, got 128"),
    ],
)
def test_options(
    prepare: Callable[[list[str]], Any], tiny_model_path: str, options: list[str], expected: str
) -> None:
    argv = ["--model-path", tiny_model_path, "--kv-quant", "hack2", *options]
    assert expected in exit_line(prepare, *argv)


@pytest.mark.usefixtures("cpu")
def test_options_that_need_a_gpu(prepare: Callable[[list[str]], Any], tiny_model_path: str) -> None:
    argv = ["--model-path", tiny_model_path, "--kv-quant", "hack2"]
    for options in (["--enable-memory-saver"], ["--enable-lora"], ["--lora-paths", "a=b"]):
        line = exit_line(prepare, *argv, *options)
        assert f"{options[0]}: expected a GPU, got none" in line


def test_an_option_nobody_has_tried(
    prepare: Callable[[list[str]], Any], tiny_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that a later SGLang adds is refused by name, unless the user wants to try it."""
    kept = dict(server_options.KNOWN_BY_NAMESPACE)
    kept["schedule"] = tuple(name for name in kept["schedule"] if name != "schedule_policy")
    monkeypatch.setattr(server_options, "KNOWN_BY_NAMESPACE", kept)
    argv = ["--model-path", tiny_model_path, "--kv-quant", "hack2", "--schedule-policy", "fcfs"]
    assert prepare(argv).kv_quant == "hack2"  # the default
    argv[-1] = "lpm"
    line = exit_line(prepare, *argv)
    assert "--schedule-policy: this option is not known to work" in line
    assert f"set {server_options.ALLOW_UNTRIED_ENV}=1 to try it" in line
    monkeypatch.setenv(server_options.ALLOW_UNTRIED_ENV, "1")
    assert prepare(argv).kv_quant == "hack2"


def test_tables_name_options_that_exist(prepare: Callable[[list[str]], Any]) -> None:
    """A renamed option would stay in the table and never be met."""
    from sglang.srt.server_args import ServerArgs

    fields = {name for name, _ in fields_of(ServerArgs)}
    tables = {*server_options.LIMITED, *chain(*server_options.KNOWN_BY_NAMESPACE.values())}
    assert sorted(tables - fields - NOT_IN_EVERY_VERSION) == []


NOT_IN_EVERY_VERSION = {
    "attn_dp_size",
    "disaggregation_decode_allocation_policy",
    "disaggregation_decode_retraction_backup",
    "enable_watermark",
    "prefill_decode_interval",
    "prefill_decode_interval_min_bs",
    "sampling_mask_max_tokens",
    "watermark_config",
    "watermark_context_window",
    "watermark_default_enabled",
    "watermark_enforce_all",
    "watermark_key",
    "watermark_key_b",
    "watermark_max_probability",
    "watermark_mixing_probability",
}


def test_options_without_the_flag(
    prepare: Callable[[list[str]], Any], tiny_model_path: str
) -> None:
    line = exit_line(prepare, "--model-path", tiny_model_path, "--kv-quant-prefill", "quantized")
    assert "--kv-quant-prefill: expected --kv-quant FORMAT beside it" in line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--kv-quant", "hack3"], "--kv-quant: expected one of "),
        (
            ["--kv-quant", "hack2", "--kv-quant-prefill", "fast"],
            "--kv-quant-prefill: expected one of exact, quantized, got 'fast'",
        ),
        (
            ["--kv-quant", "hack2", "--kv-quant-transfer-codec", "rar"],
            "--kv-quant-transfer-codec: expected ",
        ),
    ],
)
def test_unknown_names(
    prepare: Callable[[list[str]], Any], tiny_model_path: str, options: list[str], expected: str
) -> None:
    assert expected in exit_line(prepare, "--model-path", tiny_model_path, *options)


def test_model_paths(
    prepare: Callable[[list[str]], Any], tiny_model_path: str, tmp_path: Path
) -> None:
    def refused(folder: Path) -> str:
        return exit_line(prepare, "--model-path", str(folder), "--kv-quant", "hack2")

    assert "does not exist" in refused(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "expected a config.json in it" in refused(empty)
    (empty / "config.json").write_text("{not json")
    assert "config.json is not valid JSON" in refused(empty)
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model_path, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "is damaged" in refused(damaged)


MODELS = {
    "MLA": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "kv_lora_rank": 64,
            "q_lora_rank": None,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "num_key_value_heads": 4,
        },
        "multi-head latent attention",
    ),
    "head_dim 72": ({"head_dim": 72}, "multiple of 16, got 72"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_unsupported_models(
    prepare: Callable[[list[str]], Any], tiny_model_path: str, tmp_path: Path, kind: str
) -> None:
    changes, expected = MODELS[kind]
    shutil.copytree(tiny_model_path, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    line = exit_line(prepare, "--model-path", str(tmp_path / "model"), "--kv-quant", "hack2")
    assert expected in line


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"sliding_window_size": 128}, "a sliding window"),
        ({"logit_cap": 30.0}, "capped logits"),
        ({"v_head_dim": 32}, "different head dims of K and V"),
        ({"is_cross_attention": True}, "cross attention"),
        ({"use_irope": True}, "interleaved RoPE"),
    ],
)
def test_layers_that_are_not_plain_attention(options: dict[str, Any], what: str) -> None:
    """No list of architectures knows every model; the layers themselves give it away."""
    from sglang.srt.layers.radix_attention import RadixAttention

    from sgl_kvq.host.support import check_layers

    def layer(layer_id: int, **more: Any) -> RadixAttention:
        return RadixAttention(4, 64, 0.125, 2, layer_id, **more)

    check_layers(torch.nn.ModuleList([layer(0), layer(1)]))
    with pytest.raises(ConfigError, match=f"layer 1 of ModuleList has {what}.*run this model"):
        check_layers(torch.nn.ModuleList([layer(0), layer(1, **options)]))
    with pytest.raises(ConfigError, match="one KV per layer"):
        check_layers(torch.nn.ModuleList([layer(0), layer(0)]))


def test_a_real_launch_ends_with_the_line_alone(tiny_model_path: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", tiny_model_path),
            *("--kv-quant", "hack2", "--page-size", "32"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "error: --kv-quant with --page-size: expected 64, got 32; drop the option: pages are the "
        "quantization block"
    )
