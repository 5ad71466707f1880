"""ops.causal_attention under autograd, opcheck, torch.compile and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from ops.attention_cases import BACKENDS, DTYPES, OPTIONS, Sizes, make, ours, resolve, run
from seqkern import ops, reference

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)

TINY = Sizes(B=2, NH=2, NKV=1, Tq=3, Tk=4, D=3)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(backend: Any, options: dict[str, Any]) -> None:
    options = resolve(options, TINY, backend.device)
    if "lengths" in options:
        options["lengths"] = torch.tensor([4, 3], device=backend.device)
    qkv = [t.requires_grad_() for t in make(TINY, torch.float64, backend.device)]
    seen = lambda lse: lse.clamp_min(-1e3)  # noqa: E731 - no differences of minus infinities

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ours(q, k, v, **options)
        return out, seen(lse)

    assert torch.autograd.gradcheck(function, qkv)
    assert torch.autograd.gradgradcheck(function, qkv)


def test_gradgradcheck_packed(backend: Any) -> None:
    sizes = Sizes(B=1, NH=2, NKV=1, Tq=5, Tk=5, D=2)
    qkv = [t.requires_grad_() for t in make(sizes, torch.float64, backend.device)]
    options = resolve({"cu_seqlens": [0, 2, 5]}, sizes, backend.device)
    function = lambda q, k, v: ours(q, k, v, **options)  # noqa: E731
    assert torch.autograd.gradcheck(function, qkv)
    assert torch.autograd.gradgradcheck(function, qkv)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_some_gradients_alone(backend: Any, wanted: tuple[int, ...]) -> None:
    qkv = make(Sizes(), torch.float32, backend.device)
    *_, dq, dk, dv = run(ours, qkv)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(qkv)]
    result = run_upstream(ours(*leaves), [leaves[i] for i in wanted])
    for grad, i in zip(result, wanted, strict=True):
        assert torch.equal(grad, (dq, dk, dv)[i])


def run_upstream(outputs: tuple[Tensor, Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    from ops.attention_cases import _upstream

    return torch.autograd.grad(outputs, leaves, [_upstream(o) for o in outputs])


@pytest.mark.parametrize("part", [0, 1])
def test_one_output_alone(backend: Any, part: int) -> None:
    qkv = [t.requires_grad_() for t in make(Sizes(), torch.float64, backend.device)]
    actual = torch.autograd.grad(ours(*qkv)[part].square().sum(), qkv)
    expected = torch.autograd.grad(
        reference.causal_attention(*qkv)[part].square().sum(), qkv, materialize_grads=True
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_opcheck(backend: Any, dtype: torch.dtype, options: str) -> None:
    sizes = Sizes(B=2, NH=2, NKV=1, Tq=3, Tk=5, D=4)
    q, k, v = make(sizes, dtype, backend.device)
    given = resolve(OPTIONS[options], sizes, backend.device)
    if "lengths" in given:  # -inf differs from itself by NaN, which opcheck calls a difference
        given["lengths"] = torch.tensor([5, 5], device=backend.device)
    names = ("lengths", "cu_seqlens", "alibi_slopes", "dropout_seed")
    rest = (
        *(given.get(name) for name in names),
        0.5,
        given.get("window", 0),
        given.get("softcap", 0.0),
        given.get("dropout_p", 0.0),
    )
    raw: Any = backend.ops
    opcheck(raw.attention_forward.default, (q, k, v, *rest))
    out, lse = raw.attention_forward(q, k, v, *rest)
    grads = (torch.ones_like(out), torch.ones_like(lse))
    opcheck(raw.attention_backward.default, (*grads, q, k, v, out, lse, *rest))
    qkv = [t.requires_grad_() for t in (q, k, v)]
    opcheck(raw.attention.default, (*qkv, *rest))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_compile_fullgraph(backend: Any, dynamic: bool, dropout_p: float) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ops.causal_attention(2 * q, k, v, window=7, dropout_p=dropout_p)
        return out.transpose(1, 2).flatten(2) * 3

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (9, 12):
        qkv = make(Sizes(Tq=T, Tk=T, NKV=1), torch.float32, backend.device)
        torch.manual_seed(1)
        actual = run(compiled, qkv)
        torch.manual_seed(1)
        expected = run(step, qkv)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


def test_autocast(backend: Any) -> None:
    """q, k, v of an autocast linear layer are bfloat16, and so is the output."""
    layer = torch.nn.Linear(8, 24, device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        qkv = layer(torch.randn(2, 9, 8, device=backend.device))
        q, k, v = qkv.view(2, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)  # [B, NH, T, D]
        out = ops.causal_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_inputs_changed_before_backward(backend: Any, changed: int) -> None:
    leaves = [t.requires_grad_() for t in make(Sizes(), torch.float32, backend.device)]
    qkv = [t * 1 for t in leaves]
    out = ops.causal_attention(*qkv)
    with torch.no_grad():
        qkv[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
