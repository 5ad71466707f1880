"""A step of generation, model and sampler, as one CUDA graph.

Launching the kernels of a small model's step one by one takes longer than running them. A captured
graph is one launch, and what changes from step to step (token, step, lengths of the cache, state,
counts) lies in tensors that the graph itself brings up to date.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqkern.generation.reader import Decoder
from seqkern.generation.sampler import Sampler
from seqkern.nn import KVCache

Step = Callable[[], None]
_WARM_UPS = 2


def captured(step: Step, device: torch.device) -> Step:
    """`step` as the replay of a CUDA graph; it must not wait for the device."""
    graph = torch.cuda.CUDAGraph()
    # torch's own stream for captures is on the device that was current when it was first wanted.
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def warmed_up(step: Step, device: torch.device) -> None:
    """Run `step` on a stream of its own, where libraries set up what a capture forbids."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)


class StepGraph:
    """The steps after `token` was drawn: each reads the last token and draws the next.

    Args:
        model: whose `next_logits` depends on tensors alone while its windows have room.
        state: of the model; from now on the graph's.
        sampler: of the rows.
        token: [R], drawn but not read.
        step: of the next draw.
        capture: makes a replay of a step on a device.
        warm_up: runs a step there before that.
    """

    def __init__(
        self,
        model: Decoder,
        state: Any,
        sampler: Sampler,
        token: Tensor,
        step: int,
        capture: Callable[[Step, torch.device], Step] = captured,
        warm_up: Callable[[Step, torch.device], None] = warmed_up,
    ) -> None:
        """See the class."""
        self.model, self.state, self.sampler = model, state, sampler
        self.token = token.clone()
        self.logprob = torch.empty(len(token), dtype=torch.float32, device=token.device)
        self.steps = torch.full((len(token),), step, dtype=torch.int64, device=token.device)
        changed = [self.token, self.steps, *_changing(state)]
        if sampler.counts is not None:
            changed.append(sampler.counts)
        # What a warm-up leaves in a cache lies beyond its lengths, where nothing reads.
        saved = [t.clone() for t in changed]
        warm_up(self._step, token.device)
        for t, value in zip(changed, saved, strict=True):
            t.copy_(value)
        self._replay = capture(self._step, token.device)
        # A capture runs nothing, but what stands for one in a test may.
        for t, value in zip(changed, saved, strict=True):
            t.copy_(value)

    def replay(self) -> tuple[Tensor, Tensor]:
        """The next token [R] and its log-probability [R]."""
        self._replay()
        return self.token.clone(), self.logprob.clone()

    def _step(self) -> None:
        logits, state = self.model.next_logits(self.token.unsqueeze(1), self.state)
        if state is not self.state:
            for old, new in zip(_changing(self.state), _changing(state), strict=True):
                old.copy_(new)
        token, logprob = self.sampler.draw(logits, self.steps)
        self.sampler.count(token.unsqueeze(1))
        self.token.copy_(token)
        self.logprob.copy_(logprob)
        self.steps += 1


def _changing(state: Any) -> list[Tensor]:
    """The tensors of a state that a step reads and changes."""
    if isinstance(state, KVCache):
        return [state.lengths]
    return [t for t in torch.utils._pytree.tree_leaves(state) if isinstance(t, Tensor)]
