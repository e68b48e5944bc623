"""What is asked of each server, in `bench_serving`'s terms."""

from __future__ import annotations

from dataclasses import dataclass, replace

GSP_WORKING_SET = 4
"""Tokens of all shared prefixes over tokens that the bf16 pool holds."""


@dataclass(frozen=True)
class Workload:
    """Requests of one kind, all known at the start and sent as soon as concurrency allows.

    Args:
        name: In the results.
        input_tokens: Prompt of a request; with `num_prefixes` without the shared prefix.
        output_tokens: Every request writes exactly so many.
        concurrency: Requests in flight.
        num_prompts: Requests in all.
        timeout_s: Longest time worth waiting.
        prefix_tokens: Length of a shared prefix.
        num_prefixes: Different shared prefixes, 0 for none.
    """

    name: str
    input_tokens: int
    output_tokens: int
    concurrency: int
    num_prompts: int
    timeout_s: float
    prefix_tokens: int = 0
    num_prefixes: int = 0

    def scaled(self, prompts: float, lengths: float) -> Workload:
        """Return a smaller workload of the same kind.

        Args:
            prompts: Factor on the number of requests. Shared prefixes: on their tokens in all.
            lengths: Factor on all lengths in tokens. Shorter prefixes are more of them.
        """
        num_prompts = max(1, round(self.num_prompts * prompts))
        num_prefixes = 0
        if self.num_prefixes:
            num_prefixes = max(1, round(self.num_prefixes * prompts / lengths))
            num_prompts = num_prefixes * (self.num_prompts // self.num_prefixes)
        return replace(
            self,
            input_tokens=max(1, round(self.input_tokens * lengths)),
            output_tokens=max(2, round(self.output_tokens * lengths)),
            prefix_tokens=round(self.prefix_tokens * lengths),
            num_prompts=num_prompts,
            num_prefixes=num_prefixes,
            concurrency=min(self.concurrency, num_prompts),
        )

    def flags(self) -> list[str]:
        """Return the arguments of `bench_serving` that make this workload."""
        flags = {
            "--num-prompts": self.num_prompts,
            "--max-concurrency": self.concurrency,
        }
        if self.num_prefixes:
            flags |= {
                "--dataset-name": "generated-shared-prefix",
                "--gsp-num-groups": self.num_prefixes,
                "--gsp-prompts-per-group": self.num_prompts // self.num_prefixes,
                "--gsp-system-prompt-len": self.prefix_tokens,
                "--gsp-question-len": self.input_tokens,
                "--gsp-output-len": self.output_tokens,
            }
            return [str(part) for flag in flags.items() for part in flag]
        flags |= {
            "--dataset-name": "random-ids",
            "--random-input-len": self.input_tokens,
            "--random-output-len": self.output_tokens,
            "--random-range-ratio": 1.0,
        }
        return [*(str(part) for flag in flags.items() for part in flag), "--tokenize-prompt"]


def make_workloads(bf16_tokens: int, prompts_per_prefix: int = 8) -> dict[str, Workload]:
    """Return all workloads by name.

    Args:
        bf16_tokens: Tokens the stock bf16 pool holds; the shared prefixes are four times that.
        prompts_per_prefix: Requests that share a prefix, in random order among all others.
    """
    prefix_tokens = 8192
    num_prefixes = max(1, round(GSP_WORKING_SET * bf16_tokens / prefix_tokens))
    workloads = (
        Workload("16384/1024 x128", 16384, 1024, 128, 128, timeout_s=420),
        Workload("2048/4096 x256", 2048, 4096, 256, 256, timeout_s=420),
        Workload("256/1024 x64", 256, 1024, 64, 128, timeout_s=180),
        Workload(
            "shared-prefix",
            128,
            64,
            64,
            num_prefixes * prompts_per_prefix,
            timeout_s=420,
            prefix_tokens=prefix_tokens,
            num_prefixes=num_prefixes,
        ),
    )
    return {workload.name: workload for workload in workloads}
