"""ops.linear_cross_entropy against PyTorch and the float64 reference, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seqkern
from accuracy import assert_accurate
from seqkern import _C, ops, reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 2), (1, 65, 17), (7, 1, 17), (7, 65, 2), (5, 3, 1031)]
LARGE = [(1000, 65, 17), (1000, 1, 2), (7, 65, 50257), (1, 1, 50257), (1000, 33, 4001)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "bias": True},
    "weighted": {"class_weight": True},
    "smoothing": {"label_smoothing": 0.1, "bias": True},
    "smoothing-weighted-none": {
        "label_smoothing": 0.3,
        "class_weight": True,
        "reduction": "none",
    },
    "z_loss": {"z_loss": 1e-2, "class_weight": True},
    "softcap": {"softcap": 3.0, "bias": True},
    "all": {
        "softcap": 2.0,
        "z_loss": 1e-2,
        "class_weight": True,
        "label_smoothing": 0.1,
        "bias": True,
    },
}
NAMES = ("hidden", "weight", "bias")


def make(
    N: int, H: int, V: int, dtype: torch.dtype, device: str, *, ignore: bool = True
) -> dict[str, Tensor]:
    """Inputs whose logits have a plausible spread; every third target is ignored."""
    target = torch.randint(0, V, (N,))
    if ignore and N > 1:
        target[::3] = -100
        target[-1] = V - 1
    tensors = {
        "hidden": torch.randn(N, H),
        "weight": 2 * torch.randn(V, H) / H**0.5,
        "bias": torch.randn(V),
        "target": target,
    }
    return {
        name: t.to(device) if name == "target" else t.to(device=device, dtype=dtype)
        for name, t in tensors.items()
    }


def resolve(inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """Options with tensors for the names that say so; the bias is the inputs' own."""
    V, device = inputs["weight"].shape[0], inputs["weight"].device
    options = {key: value for key, value in options.items() if key != "bias"}
    if options.get("class_weight"):
        options["class_weight"] = (torch.rand(V) + 0.5).to(device)
    return options


def plain(hidden: Tensor, weight: Tensor, target: Tensor, bias: Any = None, **options: Any) -> Any:
    """What a user of PyTorch writes, with our extensions from the reference."""
    return reference.linear_cross_entropy(hidden, weight, target, bias, **options)[0]


def run(function: Callable[..., Any], inputs: dict[str, Tensor], bias: bool, **options: Any) -> Any:
    """Loss and gradients under a fixed, uneven incoming gradient."""
    names = NAMES if bias else NAMES[:2]
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names}
    loss = function(
        leaves["hidden"], leaves["weight"], inputs["target"], leaves.get("bias"), **options
    )
    upstream = torch.linspace(0.5, 1.5, max(loss.numel(), 1), device=loss.device)
    loss.backward(upstream.reshape(loss.shape).to(loss.dtype))
    return loss.detach(), [leaves[name].grad for name in names]


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t if name == "target" else t.double() for name, t in inputs.items()}


def check_parity(
    backend: Any, dtype: torch.dtype, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    # Of one or two numbers PyTorch's error is a matter of luck: several draws are judged together.
    drawn = [
        losses_and_gradients(backend, dtype, shape, options)
        for _ in range(8 if shape[0] == 1 else 1)
    ]
    (loss, *grads), (torch_loss, *torch_grads), (exact_loss, *exact_grads) = (
        [torch.stack(results) for results in zip(*by_draw, strict=True)]
        for by_draw in zip(*drawn, strict=True)
    )
    acc = torch.promote_types(dtype, torch.float32)
    assert loss.dtype == acc
    assert_accurate(loss, torch_loss, exact_loss, acc)
    for ours, theirs, exact in zip(grads, torch_grads, exact_grads, strict=True):
        assert ours.dtype == dtype
        assert_accurate(ours, theirs, exact, dtype)


def losses_and_gradients(
    backend: Any, dtype: torch.dtype, shape: tuple[int, int, int], options: dict[str, Any]
) -> list[list[Tensor]]:
    """Ours, PyTorch's and the exact ones, of one draw."""
    inputs = make(*shape, dtype, backend.device)
    bias, options = options.get("bias", False), resolve(inputs, options)
    found = [
        run(ops.linear_cross_entropy, inputs, bias, **options),
        run(plain, inputs, bias, **options),
        run(plain, double(inputs), bias, **options),
    ]
    return [[loss, *grads] for loss, grads in found]


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(
    backend: Any, dtype: torch.dtype, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    check_parity(backend, dtype, shape, options)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "cuda"], indirect=True)
