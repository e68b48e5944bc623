"""SGLang's real scheduler, model and pools inside this process, stepped by hand.

The event loop body below is that of `Scheduler.event_loop_normal`; requests enter through
`process_input_requests` and results are read from the finished `Req` objects. This shows pool
internals that a server process hides, and starts in seconds.
"""

from __future__ import annotations

import itertools
from array import array
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Result:
    """What one request returned.

    `output_ids`; `input_logprobs` of prompt tokens 1.. (None when not asked for);
    `output_logprobs` of the sampled tokens; `top` the two best (logprob, id) of each output step;
    `cached_tokens` of the prompt; `finish_reason` as SGLang names it.
    """

    output_ids: list[int]
    input_logprobs: list[float] | None
    output_logprobs: list[float]
    top: list[list[tuple[float, int]]]
    cached_tokens: int
    finish_reason: str


class SchedulerHarness:
    """Start a scheduler with server options; `close` it before the next one starts.

    Args:
        model_path: Hugging Face folder.
        tp_rank: Rank of this process; all ranks are given the same requests in the same order.
        options: Fields of `ServerArgs`. Without `skip_tokenizer_init=False` it has no tokenizer,
            half of what a small model's start takes; schemas need one. Without
            `kv_quant_accept_loss=False` nobody measures what the format loses.
    """

    def __init__(self, model_path: str, tp_rank: int = 0, **options: Any) -> None:
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.srt import server_args as server_args_module

        server_args = server_args_module.ServerArgs(
            model_path=str(model_path),
            **{
                "random_seed": 0,
                "skip_server_warmup": True,
                "skip_tokenizer_init": True,
                "disable_overlap_schedule": True,
                "log_level": "warning",
                **({"kv_quant_accept_loss": True} if "kv_quant" in options else {}),
                **options,
            },
        )
        self.scheduler = start_rank(server_args, tp_rank)
        self._ids = itertools.count()
        self._requests: dict[str, Any] = {}

    @property
    def pool(self) -> Any:
        return self.scheduler.token_to_kv_pool_allocator.store

    @property
    def allocator(self) -> Any:
        return self.scheduler.token_to_kv_pool_allocator

    def cached(self) -> dict[int, list[int]]:
        """Slots of all tokens in the radix cache, by their position in the sequence."""
        from sglang.srt.kv_canary.radix_cache_walker import walk_radix_cache_for_canary

        walk = walk_radix_cache_for_canary(radix_cache=self.scheduler.tree_cache)
        slots: dict[int, list[int]] = {}
        for position, slot in zip(walk.positions.tolist(), walk.slot_indices.tolist(), strict=True):
            slots.setdefault(position, []).append(slot)
        return slots

    def submit(
        self,
        input_ids: list[int],
        max_new_tokens: int,
        input_logprobs: bool = False,
        ignore_eos: bool = True,
        json_schema: str | None = None,
        logprobs: bool = True,
    ) -> str:
        """Queue a greedy request; return its id.

        With a schema the answer is JSON of that form and ends where the JSON does. Without
        logprobs the request takes paths of SGLang that those with logprobs do not.
        """
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        rid = f"request-{next(self._ids)}"
        sampling = SamplingParams(
            temperature=0.0,
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos and json_schema is None,
            json_schema=json_schema,
        )
        sampling.normalize(None)
        self.scheduler.process_input_requests(
            [
                TokenizedGenerateReqInput(
                    rid=rid,
                    input_text="",
                    input_ids=array("q", input_ids),
                    input_embeds=None,
                    mm_inputs=None,
                    token_type_ids=None,
                    sampling_params=sampling,
                    return_logprob=logprobs,
                    logprob_start_len=0 if input_logprobs else len(input_ids) - 1,
                    top_logprobs_num=2 * logprobs,
                    token_ids_logprob=None,
                    stream=False,
                )
            ]
        )
        queues = (self.scheduler.waiting_queue, self.scheduler.grammar_manager.grammar_queue)
        for req in itertools.chain(*queues):
            if req.rid == rid:
                self._requests[rid] = req
        return rid

    def abort(self, rid: str) -> None:
        """Abort a request wherever it is."""
        from sglang.srt.managers.io_struct import AbortReq

        self.scheduler.process_input_requests([AbortReq(rid=rid)])

    @torch.no_grad()  # as SGLang's event loop
    def step(self) -> bool:
        """Run one turn of the event loop; return whether a batch ran."""
        scheduler = self.scheduler
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch = plan.running_batch
        batch = plan.batch_to_run
        scheduler.cur_batch_for_debug = batch
        if batch:
            scheduler.process_batch_result(batch, scheduler.run_batch(batch))
        else:
            scheduler.on_idle()
        scheduler.last_batch = batch
        return bool(batch)

    def run(self, max_steps: int = 100_000) -> None:
        """Step until nothing is queued or running, then twice more for the idle self-check."""
        for _ in range(max_steps):
            busy = self.step() or self.scheduler.waiting_queue
            if not busy and not self.scheduler.grammar_manager.has_waiting_grammars():
                self.step()
                return
        raise AssertionError(f"scheduler still busy after {max_steps} steps")

    def result(self, rid: str) -> Result:
        """Read a finished request."""
        req = self._requests[rid]
        assert req.finished(), f"{rid} is not finished"
        logprob = getattr(req, "logprob", req)
        values = getattr(logprob, "input_token_logprobs_val", None)
        tops = logprob.output_top_logprobs_val or [], logprob.output_top_logprobs_idx or []
        return Result(
            output_ids=list(req.output_ids),
            input_logprobs=None if values is None else [v for v in values if v is not None],
            output_logprobs=list(logprob.output_token_logprobs_val or []),
            top=[list(zip(*pair, strict=True)) for pair in zip(*tops, strict=True)],
            cached_tokens=req.cached_tokens,
            finish_reason=type(req.finished_reason).__name__,
        )

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        input_logprobs: bool = False,
        json_schema: str | None = None,
    ) -> list[Result]:
        """Serve prompts as one batch of arrivals."""
        rids = [
            self.submit(prompt, max_new_tokens, input_logprobs, json_schema=json_schema)
            for prompt in prompts
        ]
        self.run()
        return [self.result(rid) for rid in rids]

    def flush(self) -> None:
        """Empty the radix cache."""
        assert self.scheduler.flush_cache()

    def close(self) -> None:
        """Free process groups and memory, so that another scheduler can start here."""
        from sglang.srt import runtime_context
        from sglang.srt.distributed import parallel_state

        with suppress(Exception):
            self.scheduler.release_host_resources()
        runtime_context.get_resources().expert_location_metadata = None
        # Globals of SGLang keep the scheduler alive; its weights and pages need not be.
        for weight in self.scheduler.tp_worker.model_runner.model.parameters():
            weight.data = weight.data.new_empty(0)
        if hasattr(self.allocator, "store"):
            self.pool.layers.clear()
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
        del self.scheduler
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def start_rank(server_args: Any, tp_rank: int) -> Any:
    """Make SGLang's scheduler of a rank as its process does, in either shape it has had."""
    from sglang.srt import runtime_context
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.server_args import PortArgs

    if hasattr(runtime_context, "SpawnRanks"):
        ranks = runtime_context.SpawnRanks(world_rank=tp_rank, gpu_id=tp_rank)
        runtime_context.publish(server_args, role="scheduler", ranks=ranks)
        return Scheduler(server_args, PortArgs.init_new(server_args))
    runtime_context.publish(server_args, role="scheduler")
    port_args = PortArgs.init_new(server_args)
    return Scheduler(server_args, port_args, tp_rank, tp_rank, 0, 0, 0, 0, None)
