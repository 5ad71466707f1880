"""Training by several processes: what each does, and what they tell each other.

The processes are `torchrun`'s, one per device. A batch is drawn alike by all of them and cut into
their shares, so the numbers of a run do not depend on how many there are, but for rounding and
dropout.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqkern.errors import UserError, require

KINDS = ("ddp", "fsdp")  # whole parameters in every process, or a share of them


class Parallel:
    """A process among those of a run; alone, if nothing started several."""

    def __init__(self) -> None:
        """Join the others, if `torchrun` started some."""
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self._ours = self.world > 1 and not dist.is_initialized()
        if self._ours:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend)

    def close(self) -> None:
        """Leave the others."""
        if self._ours:
            # Wrapped models hold on to process groups, in cycles. A group that dies with the
            # interpreter has threads that want its lock then, and the process ends by a signal.
            gc.collect()
            dist.destroy_process_group()
            gc.collect()
            self._ours = False

    def device(self, device: torch.device) -> torch.device:
        """The device of this process where `device` names only a kind of them."""
        if self.world > 1 and device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        return device

    # ------------------------------------------------------------------ the model

    def wrap(self, model: nn.Module, kind: str) -> nn.Module:
        """What to call instead of the model in training; for "fsdp", its parameters change."""
        if self.world == 1:
            return model
        if kind == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(next(model.parameters()).device.type, (self.world,))
        for blocks in model.children():
            if isinstance(blocks, nn.ModuleList):
                for block in blocks:
                    fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def accumulating(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """For a backward pass: gradients are exchanged in the `last` one of an update alone."""
        model: Any = getattr(wrapped, "_orig_mod", wrapped)  # of a compiled one
        if self.world > 1 and not isinstance(model, nn.parallel.DistributedDataParallel):
            model.set_requires_gradient_sync(last)
        elif self.world > 1 and not last:
            return model.no_sync()  # type: ignore[no-any-return]
        return nullcontext()

    # ------------------------------------------------------------------ the batch

    def check_batch(self, batch_size: int, accumulate: int) -> None:
        """Raise `UserError` unless a batch can be cut into equal parts."""
        parts = self.world * accumulate
        require(
            batch_size % parts == 0,
            f"batch_size must be a multiple of processes x accumulate = {self.world} x "
            f"{accumulate}, got {batch_size}",
        )

    def parts(
        self, inputs: Tensor, targets: Tensor, accumulate: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The process' share [B / world, T] of a batch, in `accumulate` parts."""
        mine = [x.chunk(self.world)[self.rank].chunk(accumulate) for x in (inputs, targets)]
        yield from zip(*mine, strict=True)

    # ------------------------------------------------------------------ agreement

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def largest(self, *values: int) -> tuple[int, ...]:
        """Of each value the largest that any process has."""
        if self.world == 1:
            return values
        given = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(given, dist.ReduceOp.MAX)
        return tuple(given.tolist())

    def first(self, function: Callable[[], str]) -> str:
        """What `function` returns in the first process, the only one that calls it.

        Raises:
            UserError: the first process' call did; all of them raise it.
        """
        if self.world == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        result: str = outcome[0]
        return result

    # ------------------------------------------------------------------ state

    def gathered(self, name: str, state: Tensor) -> dict[str, Tensor]:
        """The uint8 `state` of every process, as `name`, `name.1`, `name.2`, ..."""
        if self.world == 1:
            return {name: state}
        states = [torch.empty_like(state) for _ in range(self.world)]
        dist.all_gather(states, state)
        return {_ranked(name, rank): each for rank, each in enumerate(states)}

    def own(self, name: str, states: dict[str, Tensor]) -> Tensor | None:
        """The process' part of what `gathered` made, None where there were fewer processes."""
        return states.get(_ranked(name, self.rank))

    def seed(self, seed: int) -> int:
        """A seed for this process: the first one's is `seed`."""
        return (seed + self.rank * 0x9E3779B97F4A7C15) % 2**63


def _ranked(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of which each process may hold a share, whole; every process has to call it.

    Taken by name: the order of a dictionary that was read from a file may differ between processes.
    """
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in sorted(tensors.items())
    }


def as_shares(tensors: dict[str, Tensor], like: dict[str, Any]) -> dict[str, Tensor]:
    """Whole tensors as shares, where those of the same name in `like` are."""
    return {name: as_share(tensor, like.get(name)) for name, tensor in tensors.items()}


def as_share(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor as this process' share, where `like`, of the same shape, is one."""
    if not hasattr(like, "device_mesh") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole: none is sent, and their order does not matter.
    share: Tensor = distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
    return share