def test_large_shapes_match_torch(
    backend: Any, dtype: torch.dtype, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    check_parity(backend, dtype, shape, options)


EDGES = [(17, 33, 65), (33, 65, 17), (65, 17, 33), (1, 33, 1), (33, 1, 65), (64, 32, 64)]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", EDGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_edges_of_matrix_tiles(
    backend: Any, dtype: torch.dtype, shape: tuple[int, int, int], reduction: str
) -> None:
    check_parity(backend, dtype, shape, {"reduction": reduction, "bias": True})


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
def test_options_of_torch_are_torchs(backend: Any, reduction: str, bias: bool) -> None:
    inputs = make(7, 5, 11, torch.float64, backend.device)
    weight = torch.rand(11, dtype=torch.float64, device=backend.device)
    shared: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1, "ignore_index": 3}
    inputs["target"] = inputs["target"].clamp_min(0)

    def theirs(h: Tensor, w: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
        return F.cross_entropy(F.linear(h, w, b), t, weight, **shared)

    loss, grads = run(ops.linear_cross_entropy, inputs, bias, class_weight=weight, **shared)
    torch_loss, torch_grads = run(theirs, inputs, bias)
    torch.testing.assert_close(loss, torch_loss)
    torch.testing.assert_close(grads, torch_grads)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_class(backend: Any, options: dict[str, Any]) -> None:
    """Its probability is 1 whatever the logit: only z_loss has a gradient."""
    inputs = make(7, 5, 1, torch.float32, backend.device)
    bias, options = options.get("bias", False), resolve(inputs, options)
    actual = run(ops.linear_cross_entropy, inputs, bias, **options)
    torch.testing.assert_close(actual, run(plain, inputs, bias, **options), atol=1e-7, rtol=1e-5)


# ---------------------------------------------------------------- shapes, strides, target dtypes


@pytest.mark.parametrize("rows", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_leading_dimensions(backend: Any, rows: tuple[int, ...], reduction: str) -> None:
    hidden = torch.randn(*rows, 6, device=backend.device)
    weight = torch.randn(9, 6, device=backend.device)
    target = torch.randint(0, 9, rows, device=backend.device)
    options: dict[str, Any] = {"reduction": reduction}
    loss, grads = run(
        ops.linear_cross_entropy,
        {"hidden": hidden, "weight": weight, "target": target},
        False,
        **options,
    )
    torch_loss, torch_grads = run(
        plain, {"hidden": hidden, "weight": weight, "target": target}, False, **options
    )
    torch.testing.assert_close(loss, torch_loss)
    torch.testing.assert_close(grads, torch_grads)
    assert grads[0].shape == hidden.shape


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every-second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda x: torch.cat([x[:2], x])[2:],
    "columns": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_strides(
    backend: Any, view: Callable[[Tensor], Tensor], dtype: torch.dtype, reduction: str
) -> None:
    inputs = make(6, 4, 9, dtype, backend.device)
    expected = run(ops.linear_cross_entropy, inputs, True, reduction=reduction)

    def strided(h: Tensor, w: Tensor, t: Tensor, b: Tensor | None, **options: Any) -> Any:
        h, w = view(h), view(w)
        return ops.linear_cross_entropy(h, w, t.repeat(2)[: len(t)], b, **options)

    loss, grads = run(strided, inputs, True, reduction=reduction)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grads, expected[1])


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides_of_whole_tiles(backend: Any, view: Callable[[Tensor], Tensor]) -> None:
    """Full tiles are read otherwise than the edges, in each order of the strides."""
    inputs = make(50, 70, 65, torch.bfloat16, backend.device)

    def strided(h: Tensor, w: Tensor, t: Tensor, b: Tensor | None) -> Any:
        return ops.linear_cross_entropy(view(h), view(w), t, b)

    expected = run(ops.linear_cross_entropy, inputs, True)
    torch.testing.assert_close(run(strided, inputs, True), expected)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("shape", [(600, 64, 9000), (1100, 64, 5000)], ids=str)
def test_bits_do_not_depend_on_threads_in_bfloat16(
    backend: Any, shape: tuple[int, int, int]
) -> None:
    """Where products are torch's, as on CPUs that do not multiply bf16, that is up to its BLAS."""
    if _C.cpu_isa() not in ("avx512_bf16", "amx"):
        pytest.skip("this CPU does not multiply bf16")
    inputs = make(*shape, torch.bfloat16, backend.device)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            results.append(run(ops.linear_cross_entropy, inputs, True))
    finally:
        torch.set_num_threads(threads)
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64], ids=str)
def test_integer_targets(backend: Any, dtype: torch.dtype) -> None:
    inputs = make(6, 4, 40, torch.float32, backend.device, ignore=False)
    arguments = (inputs["hidden"], inputs["weight"])
    expected = plain(*arguments, inputs["target"])
    torch.testing.assert_close(
        ops.linear_cross_entropy(*arguments, inputs["target"].to(dtype)), expected
    )


# ---------------------------------------------------------------- ignored rows, special values


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [0, 4])
def test_no_row_counts(backend: Any, rows: int, reduction: str) -> None:
    hidden = torch.randn(rows, 3, device=backend.device, requires_grad=True)
    weight = torch.randn(6, 3, device=backend.device, requires_grad=True)
    target = torch.full((rows,), -100, device=backend.device)
    loss = ops.linear_cross_entropy(hidden, weight, target, reduction=reduction)
    expected = F.cross_entropy(F.linear(hidden, weight), target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.shape == hidden.shape
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_ignored_rows_are_not_read(backend: Any) -> None:
    inputs = make(7, 4, 9, torch.float32, backend.device)
    expected = run(ops.linear_cross_entropy, inputs, True)
    ignored = inputs["target"] == -100
    inputs["hidden"] = torch.where(ignored[:, None], 1e30, inputs["hidden"])
    loss, grads = run(ops.linear_cross_entropy, inputs, True)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grads, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.999, 0.9999])
