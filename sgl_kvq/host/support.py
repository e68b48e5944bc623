"""Devices and models that quantized pages do not support, refused at start with one line."""

from __future__ import annotations

import logging
from typing import Any

import torch

from sgl_kvq.errors import ConfigError
from sgl_kvq.host.names import (
    AttentionArch,
    AttentionType,
    RadixAttention,
    mambaish_config,
)
from sgl_kvq.host.options import flag_of

logger = logging.getLogger(__name__)

NEEDS_GPU = ("enable_memory_saver", "enable_lora", "lora_paths")
"""Options with which SGLang's own scheduler ends in a traceback on a CPU.

The first preloads a library that links CUDA; LoRA's buffers are in page-locked memory.
"""


def choose_graphs(args: Any) -> None:
    """Turn off CUDA graphs where there is no GPU.

    On a GPU decode runs in one graph, prefill in SGLang's breakable graph, whose pieces end at
    attention.

    Args:
        args: SGLang's `ServerArgs`, changed in place.
    """
    if not torch.accelerator.is_available():
        args.disable_cuda_graph = True


def check_device(args: Any) -> None:
    """Refuse an accelerator that the kernels do not run on, and options that need one.

    Args:
        args: SGLang's `ServerArgs` as the user gave them.

    Raises:
        ConfigError: says what is there.
    """
    if not torch.accelerator.is_available():
        for name in NEEDS_GPU:
            if getattr(args, name):
                raise ConfigError(f"{flag_of(name)}: expected a GPU, got none; drop the option")
        return
    expected = "--kv-quant: expected a CPU, or an NVIDIA GPU of compute capability 8.0 or more"
    if torch.version.cuda is None or not torch.cuda.is_available():
        device = torch.accelerator.current_accelerator()
        raise ConfigError(f"{expected}, got {device}; run without --kv-quant")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise ConfigError(
            f"{expected}, got {torch.cuda.get_device_name()} with {capability[0]}.{capability[1]}; "
            f"run without --kv-quant"
        )


def check_model(model: Any) -> None:
    """Refuse models whose attention is not plain causal attention over per-head K and V.

    Args:
        model: SGLang's `ModelConfig`.

    Raises:
        ConfigError: names the property and what to do.
    """
    reasons = (
        (model.attention_arch != AttentionArch.MHA, "multi-head latent attention (MLA)"),
        (model.is_hybrid_swa, "sliding-window attention"),
        (mambaish_config(model) is not None, "Mamba or linear-attention layers"),
        (model.is_encoder_decoder, "an encoder"),
        (not model.is_generation, "embedding or reward output"),
        (getattr(model, "has_attention_sinks", False), "learned attention sinks"),
        (model.head_dim != model.v_head_dim, "different head dims of K and V"),
        (getattr(model, "is_multimodal", False), "image or audio input"),
    )
    for found, what in reasons:
        if found:
            architecture = ", ".join(model.hf_config.architectures or ["unknown"])
            raise ConfigError(
                f"--kv-quant: this model ({architecture}) has {what}, which quantized pages do not "
                f"support; run it without --kv-quant"
            )
    if model.head_dim % 16:
        raise ConfigError(
            f"--kv-quant: expected a head_dim that is a multiple of 16, got {model.head_dim}; run "
            f"this model without --kv-quant"
        )


def check_layers(model: Any) -> list[Any]:
    """Refuse a loaded model with an attention layer that plain causal attention does not cover.

    This looks at the layers themselves, so that a model class nobody thought of is refused
    instead of served wrongly.

    Args:
        model: The loaded `torch.nn.Module`.

    Returns:
        Its attention layers (SGLang's `RadixAttention`).

    Raises:
        ConfigError: names the layer and the property.
    """
    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    # SGLang's wrapper of Hugging Face models keeps them in a dict, which `modules` does not see.
    layers += getattr(model, "attention_instances", {}).values()
    ids = [layer.layer_id for layer in layers]
    if not layers or len(set(ids)) != len(ids):
        raise ConfigError(
            f"--kv-quant: {type(model).__name__} has {len(ids)} attention layers with "
            f"{len(set(ids))} different ids, expected one KV per layer; run it without --kv-quant"
        )
    for layer in layers:
        reasons = (
            (layer.logit_cap > 0, "capped logits"),
            (layer.sliding_window_size > -1, "a sliding window"),
            (layer.is_cross_attention, "cross attention"),
            (layer.attn_type != AttentionType.DECODER, f"attention type {layer.attn_type}"),
            (layer.use_irope, "interleaved RoPE"),
            (getattr(layer, "xai_temperature_len", -1) > 0, "a length-dependent temperature"),
            (layer.qk_head_dim != layer.v_head_dim, "different head dims of K and V"),
        )
        for found, what in reasons:
            if found:
                raise ConfigError(
                    f"--kv-quant: layer {layer.layer_id} of {type(model).__name__} has {what}, "
                    f"which is not supported; run this model without --kv-quant"
                )
    return layers
