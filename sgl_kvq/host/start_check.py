"""Measure at start what a format loses on the model that is about to be served."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from sgl_kvq import __version__
from sgl_kvq.config import KVQuantConfig
from sgl_kvq.errors import ConfigError, HostError, KvqError
from sgl_kvq.fidelity.loss import REFUSE_NATS, Loss, mean_loss, verdict
from sgl_kvq.fidelity.memory import recall, remember
from sgl_kvq.fidelity.text import measured_ids
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.host.disagg.model_identity import model_identity
from sgl_kvq.host.names import get_parallel
from sgl_kvq.host.options import quant_config
from sgl_kvq.host.rank_basis import model_calibration
from sgl_kvq.host.text_pass import TextPass
from sgl_kvq.transfer.protocol.handshake import digest, make_fingerprint, weights_digest

logger = logging.getLogger(__name__)

MEASURED_TOKENS = 1024
"""Tokens of the text; those of its first page read no codes and do not count."""

MIN_TOKENS = 4 * PAGE_SIZE
"""Shortest text that says anything."""

ADVICE = "`python -m sgl_kvq advise MODEL` compares all formats"


def check_loss(scheduler: Any) -> None:
    """Say what the format loses on this model, and refuse to serve garbage.

    Args:
        scheduler: SGLang's `Scheduler`, with model, pool and attention backend in place. All ranks
            of a model call this.

    Raises:
        ConfigError: the loss is above `REFUSE_NATS` and not accepted.
        KvqError: the model uses KV in a way that quantized pages do not support.
    """
    args, runner = scheduler.server_args, scheduler.tp_worker.model_runner
    config = quant_config(args)
    assert config is not None
    layouts = runner.token_to_kv_pool.plan.layouts
    if all(layout.format.is_raw for layout in layouts):
        return
    group = get_parallel().tp_group
    if runner.device != "cpu":
        if group.rank_in_group == 0:
            _report(config.format, None, f"not tried on GPUs yet; {ADVICE}")
        return
    key, how = _key(runner, config, args), "measured at an earlier start"
    loss = group.broadcast_object(recall(key))
    reason = _why_not(scheduler) if loss is None else None
    if loss is None and reason is None:
        began = time.perf_counter()
        try:
            loss = measure_loss(runner, scheduler.tokenizer)
        except Exception as error:  # a server that cannot be checked is served all the same
            if isinstance(error, KvqError) and not isinstance(error, HostError):
                raise  # it is the model that does what we cannot serve
            logger.warning(
                "--kv-quant %s: its loss could not be measured", config.format, exc_info=True
            )
            return
        how = f"measured in {time.perf_counter() - began:.1f} s"
        if group.rank_in_group == 0:
            remember(key, loss)
    if group.rank_in_group == 0:
        _report(config.format, loss, reason or how)
    if loss is not None and verdict(loss) == "refused" and not args.kv_quant_accept_loss:
        raise ConfigError(
            f"--kv-quant {config.format}: expected a loss of at most {REFUSE_NATS:g} nats a token "
            f"on this model, got {loss}; take another format ({ADVICE}), or pass "
            f"--kv-quant-accept-loss"
        )


def measure_loss(runner: Any, tokenizer: Any) -> Loss:
    """Run a text in 16 bits and through closed pages, over the pool and kernels that will serve.

    In one step all tokens are fresh and attend to each other in 16 bits; in steps of a page each
    token reads all earlier pages in codes.

    Args:
        runner: SGLang's `ModelRunner`.
        tokenizer: The model's tokenizer.
    """
    num_tokens = _num_tokens(runner)
    engine = runner.attn_backend.engine
    text = TextPass(runner, measured_ids(tokenizer, num_tokens))
    quantized_prefill = engine.quantized_prefill
    with torch.no_grad(), text.in_pool():
        try:
            engine.quantized_prefill = False
            exact = text.hidden(num_tokens)[PAGE_SIZE:]
            read = text.hidden(PAGE_SIZE)[PAGE_SIZE:]
        finally:
            engine.quantized_prefill = quantized_prefill
        return mean_loss(zip(text.logprobs(exact), text.logprobs(read), strict=True))


def _num_tokens(runner: Any) -> int:
    """Tokens of the text: what pool and token table hold, in whole pages."""
    room = min(
        runner.token_to_kv_pool_allocator.available_size(),
        runner.req_to_token_pool.req_to_token.shape[1],
        runner.model_config.context_len,
        MEASURED_TOKENS,
    )
    return room // PAGE_SIZE * PAGE_SIZE


def _why_not(scheduler: Any) -> str | None:
    """Why the loss of this server cannot be measured, or is not asked for."""
    args, runner = scheduler.server_args, scheduler.tp_worker.model_runner
    reasons = (
        (args.kv_quant_accept_loss, "--kv-quant-accept-loss"),
        (args.disaggregation_mode == "decode", "the PD prefill instance measures it"),
        (args.load_format == "dummy", "--load-format dummy: weights are random"),
        (args.enable_dp_attention, "not possible with --enable-dp-attention"),
        (args.enable_lora, "not possible with --enable-lora"),
        (scheduler.tokenizer is None, "needs a tokenizer"),
        (_num_tokens(runner) < MIN_TOKENS, f"needs room for {MIN_TOKENS} tokens"),
    )
    return next((reason for found, reason in reasons if found), None)


def _key(runner: Any, config: KVQuantConfig, args: Any) -> str:
    """Digest of all that decides the loss: weights, format, calibration, device, our version."""
    model = runner.model_config
    fingerprint = make_fingerprint(
        config,
        runner.token_to_kv_pool.plan.layouts,
        model.get_total_num_kv_heads(),
        weights_digest(args.model_path),
        model_calibration(config, model).digest,
        model_identity(model, args),
    )
    own = {
        "sgl_kvq": __version__,
        "device": runner.device,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "tokens": _num_tokens(runner),
    }
    return f"{digest(fingerprint | own):016x}"


def _report(name: str, loss: Loss | None, how: str) -> None:
    """Print the one line."""
    if loss is None:
        logger.info("--kv-quant %s: loss not measured (%s)", name, how)
    elif verdict(loss) == "served":
        logger.info("--kv-quant %s loses %s (%s)", name, loss, how)
    else:
        logger.warning("--kv-quant %s loses %s (%s); %s", name, loss, how, ADVICE)
