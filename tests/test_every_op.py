"""Every op and module under torch.compile, torch.export, functional_call and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.export import Dim

from every_op import MODULES, NOT_COMPILED, NOT_MODULES, OPS, build, flat, heads, outcome
from seqkern import nn, ops

NAMES = [*OPS, *MODULES]
TRAINED = [*(name for name, case in OPS.items() if case.gradients), *MODULES]


def test_there_is_a_case_for_each() -> None:
    assert set(OPS) | NOT_COMPILED == set(ops.__all__)
    assert set(MODULES) | NOT_MODULES == set(nn.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_compile(name: str) -> None:
    """Forward and backward whole, with dynamic shapes: a third size needs no other graph."""
    module, case = build(name)
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    sizes = (10, 11, 13)  # of no other dimension: Dynamo takes equal ones for the same
    for n in sizes:
        compiled_before = len(graphs)
        tensors = case.make(n)
        for actual, expected in zip(
            outcome(compiled, module, tensors, case.gradients),
            outcome(module, module, tensors, case.gradients),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected)
    assert len(graphs) == compiled_before


@pytest.mark.parametrize("name", TRAINED)
def test_results_can_be_changed_in_place(name: str) -> None:
    """With gradients and without, by an operation and by detach_, as those of torch's own can."""
    module, case = build(name)
    ends_in_linear = name == "CausalSelfAttention"  # torch's result, which is a view
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for result in flat(module(*case.make(4))):
                result.mul_(2)
                if not ends_in_linear:
                    result.detach_()


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_share_no_memory(name: str) -> None:
    """What changes one in place (a hook, clipping) leaves the others."""
    module, case = build(name)
    tensors = [t.requires_grad_() if t.is_floating_point() else t for t in case.make(4)]
    inputs = [t for t in (*tensors, *module.parameters()) if t.requires_grad]
    results = [t.sum() for t in flat(module(*tensors)) if t.requires_grad]
    grads = torch.autograd.grad(sum(results), inputs, allow_unused=True)
    found = [t for t in grads if t is not None]
    before = [t.clone() for t in found]
    for t in found:
        t.mul_(2)
    for actual, expected in zip(found, before, strict=True):
        assert torch.equal(actual, 2 * expected)


@pytest.mark.parametrize("name", NAMES)
def test_export(name: str) -> None:
    """With one dynamic size; the program gives eager's result for another."""
    module, case = build(name)
    module.eval()
    dynamic = [{d: Dim(s, min=2, max=64) for d, s in sizes.items()} for sizes in case.sizes]
    signature: Any = (tuple(dynamic),) if name in OPS else tuple(dynamic)
    program = torch.export.export(module, tuple(case.make(5)), dynamic_shapes=signature)
    assert "seqkern" in str(program.graph)
    for n in (5, 9):
        tensors = case.make(n)
        results = flat(program.module()(*tensors))
        for actual, expected in zip(results, flat(module(*tensors)), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", MODULES)
def test_functional_call(name: str) -> None:
    """With other parameters and buffers, which get the gradients."""
    module, case = build(name)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    other = {key: torch.rand_like(value).requires_grad_() for key, value in own.items()}
    if "Loss" in name:  # class weights have no gradient
        other = {key: value.detach() for key, value in other.items()}
    tensors = case.make(4)
    before = flat(module(*tensors))
    results = flat(torch.func.functional_call(module, other, tuple(tensors)))
    loaded, _ = build(name)
    loaded.load_state_dict({key: value.detach() for key, value in other.items()})
    expected = flat(loaded(*tensors))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(results, before, strict=True))
    if any(t.requires_grad for t in other.values()):
        sum(r.square().sum() for r in results).backward()  # type: ignore[union-attr]
        sum(r.square().sum() for r in expected).backward()  # type: ignore[union-attr]
        for key, parameter in loaded.named_parameters():
            torch.testing.assert_close(other[key].grad, parameter.grad)
    assert all(p.grad is None for p in module.parameters())


# ---------------------------------------------------------------- mixed precision

