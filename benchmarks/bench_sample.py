"""Drawing the next token of B rows of V logits by temperature, top-k and top-p."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.registry import (
    FORWARD,
    Benchmark,
    Case,
    Cost,
    Forward,
    Peer,
    Problem,
    Reference,
    need,
)

NAMES = ("temperature", "top_k", "top_p")


def make(case: Case, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> Problem:
    """Logits of standard deviation 3, and the options as tensors of one number."""
    logits = torch.randn(case["B"], case["V"], generator=rng, device=device).mul_(3).to(dtype)
    numbers = (case["temperature"] / 100, case["k"], case["p"] / 100)
    return Problem((logits, *(torch.tensor(x) for x in numbers)), wrt=())


def options_of(problem: Problem) -> dict[str, float]:
    """The options as numbers."""
    return {name: t.item() for name, t in zip(NAMES, problem.args[1:], strict=True)}


def reference(problem: Problem) -> Reference:
    """A token is wrong where the definition gives it no probability."""
    p = need("seqkern.reference").token_distribution(problem.args[0], **options_of(problem))

    def judge(outputs: tuple[Tensor, ...]) -> float:
        drawn = p.gather(1, outputs[0].reshape(-1, 1))
        return 0.0 if bool((drawn > 0).all()) else math.inf

    return Reference((), (), judge)


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """One read of the logits; an exp counts as one operation."""
    elements = case["B"] * case["V"]
    return Cost(bytes=elements * dtype.itemsize, flops=3 * elements)


def plain(problem: Problem) -> Forward:
    """Masks by a top-k and a sort, softmax, multinomial: what generation loops commonly do."""
    o = options_of(problem)

    def forward(logits: Tensor, *_: Tensor) -> Tensor:
        x = logits.float() / o["temperature"]
        if o["top_k"]:
            kth = torch.topk(x, int(o["top_k"]))[0][:, -1:]
            x = x.masked_fill(x < kth, -torch.inf)
        if o["top_p"] < 1:
            ranked, order = torch.sort(x, descending=True)
            p = ranked.softmax(-1)
            drop = p.cumsum(-1) - p >= o["top_p"]
            x = x.masked_fill(drop.scatter(1, order, drop), -torch.inf)
        return torch.multinomial(x.softmax(-1), 1)[:, 0]

    return forward


def transformers(problem: Problem) -> Forward:
    """Its logits processors as `generate` chains them, softmax, multinomial."""
    process = need("transformers.generation.logits_process")
    o = options_of(problem)
    steps = [process.TemperatureLogitsWarper(o["temperature"])] if o["temperature"] != 1 else []
    if o["top_k"]:
        steps.append(process.TopKLogitsWarper(int(o["top_k"])))
    if o["top_p"] < 1:
        steps.append(process.TopPLogitsWarper(o["top_p"]))
    chain = process.LogitsProcessorList(steps)

    def forward(logits: Tensor, *_: Tensor) -> Tensor:
        x = chain(None, logits.float())
        return torch.multinomial(x.softmax(-1), 1)[:, 0]

    return forward


def seqkern(problem: Problem) -> Forward:
    """Our op."""
    sample = need("seqkern.ops").sample
    o = options_of(problem)

    def forward(logits: Tensor, *_: Tensor) -> Tensor:
        tokens: Tensor = sample(logits, **o)[0]
        return tokens

    return forward


def case(B: int, V: int, k: int, p: int, temperature: int = 100) -> Case:
    """Top-p and temperature in percent."""
    return Case(B=B, V=V, k=k, p=p, temperature=temperature)


BENCHMARK = Benchmark(
    op="sample",
    axes="B x V x top-k x top-p (%) x temperature (%)",
    cases=(
        case(1, 128256, 50, 90, 80),
        case(1, 128256, 0, 95),
        case(1, 128256, 50, 100),
        case(1, 128256, 0, 100),
        case(16, 128256, 50, 90, 80),
        case(16, 32000, 0, 95),
        case(1, 50257, 0, 95),
        case(1, 65, 0, 95),
        case(64, 65, 10, 90, 80),
    ),
    quick=(case(1, 5000, 50, 90, 80), case(2, 5000, 0, 95)),
    cuda_cases=(case(64, 128256, 0, 95), case(128, 128256, 50, 90, 80)),
    make=make,
    reference=reference,
    cost=cost,
    modes=(FORWARD,),
    peers=(
        Peer("torch", plain),
        Peer("seqkern", seqkern),
        Peer("transformers", transformers),
    ),
)
