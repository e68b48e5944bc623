"""Run a text through a loaded model before it serves: what the next token would be after each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sgl_kvq.errors import HostError
from sgl_kvq.formats.base import PAGE_SIZE
from sgl_kvq.host.names import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
    LogitsMetadata,
    LogitsProcessor,
)
from sgl_kvq.host.versions import calls, internals

LOGIT_ROWS = PAGE_SIZE
"""Rows of the [tokens, vocabulary] logits in memory at once."""


class TextPass:
    """A text in the pool of a rank that serves nobody yet, as one request that nobody sent.

    Args:
        runner: SGLang's `ModelRunner`, ready to serve. All ranks of a model do the same steps.
        ids: int64 [tokens], whole pages, at most what pool and token table hold.

    Raises:
        HostError: the model has not one output head.
    """

    def __init__(self, runner: Any, ids: torch.Tensor) -> None:
        heads = [module for module in runner.model.modules() if isinstance(module, LogitsProcessor)]
        if len(heads) != 1:
            raise HostError(f"expected one output head, the model has {len(heads)}")
        self._runner, self._head, self._lm_head = runner, heads[0], None
        self._ids = ids.to(runner.device)
        self._slots = torch.empty(0)

    @contextmanager
    def in_pool(self) -> Iterator[None]:
        """Hold the pool while passes run. Afterwards it is as before: nothing held or counted."""
        allocator = self._runner.token_to_kv_pool_allocator
        row = self._runner.req_to_token_pool.req_to_token[-1]
        before, num_nonfinite = row.clone(), allocator.store.num_nonfinite.clone()
        none, whole = torch.tensor([0]), torch.tensor([len(self._ids)])
        try:
            self._slots = allocator.alloc_extend(
                none.to(row.device),
                none,
                whole.to(row.device),
                whole,
                torch.tensor([-1], device=row.device),
                len(self._ids),
            )
            row[: len(self._ids)] = self._slots
            yield
        finally:
            row.copy_(before)
            allocator.store.num_nonfinite.copy_(num_nonfinite)
            allocator.clear()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()  # serving runs on streams of its own

    def hidden(self, chunk: int) -> torch.Tensor:
        """Run the text from its beginning; what was in its pages is overwritten.

        Args:
            chunk: Tokens of a step.

        Returns:
            Last hidden states, [tokens, hidden].
        """
        found: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            call = {
                name: calls.argument(module.forward, name, *args, **kwargs)
                for name in ("hidden_states", "lm_head")
            }
            found.append(call["hidden_states"].clone())
            self._lm_head = call["lm_head"]

        handle = self._head.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with internals.without_prefill_graph(self._runner):
                for start in range(0, len(self._ids), chunk):
                    self._runner.forward(self._batch(start, min(start + chunk, len(self._ids))))
        finally:
            handle.remove()
        return torch.cat(found)

    def logprobs(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield log-probabilities of the next token, float32 [<= LOGIT_ROWS, vocabulary]."""
        every_row = LogitsMetadata(forward_mode=ForwardMode.DECODE)
        for rows in hidden.split(LOGIT_ROWS):
            logits = self._head(None, rows, self._lm_head, every_row).next_token_logits
            yield logits.float().log_softmax(-1)

    def _batch(self, start: int, stop: int) -> Any:
        """SGLang's `ForwardBatch` of a step that extends the text from `start` to `stop`."""
        device, length = self._ids.device, stop - start

        def one(value: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor([value], dtype=dtype, device=device)

        return ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            batch_size=1,
            input_ids=self._ids[start:stop],
            req_pool_indices=one(len(self._runner.req_to_token_pool.req_to_token) - 1, torch.int64),
            seq_lens=one(stop, torch.int64),
            out_cache_loc=self._slots[start:stop],
            seq_lens_sum=stop,
            orig_seq_lens=one(stop),
            spec_algorithm=self._runner.spec_algorithm,
            seq_lens_cpu=torch.tensor([stop]),
            capture_hidden_mode=CaptureHiddenMode.NULL,
            positions=torch.arange(start, stop, device=device),
            extend_num_tokens=length,
            extend_seq_lens=one(length),
            extend_prefix_lens=one(start),
            extend_start_loc=one(0),
            extend_prefix_lens_cpu=[start],
            extend_seq_lens_cpu=[length],
        )