#: Under autocast, ops that are GEMMs run in its dtype, as F.linear does. Losses stay float32, and
#: attention and the recurrent ops take what they are given, as torch.library's ops do.
SIXTEEN_BIT = {"LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "CausalSelfAttention"}
#: The state that these carry along has its own dtype on the CPU, as torch's has.
STATE_STAYS = {"GRU", "LSTMCell", "GRUCell"}


@pytest.mark.parametrize("name", TRAINED)
def test_autocast(backend: Any, name: str) -> None:
    """Results near float32's; gradients in the dtype of what they belong to."""
    module, case = build(name)
    module.to(backend.device)
    tensors = [t.to(backend.device) for t in case.make(4)]

    def cast(*inputs: Any) -> Any:
        with torch.autocast(backend.device, torch.bfloat16):
            return module(*inputs)

    results = outcome(cast, module, tensors)
    exact = outcome(module, module, tensors)
    count = len(flat(module(*tensors)))
    for i, (actual, expected) in enumerate(zip(results, exact, strict=True)):
        stays = backend.device == "cpu" and name in STATE_STAYS
        low = i < count and name in SIXTEEN_BIT and not stays
        assert actual.dtype == (torch.bfloat16 if low else torch.float32)
        scale = expected.detach().abs().max().item()
        torch.testing.assert_close(actual.float(), expected, atol=0.06 * scale, rtol=0.1)


SEVERAL = [
    *("causal_attention", "lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell"),
    "linear_cross_entropy",
]


@pytest.mark.parametrize("name", SEVERAL)
def test_autocast_of_several_dtypes(backend: Any, name: str) -> None:
    """Whichever tensor is in another dtype than the others: the op of all in autocast's."""
    module, case = build(name)
    tensors = [t.to(backend.device) for t in case.make(4)]
    numbers = [n for n, t in enumerate(tensors) if t.is_floating_point()]
    assert len(numbers) > 1
    low = [t.bfloat16() if t.is_floating_point() else t for t in tensors]
    expected = flat(module(*low))
    for n in numbers:
        mixed = [t if i == n else tensors[i] for i, t in enumerate(low)]
        with torch.autocast(backend.device, torch.bfloat16):
            results = flat(module(*mixed))
        for actual, wanted in zip(results, expected, strict=True):
            assert actual.dtype == wanted.dtype
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_of_new_tokens(backend: Any, cache_dtype: torch.dtype) -> None:
    """Their dtypes are autocast's and rotary embeddings', the cache's is the model's."""
    q, k, v = (t.to(backend.device) for t in heads(1))
    position = torch.zeros(2, dtype=torch.int64, device=backend.device)

    def step(q: Any, k: Any, v: Any) -> Any:
        caches = torch.zeros(2, 2, 2, 4, 8, dtype=cache_dtype, device=backend.device)
        return ops.attention_step(q, k, v, *caches, position), caches

    with torch.autocast(backend.device, torch.bfloat16):
        results = step(q, k, v.bfloat16())
    expected = step(*(t.to(cache_dtype) for t in (q, k, v.bfloat16())))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_gradient_scaler(backend: Any, name: str) -> None:
    """Scaled gradients of float16 activations are unscaled to the plain ones, and a step made."""
    head = torch.nn.Linear(3, {"CrossEntropyLoss": 7, "CausalSelfAttention": 16}.get(name, 5))
    module, case = build(name)
    both = torch.nn.ModuleList([head, module]).to(backend.device)
    optimizer = torch.optim.SGD(both.parameters(), 0.1)
    scaler = torch.amp.GradScaler(backend.device, init_scale=256.0)
    _, *others = (t.to(backend.device) for t in case.make(4))
    size = {"LSTM": (4, 3), "GRU": (4, 3), "RNN": (4, 3), "CausalSelfAttention": (2, 4)}
    x = torch.randn(*size.get(name, (4,)), 3, device=backend.device)

    def loss() -> torch.Tensor:
        return sum(r.float().mean() for r in flat(module(head(x), *others)))  # type: ignore[return-value]

    loss().backward()
    plain = {key: p.grad.clone() for key, p in both.named_parameters() if p.grad is not None}
    before = head.weight.detach().clone()
    optimizer.zero_grad()
    with torch.autocast(backend.device, torch.float16):
        scaled = loss()
    scaler.scale(scaled).backward()
    scaler.unscale_(optimizer)
    for key, parameter in both.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[key], atol=3e-3, rtol=0.05)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 256.0
    assert not torch.equal(head.weight, before)
