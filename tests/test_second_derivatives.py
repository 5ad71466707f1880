"""Second and third derivatives of every op and module, where what surrounds it depends on the
leaves as well: its inputs, and the gradient that comes back to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from every_op import MODULES, OPS, build, flat
from seqkern import nn, ops, reference
from seqkern.ops import _registry

DIFFERENTIABLE = [name for name, case in OPS.items() if case.gradients]


def loss_of(call: Callable[..., Any]) -> Callable[..., Tensor]:
    """A loss that bends the call's inputs and its results."""

    def loss(*leaves: Tensor) -> Tensor:
        bent = [x + 0.3 * x.sin() if x.is_floating_point() else x for x in leaves]
        return sum((r.square() + 0.1 * r**3).sum() for r in flat(call(*bent)))  # type: ignore[return-value]

    return loss


def derivatives(loss: Callable[..., Tensor], leaves: list[Tensor], orders: int = 3) -> list[Tensor]:
    """Those of the loss, of the square of the first, of the square of the second ..."""
    wanted = [x for x in leaves if x.requires_grad]
    value, found = loss(*leaves), []
    for order in range(1, orders + 1):
        grads = torch.autograd.grad(
            value, wanted, create_graph=order < orders, allow_unused=True, materialize_grads=True
        )
        found += grads
        value = sum(g.square().sum() for g in grads)  # type: ignore[assignment]
    return found


def assert_same(
    ours: Callable[..., Any], plain: Callable[..., Any], leaves: list[Tensor], orders: int = 3
) -> None:
    actual = derivatives(loss_of(ours), leaves, orders)
    expected = derivatives(loss_of(plain), leaves, orders)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.detach().abs().max()))


def doubles(name: str, device: str = "cpu") -> list[Tensor]:
    tensors = [t.to(device) for t in OPS[name].make(3)]
    return [t.double() if t.is_floating_point() else t for t in tensors]


def required(tensors: list[Tensor]) -> list[Tensor]:
    return [t.requires_grad_() if t.is_floating_point() else t for t in tensors]


# ---------------------------------------------------------------- every op


