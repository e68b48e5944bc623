"""A platform that lets the unmodified SGLang serve on a CPU with plain PyTorch operators.

SGLang resolves its platform while `sglang.srt.utils` is still being imported, so this module may
import nothing of SGLang but the platform interface; the factories import what they return.
"""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity

from sgl_kvq.host.names import CpuDeviceMixin, PlatformEnum, SRTPlatform


class CpuEnginePlatform(SRTPlatform, CpuDeviceMixin):
    """CPU through PyTorch's own operators: no `sgl_kernel`, no Triton, no graphs."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_device(self, device_id: int | None = None) -> str:
        """Return the device string: SGLang splits it, unlike what its own CPU mixin returns."""
        return "cpu"

    def get_torch_profiler_activity_str(self) -> str:
        """Return what SGLang calls the device when `/start_profile` asks for its activities."""
        return "CPU"

    def get_torch_profiler_activity(self) -> ProfilerActivity:
        """Return what PyTorch's profiler calls the device."""
        return ProfilerActivity.CPU

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Choose what SGLang's own defaults do not do on a CPU."""
        if server_args.grammar_backend is None:
            # SGLang masks logits for xgrammar, its default, with CUDA kernels only.
            server_args.grammar_backend = "llguidance"

    def get_default_attention_backend(self) -> str:
        """Return SGLang's own PyTorch backend; `--kv-quant` selects ours."""
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        """Return SGLang's own pool (before 0.5.22); `--kv-quant` replaces it one level higher."""
        from sgl_kvq.host.names import MHATokenToKVPool

        return MHATokenToKVPool

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """Leave the choice of a pool to SGLang, as `get_mha_kv_pool_cls` does (from 0.5.22)."""
        return None

    def get_paged_allocator_cls(self) -> type:
        """Return the allocator that needs no Triton."""
        from sgl_kvq.host.cpu_platform.allocator import CpuPagedAllocator

        return CpuPagedAllocator