def test_gradient_where_the_model_is_sure(backend: Any, dtype: torch.dtype, p: float) -> None:
    """p - 1 of the true class: with logits rounded to 16 bits its error would be percents."""
    V, H, y = 100, 8, 7
    hidden = torch.randn(1, H).to(dtype)
    weight = (0.01 * torch.randn(V, H)).to(dtype)
    wanted = torch.logit(torch.tensor(p)) + torch.log(torch.tensor(V - 1.0))
    direction = hidden[0] / hidden[0].float().square().sum()
    weight[y] = (wanted * direction.float()).to(dtype)
    inputs = {"hidden": hidden, "weight": weight, "target": torch.tensor([y])}
    inputs = {name: t.to(backend.device) for name, t in inputs.items()}
    _, (_, dweight) = run(ops.linear_cross_entropy, inputs, False)
    _, (_, exact) = run(plain, double(inputs), False)
    relative = (dweight[y].double() - exact[y]).abs().max() / exact[y].abs().max()
    assert relative < 0.005


def test_nan_reaches_the_loss(backend: Any) -> None:
    inputs = make(4, 3, 7, torch.float32, backend.device, ignore=False)
    inputs["hidden"][2, 1] = torch.nan
    loss = ops.linear_cross_entropy(
        inputs["hidden"], inputs["weight"], inputs["target"], reduction="none"
    )
    assert loss.isnan().tolist() == [False, False, True, False]


def test_a_bias_of_minus_infinity_masks_a_class(backend: Any) -> None:
    inputs = make(4, 3, 700, torch.float32, backend.device, ignore=False)
    inputs["bias"][5:650] = -torch.inf
    inputs["target"] = torch.tensor([0, 699, 3, 660], device=backend.device)
    loss, grads = run(ops.linear_cross_entropy, inputs, True)
    torch_loss, torch_grads = run(plain, inputs, True)
    torch.testing.assert_close(loss, torch_loss)
    torch.testing.assert_close(grads, torch_grads)


# ---------------------------------------------------------------- lse and log-probabilities


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=str)
def test_lse_and_logprobs_and_their_gradients(
    backend: Any, wanted: tuple[bool, bool], reduction: str, softcap: float
) -> None:
    inputs = make(6, 5, 70, torch.float64, backend.device)
    factors = torch.randn(2, 6, dtype=torch.float64).to(backend.device)
    used = [factor for factor, want in zip(factors, wanted, strict=True) if want]
    options: dict[str, Any] = {"reduction": reduction, "softcap": softcap, "label_smoothing": 0.1}

    def weigh(loss: Tensor, *rest: Tensor) -> Tensor:
        return loss.sum() + sum((f * out).sum() for f, out in zip(used, rest, strict=True))

    def ours(h: Tensor, w: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
        flags = {"return_lse": wanted[0], "return_logprobs": wanted[1]}
        return weigh(*ops.linear_cross_entropy(h, w, t, b, **flags, **options))

    def theirs(h: Tensor, w: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
        loss, *rest = reference.linear_cross_entropy(h, w, t, b, **options)
        return weigh(loss, *(out for out, want in zip(rest, wanted, strict=True) if want))

    torch.testing.assert_close(run(ours, inputs, True), run(theirs, inputs, True))


def test_logprobs_alone(backend: Any) -> None:
    inputs = make(6, 5, 11, torch.float64, backend.device)

    def ours(h: Tensor, w: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
        return ops.linear_cross_entropy(h, w, t, b, return_logprobs=True)[1].exp()

    def theirs(h: Tensor, w: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
        return reference.linear_cross_entropy(h, w, t, b)[2].exp()

    torch.testing.assert_close(run(ours, inputs, True), run(theirs, inputs, True))


# ---------------------------------------------------------------- module


def test_module(backend: Any) -> None:
    inputs = make(6, 5, 9, torch.float32, backend.device)
    weight = torch.rand(9, device=backend.device) + 0.5
    module = seqkern.nn.LinearCrossEntropyLoss(
        weight, label_smoothing=0.1, z_loss=0.1, softcap=2.0, reduction="sum"
    )
    expected = ops.linear_cross_entropy(
        inputs["hidden"],
        inputs["weight"],
        inputs["target"],
        inputs["bias"],
        class_weight=weight,
        label_smoothing=0.1,
        z_loss=0.1,
        softcap=2.0,
        reduction="sum",
    )
    head = (inputs["hidden"], inputs["weight"], inputs["target"], inputs["bias"])
    assert torch.equal(module(*head), expected)
    assert module.state_dict().keys() == torch.nn.CrossEntropyLoss(weight).state_dict().keys()
    assert repr(module) == "LinearCrossEntropyLoss(z_loss=0.1, softcap=2.0)"