@pytest.mark.parametrize("orders", [2, 3])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_as_plain_pytorch(backend: Any, name: str, orders: int) -> None:
    """The last order without a graph of its own, the one before it with."""
    plain = OPS[name].plain
    assert plain is not None, f"{name} needs a plain form in every_op.py"
    assert_same(OPS[name].call, plain, required(doubles(name, backend.device)), orders)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_of_each_input_alone(name: str) -> None:
    """With the others frozen."""
    tensors = doubles(name)
    for i, tensor in enumerate(tensors):
        if tensor.is_floating_point():
            leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
            assert_same(OPS[name].call, OPS[name].plain, leaves)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_of_one_tensor_as_all_inputs_it_fits(name: str) -> None:
    """What is made of one leaf stands in several places of the call."""
    tensors = doubles(name)
    first = {tuple(t.shape): t for t in reversed(tensors) if t.is_floating_point()}
    leaves = required([t for t in tensors if t is first.get(tuple(t.shape), t)])

    def spread(call: Callable[..., Any]) -> Callable[..., Any]:
        def with_all(*bent: Tensor) -> Any:
            given = {tuple(x.shape): x for x in bent if x.is_floating_point()}
            classes = iter(x for x in bent if not x.is_floating_point())
            floats = (t.is_floating_point() for t in tensors)
            return call(
                *(
                    given[tuple(t.shape)] if floating else next(classes)
                    for t, floating in zip(tensors, floats, strict=True)
                )
            )

        return with_all

    assert_same(spread(OPS[name].call), spread(OPS[name].plain), leaves)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_again_and_with_hooks(name: str) -> None:
    """A graph kept gives the same again; a hook of an input is called once per pass with its
    whole gradient."""
    leaves = required(doubles(name))
    inputs = [t * 1 for t in leaves]
    seen: list[list[Tensor]] = [[] for _ in inputs]
    for t, found in zip(inputs, seen, strict=True):
        if t.requires_grad:
            t.register_hook(found.append)
    wanted = [t for t in leaves if t.requires_grad]
    value = loss_of(OPS[name].call)(*inputs)
    first = torch.autograd.grad(value, wanted, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    assert isinstance(penalty, Tensor)
    once = torch.autograd.grad(penalty, wanted, retain_graph=True)
    again = torch.autograd.grad(penalty, wanted)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    by_hooks = [found for t, found in zip(leaves, seen, strict=True) if t.requires_grad]
    for gradients, results in zip(zip(first, once, again, strict=True), by_hooks, strict=True):
        for gradient, result in zip(gradients, results, strict=True):
            torch.testing.assert_close(gradient, result)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_backward_into_grad(name: str) -> None:
    """A gradient penalty trained with `backward`, beside the loss itself."""

    def trained(call: Callable[..., Any]) -> list[Any]:
        leaves = required([t.detach().clone() for t in tensors])
        value = loss_of(call)(*leaves)
        wanted = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(value, wanted, create_graph=True)
        (value + sum(g.square().sum() for g in grads)).backward()
        return [t.grad for t in wanted]

    tensors = doubles(name)
    for a, b in zip(trained(OPS[name].call), trained(OPS[name].plain), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b)


def copied(t: Tensor) -> Tensor:
    """In a storage of its own, laid out as before: a BLAS may round by strides and alignment."""
    storage = t.untyped_storage().clone()
    return t.new_empty(0).set_(storage, t.storage_offset(), t.shape, t.stride())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_saved_tensor_hooks(name: str) -> None:
    """What is saved for the second derivative passes through them."""
    leaves = required(doubles(name))
    expected = derivatives(loss_of(OPS[name].call), leaves, 2)
    with torch.autograd.graph.saved_tensors_hooks(copied, lambda t: t):
        actual = derivatives(loss_of(OPS[name].call), leaves, 2)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_many_gradients_at_once(name: str, way: str) -> None:
    """The rows of a Jacobian in one pass, as a function that is differentiated again."""
    tensors = doubles(name)

    def of_rows(call: Callable[..., Any]) -> list[Tensor]:
        leaves = required([t.detach().clone() for t in tensors])
        result = flat(call(*[x.sin() if x.requires_grad else x for x in leaves]))[0].square()
        upstream = torch.eye(result.numel(), dtype=result.dtype).view(-1, *result.shape)
        wanted = [x for x in leaves if x.requires_grad]

        def rows_for(upstream: Tensor, **options: Any) -> tuple[Tensor, ...]:
            return torch.autograd.grad(result, wanted, upstream, create_graph=True, **options)

        if way == "vmap":
            rows = torch.func.vmap(rows_for)(upstream)
        else:
            rows = rows_for(upstream, is_grads_batched=True)
        penalty = sum(row.square().sum() for row in rows)
        return [*rows, *torch.autograd.grad(penalty, wanted)]  # type: ignore[arg-type]

    for a, b in zip(of_rows(OPS[name].call), of_rows(OPS[name].plain), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b)


RAW: dict[str, Callable[..., Any]] = {
    "cross_entropy": lambda raw, x, y: raw.cross_entropy(x, y, None, -100, 1, 0.1, 1e-3, 0, False)[
        0
    ],
    "softmax": lambda raw, x: raw.softmax(x, False),
    "gru": lambda raw, *tensors: raw.gru(*tensors, None, None, None, False, True)[:2],
    "rnn": lambda raw, *tensors: raw.rnn(*tensors, None, None, None, False, False),
}


@pytest.mark.parametrize("name", RAW)
def test_registered_ops(name: str) -> None:
    """Those who call `torch.ops.seqkern` themselves get the same."""

    def raw(*tensors: Tensor) -> Any:
        return RAW[name](_registry.active, *tensors)

    assert_same(raw, OPS[name].plain, required(doubles(name)))  # type: ignore[arg-type]


# ---------------------------------------------------------------- modules, and ops in a row


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    """By numbers: two of each, where the second can read what the first returns."""
    module, case = build(name)
    module.double()
    inputs = required(
        [t.double() if t.is_floating_point() else t for t in case.make(2)],
    )
    names = [key for key, p in module.named_parameters() if p.requires_grad][:2]
    weights = [module.get_parameter(key).detach().requires_grad_() for key in names]

    def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
        def call(*bent: Tensor) -> Any:
            given = dict(zip(names, bent[len(inputs) :], strict=True))
            result = torch.func.functional_call(module, given, bent[: len(inputs)])
            if flat(result)[0].shape != bent[0].shape:
                return result
            return torch.func.functional_call(module, given, flat(result)[0])

        wanted = [x for x in leaves if x.requires_grad]
        return torch.autograd.grad(loss_of(call)(*leaves), wanted, create_graph=True)

    assert torch.autograd.gradcheck(gradients, (*inputs, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(gradients, (*inputs, *weights), fast_mode=True)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers(kind: str) -> None:
    """Two layers, two directions."""
    ours = getattr(nn, kind)(3, 4, 2, bidirectional=True).double()
    theirs = getattr(torch.nn, kind)(3, 4, 2, bidirectional=True).double()
    names = [name for name, _ in ours.named_parameters()]
    leaves = required([torch.randn(4, 2, 3), *(p.detach() for p in ours.parameters())])
    leaves = required([t.detach().double() for t in leaves])

    def call(module: torch.nn.Module) -> Callable[..., Any]:
        def run(x: Tensor, *weights: Tensor) -> Any:
            given = dict(zip(names, weights, strict=True))
            return torch.func.functional_call(module, given, (x,))

        return run

    assert_same(call(ours), call(theirs), leaves)


def test_steps_of_a_cell() -> None:
    leaves = required(doubles("lstm_cell"))

    def three(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Any:
            for _ in range(3):
                h, c = step(x, h, c, *weights)
            return h, c

        return run

    case = OPS["lstm_cell"]
    assert case.plain is not None
    assert_same(three(case.call), three(case.plain), leaves)


def test_ops_after_one_another() -> None:
    """A GRU, attention over its output, and a loss of one row weighted by another's."""
    x, w_ih, w_hh = torch.randn(5, 2, 4), torch.randn(24, 4), torch.randn(24, 8)
    head, target = torch.randn(7, 8), torch.randint(0, 7, (2, 5))

    def chain(gru: Any, attention: Any, softmax: Any, loss: Any) -> Callable[..., Any]:
        def run(x: Tensor, w_ih: Tensor, w_hh: Tensor, head: Tensor) -> Any:
            h = gru(x, None, w_ih, w_hh)[0].transpose(0, 1)  # [2, 5, 8]
            h = h.unflatten(-1, (2, 4)).transpose(1, 2)
            h = attention(h, softmax(h), h).transpose(1, 2).flatten(2)
            rows = loss(h, head, target)
            return rows * rows.flip(1)

        return run

    def flat_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(h, w).flatten(0, 1)
        return F.cross_entropy(logits, y.flatten(), reduction="none").view(y.shape)

    ours = chain(
        ops.gru,
        ops.causal_attention,
        ops.softmax,
        lambda h, w, y: ops.linear_cross_entropy(h, w, y, reduction="none"),
    )
    plain = chain(
        reference.gru,
        lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True),
        lambda x: x.softmax(-1),
        flat_loss,
    )
    leaves = required([t.double() / 4 for t in (x, w_ih, w_hh, head)])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_same(ours, plain, leaves)


# ---------------------------------------------------------------- options of single ops


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_losses(reduction: str) -> None:
    """Log-sum-exp beside the loss, a row ignored, and by PyTorch's own."""
    x, w, b = torch.randn(4, 5), torch.randn(7, 5), torch.randn(7)
    target = torch.tensor([1, -100, 3, 6])
    leaves = required([t.double() for t in (x, w, b)])

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Any:
        logits = F.linear(x, w, b)
        return F.cross_entropy(logits, target, reduction=reduction), logits.logsumexp(-1)

    def composed(x: Tensor, w: Tensor, b: Tensor) -> Any:
        logits = F.linear(x, w, b)
        return ops.cross_entropy(logits, target, reduction=reduction, return_lse=True)

    def linear(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return ops.linear_cross_entropy(x, w, target, b, reduction=reduction, return_lse=True)

    assert_same(composed, plain, leaves)
    assert_same(linear, plain, leaves)


def test_class_probabilities_of_the_logits_themselves() -> None:
    """Both sides of a cross-entropy of one leaf."""
    leaves = required([torch.randn(3, 5).double()])
    assert_same(
        lambda x: ops.cross_entropy(x, x.sigmoid()),
        lambda x: F.cross_entropy(x, x.sigmoid()),
        leaves,
    )


def test_hessian() -> None:
    """The one that PyTorch makes itself, row after row of one graph."""
    x, target = torch.randn(3, 5).double(), torch.tensor([1, 0, 4])
    hessian: Any = torch.autograd.functional.hessian
    for loss in (lambda l: l**2, torch.exp):  # noqa: E741
        actual = hessian(lambda x, loss=loss: loss(ops.cross_entropy(x, target)), x)
        expected = hessian(lambda x, loss=loss: loss(F.cross_entropy(x, target)), x)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("frozen", [5, 6])
def test_one_bias_of_two(frozen: int) -> None:
    """Both have one gradient, which belongs to the one that wants it."""
    x, h, c = torch.randn(3, 2, 3), torch.randn(2, 4), torch.randn(2, 4)
    weights = torch.randn(16, 3), torch.randn(16, 4), torch.randn(16), torch.randn(16)
    leaves = required([t.double() for t in (x, h, c, *weights)])
    leaves[frozen].requires_grad_(False)
    assert_same(
        lambda x, h, c, *w: ops.lstm(x, (h, c), *w, return_cells=True)[2],
        lambda x, h, c, *w: reference.lstm(x, h, c, *w)[3],
        leaves,
    )
