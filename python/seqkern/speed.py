"""A model's training speed with seqkern's layers beside PyTorch's."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqkern.data import BlockSampler
from seqkern.models import build_model
from seqkern.models.backends import BACKENDS
from seqkern.optimizer import make_optimizer


@dataclass(frozen=True)
class Comparison:
    """What `compare_backends` measured."""

    tokens_per_second: dict[str, float]  # median over the rounds, per backend
    largest_loss_difference: float  # over all steps, in nats
    steps: int  # that each backend made, warm-up included


def compare_backends(
    name: str,
    sizes: dict[str, Any],
    tokens: Tensor,
    *,
    context: int,
    batch_size: int,
    rounds: int,
    steps_per_round: int,
    lr: float,
    clip: float,
    seed: int,
    device: torch.device,
    max_seconds: float,
) -> Comparison:
    """Train the same model from the same seed on the same batches with every backend.

    The backends take turns, a round each, so that a machine that slows down slows both. The first
    round of each is warm-up: its losses count, its time does not.

    Args:
        name: the model, as `build_model` takes it.
        sizes: its sizes.
        tokens: int64 [N], the text.
        context: T.
        batch_size: B.
        rounds: timed rounds per backend, at most.
        steps_per_round: updates per round.
        lr: constant learning rate.
        clip: gradient clipping.
        seed: of the parameters and the batches.
        device: where to train.
        max_seconds: no new round after this time; one timed round per backend is always made.
    """
    began = time.perf_counter()
    runs = {}
    for backend in BACKENDS:
        torch.manual_seed(seed)
        model = build_model(name, sizes, backend).to(device)
        optimizer = make_optimizer(model, lr, weight_decay=0.0)
        runs[backend] = (model, optimizer, BlockSampler(tokens, context, batch_size, seed))
    losses: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    seconds: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for round_number in range(rounds + 1):
        if round_number > 1 and time.perf_counter() - began > max_seconds:
            break
        for backend, (model, optimizer, sampler) in runs.items():
            round_losses = []
            started = time.perf_counter()
            for _ in range(steps_per_round):
                inputs, targets = (x.to(device) for x in sampler.draw())
                _, loss = model(inputs, targets)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                round_losses.append(loss.detach())
            losses[backend] += torch.stack(round_losses).tolist()  # waits for the device
            if round_number:
                seconds[backend].append(time.perf_counter() - started)
    per_round = steps_per_round * batch_size * context
    ours, theirs = (losses[backend] for backend in ("seqkern", "torch"))
    return Comparison(
        {backend: per_round / statistics.median(times) for backend, times in seconds.items()},
        max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
        len(ours),
    )


@dataclass(frozen=True)
class ThreadChoice:
    """How many CPU threads to use, and the seconds a step took with each number tried."""

    threads: int
    seconds: dict[int, float]


def choose_threads(step: Callable[[], object], available: int) -> ThreadChoice:
    """One thread or all, whichever makes `step` faster here and now.

    OpenMP threads spin while they wait for each other. Where another program holds one of the
    CPUs, a recurrent layer's many short parallel regions then take tens of times as long with all
    threads as with one.

    Args:
        step: what to time; called twice per number of threads, the faster call counts.
        available: the number of all threads.
    """
    seconds = {}
    for threads in sorted({1, available}):
        torch.set_num_threads(threads)
        calls = []
        for _ in range(2):
            started = time.perf_counter()
            step()
            calls.append(time.perf_counter() - started)
        seconds[threads] = min(calls)
    torch.set_num_threads(available)
    return ThreadChoice(min(seconds, key=lambda threads: seconds[threads]), seconds)
