"""ops.vocab_parallel_linear_cross_entropy in 2 and 3 processes against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from seqkern import ops

N, H, V = 7, 5, 23
SPLITS = {2: [9, 14], 3: [10, 1, 12]}  # rows of the head on each rank
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1},
    "none": {"reduction": "none", "z_loss": 0.1},
    "weighted": {"class_weight": True, "label_smoothing": 0.2},
    "all": {"class_weight": True, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0},
    "outputs": {"return_lse": True, "return_logprobs": True, "softcap": 2.0},
    "bfloat16": {"dtype": torch.bfloat16},
    "all-ignored": {"ignore": True, "reduction": "sum"},
}


def make(options: dict[str, Any]) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    options = dict(options)
    dtype = options.pop("dtype", torch.float64)
    leaves = [torch.randn(s, generator=generator).to(dtype) for s in ((N, H), (V, H), (V,))]
    target = torch.randint(0, V, (N,), generator=generator)
    target[2] = -100
    if options.pop("ignore", False):
        target[:] = -100
    if options.get("class_weight"):
        options["class_weight"] = torch.rand(V, generator=generator, dtype=torch.float64) + 0.5
    return [leaf.requires_grad_() for leaf in leaves], target, options


def weigh(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """One number of all outputs, in which no two rows count the same."""
    outs = out if isinstance(out, tuple) else (out,)
    return sum(
        (o * torch.linspace(0.5, 1.5, max(1, o.numel()), dtype=o.dtype).reshape(o.shape)).sum()
        for o in outs
    )  # type: ignore[return-value]


def work(rank: int, world: int, folder: str) -> None:
    """What each process runs: every case, results to a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    begin, results = sum(SPLITS[world][:rank]), {}
    mine = slice(begin, begin + SPLITS[world][rank])
    for name, case in OPTIONS.items():
        (hidden, weight, bias), target, options = make(case)
        for known in (None, (begin, V)):
            loss = weigh(
                ops.vocab_parallel_linear_cross_entropy(
                    hidden, weight[mine], target, bias[mine], vocab_range=known, **options
                )
            )
            grads = torch.autograd.grad(loss, (hidden, weight, bias))
            results[name, known is None] = (loss.detach(), *grads)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=SPLITS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Each rank's results of all cases."""
    folder: Path = tmp_path_factory.mktemp(f"ranks{request.param}")
    mp.spawn(work, (request.param, str(folder)), nprocs=request.param)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("asks", [True, False], ids=["asks-the-ranks", "is-told"])
@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_agree_with_one_process(ranks: list[Any], name: str, asks: bool) -> None:
    (hidden, weight, bias), target, options = make(OPTIONS[name])
    loss = weigh(ops.linear_cross_entropy(hidden, weight, target, bias, **options))
    expected = torch.autograd.grad(loss, (hidden, weight, bias))
    tolerance = {"rtol": 1e-12, "atol": 1e-13}
    if hidden.dtype == torch.bfloat16:  # summed in another order before the last rounding
        tolerance = {"rtol": 2**-7, "atol": 1e-4}
    for rank in ranks:
        torch.testing.assert_close(rank[name, asks][0], loss.detach(), **tolerance)
        torch.testing.assert_close(rank[name, asks][1], expected[0], **tolerance)
    for part in (1, 2):  # a rank has the gradient of its own rows, zeros elsewhere
        whole = sum(rank[name, asks][1 + part] for rank in ranks)
        torch.testing.assert_close(whole, expected[part], **tolerance)


def test_rows_beyond_the_vocabulary_are_refused() -> None:
    hidden, weight, target = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"weight must be rows of \[0, 6\), got 4 from 3 on"):
        ops.vocab_parallel_linear_cross_entropy(hidden, weight, target, vocab_range=(3, 6))
