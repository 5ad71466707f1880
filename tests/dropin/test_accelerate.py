"""`seqkern.accelerate`: what ours takes agrees with torch, what it does not take is torch's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import seqkern
from seqkern.dropin import conditions
from seqkern.dropin.counts import Counts, counting, table

ATTENTION = "torch.nn.functional.scaled_dot_product_attention"
CROSS_ENTROPY = "torch.nn.functional.cross_entropy"
LINEAR = "torch.nn.functional.linear_cross_entropy"
LSTM, CELL = "torch.nn.LSTM", "torch.nn.LSTMCell"


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in flat(part)]


def outcome(call: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Results and gradients by the floating point tensors."""
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    results = flat(call(*inputs))
    wanted = [t for t in inputs if t.requires_grad]
    if not any(r.requires_grad for r in results):
        return results
    total = sum(r.double().square().sum() for r in results if r.requires_grad)
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    return [*results, *flat(grads)]


def both(call: Callable[..., Any], *tensors: Tensor) -> tuple[list[Tensor], list[Tensor], Counts]:
    """Ours and torch's outcome, and what was counted."""
    theirs = outcome(call, list(tensors))
    with counting() as counts, seqkern.accelerate():
        ours = outcome(call, list(tensors))
    return ours, theirs, counts


def randn(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, dtype=dtype)


@pytest.fixture(autouse=True)
def _twenty_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in conditions.LARGE_SOFTMAX:
        monkeypatch.setitem(conditions.LARGE_SOFTMAX, name, 20)


CLASSES = torch.tensor([1, 2, -100, 4])


def lstm(x: Tensor, *hx: Tensor, **options: Any) -> Any:
    torch.manual_seed(1)
    return torch.nn.LSTM(5, 7, dtype=x.dtype, **options)(x, hx or None)


def packed(x: Tensor) -> Any:
    torch.manual_seed(1)
    sequence = pack_padded_sequence(x, torch.tensor([3, 1]))
    return torch.nn.LSTM(5, 7, dtype=x.dtype)(sequence)[0].data


def cell(x: Tensor, *hx: Tensor) -> Any:
    torch.manual_seed(1)
    return torch.nn.LSTMCell(5, 7, dtype=x.dtype)(x, hx or None)


def hidden(kind: str, x: Tensor, h: Tensor) -> Any:
    torch.manual_seed(1)
    return getattr(torch.nn, kind)(5, 7, 2, dtype=x.dtype)(x, h)


def attention(*qkv: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(*qkv, is_causal=True, **options)


TAKEN: dict[str, tuple[str, Callable[..., Any], list[Tensor]]] = {
    "cross-entropy": (CROSS_ENTROPY, lambda x: F.cross_entropy(x, CLASSES), [randn(4, 9)]),
    "cross-entropy-options": (
        CROSS_ENTROPY,
        lambda x: F.cross_entropy(
            x, CLASSES, torch.arange(9).to(x.dtype), reduction="sum", label_smoothing=0.1
        ),
        [randn(4, 9)],
    ),
    "cross-entropy-sequences": (
        CROSS_ENTROPY,
        lambda x: F.cross_entropy(x, CLASSES.view(2, 2), reduction="none"),
        [randn(2, 9, 2)],
    ),
    "cross-entropy-probabilities": (
        CROSS_ENTROPY,
        lambda x, y: F.cross_entropy(x, y.abs() / y.abs().sum(-1, True)),
        [randn(4, 9), randn(4, 9)],
    ),
    "cross-entropy-one-row": (CROSS_ENTROPY, lambda x: F.cross_entropy(x, CLASSES[0]), [randn(9)]),
    "cross-entropy-module": (
        CROSS_ENTROPY,
        lambda x: torch.nn.CrossEntropyLoss()(x, CLASSES),
        [randn(4, 9)],
    ),
    "attention": (ATTENTION, attention, [randn(2, 4, 6, 8) for _ in range(3)]),
    "attention-scale": (
        ATTENTION,
        lambda *qkv: attention(*qkv, scale=0.3),
        [randn(2, 4, 6, 8) for _ in range(3)],
    ),
    "attention-gqa": (
        ATTENTION,
        lambda *qkv: attention(*qkv, enable_gqa=True),
        [randn(2, 4, 6, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 8)],
    ),
    "linear": (
        LINEAR,
        lambda x, w: F.linear_cross_entropy(x, w, CLASSES, label_smoothing=0.1),
        [randn(4, 5), randn(9, 5)],
    ),
    "linear-bias": (
        LINEAR,
        lambda x, w, b: F.linear_cross_entropy(x, w, CLASSES, linear_bias=b),
        [randn(4, 5), randn(9, 5), randn(9)],
    ),
    "softmax": ("torch.softmax", lambda x: torch.softmax(x, -1), [randn(3, 9)]),
    "softmax-method": ("torch.Tensor.softmax", lambda x: x.softmax(dim=1), [randn(3, 9)]),
    "softmax-functional": ("torch.Tensor.softmax", lambda x: F.softmax(x, -1), [randn(3, 9)]),
    "log-softmax": (
        "torch.Tensor.log_softmax",
        lambda x: torch.nn.LogSoftmax(-1)(x),
        [randn(3, 9)],
    ),
    "lstm": (LSTM, lstm, [randn(3, 2, 5)]),
    "lstm-state": (LSTM, lstm, [randn(3, 2, 5), randn(1, 2, 7), randn(1, 2, 7)]),
    "lstm-projected": (
        LSTM,
        lambda x, *hx: lstm(x, *hx, proj_size=3, bidirectional=True, batch_first=True),
        [randn(2, 3, 5), randn(2, 2, 3), randn(2, 2, 7)],
    ),
    "lstm-unbatched": (LSTM, lambda x: lstm(x, num_layers=2, bias=False), [randn(3, 5)]),
    "lstm-packed": (LSTM, packed, [randn(3, 2, 5)]),
    "cell": (CELL, cell, [randn(2, 5), randn(2, 7), randn(2, 7)]),
    "cell-unbatched": (CELL, cell, [randn(5)]),
}
for kin in ("GRU", "RNN"):
    if hasattr(seqkern.nn, kin):
        TAKEN[kin.lower()] = (
            f"torch.nn.{kin}",
            lambda x, h, kin=kin: hidden(kin, x, h),
            [randn(3, 2, 5), randn(2, 2, 7)],
        )
if not hasattr(F, "linear_cross_entropy"):
    TAKEN = {name: case for name, case in TAKEN.items() if case[0] != LINEAR}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("function", "call", "tensors"), TAKEN.values(), ids=TAKEN)
def test_ours_takes_it_and_agrees(
    function: str, call: Callable[..., Any], tensors: list[Tensor], dtype: torch.dtype
) -> None:
    ours, theirs, counts = both(call, *(torch.randn_like(t).to(dtype) for t in tensors))
    assert counts[function, ""] == 1
    assert not any(reason for _, reason in counts)  # a gradient of ours may call a softmax
    for actual, expected in zip(ours, theirs, strict=True):
        # Of the largest element: both round, and some elements are small differences.
        scale = expected.abs().max().item()
        atol = 8 * torch.finfo(dtype).eps * scale
        torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


LEFT: dict[str, tuple[str, str, Callable[..., Any], list[Tensor]]] = {
    "mask": (
        ATTENTION,
        "an attention mask",
        lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=torch.ones(6, 6).tril().bool()),
        [randn(2, 4, 6, 8) for _ in range(3)],
    ),
    "not-causal": (
        ATTENTION,
        "not causal",
        F.scaled_dot_product_attention,
        [randn(2, 4, 6, 8) for _ in range(3)],
    ),
    "top-left": (
        ATTENTION,
        "another number of keys than queries",
        attention,
        [randn(2, 4, 3, 8), randn(2, 4, 6, 8), randn(2, 4, 6, 8)],
    ),
    "three-dimensions": (ATTENTION, "not 4 dimensions", attention, [randn(2, 6, 8)] * 3),
    "wide": (
        ATTENTION,
        "heads wider than 256, or of different widths",
        attention,
        [randn(1, 1, 2, 257)] * 3,
    ),
    "broadcast-heads": (
        ATTENTION,
        "arguments that do not fit",
        attention,
        [randn(2, 4, 6, 8), randn(2, 1, 6, 8), randn(2, 1, 6, 8)],
    ),
    "reduce": (
        CROSS_ENTROPY,
        "the deprecated size_average or reduce",
        lambda x: F.cross_entropy(x, CLASSES, reduce=False),
        [randn(4, 9)],
    ),
    "no-rows": (
        CROSS_ENTROPY,
        "nothing in it",
        lambda x: F.cross_entropy(x, CLASSES[:0], reduction="sum"),
        [randn(0, 9)],
    ),
    "class-weights": (
        CROSS_ENTROPY,
        "gradient of the class weights",
        lambda x, p, w: F.cross_entropy(x, p, w),
        [randn(4, 9), randn(4, 9).softmax(-1), randn(9)],
    ),
    "softmax-dimension": (
        "torch.Tensor.softmax",
        "another dimension than the last",
        lambda x: F.softmax(x, 0),
        [randn(3, 9)],
    ),
    "softmax-dtype": (
        "torch.Tensor.log_softmax",
        "another dtype asked for",
        lambda x: F.log_softmax(x, -1, dtype=torch.float32),
        [randn(3, 9)],
    ),
    "softmax-small": (
        "torch.softmax",
        "fewer than 20 elements, where torch's is faster",
        lambda x: torch.softmax(x, -1),
        [randn(3, 4)],
    ),
    "kept-weights": (
        LSTM,
        "weights that are not the module's attributes",
        lambda x: exchanged()(x),
        [randn(3, 2, 5)],
    ),
}


def exchanged() -> torch.nn.LSTM:
    torch.manual_seed(1)
    module = torch.nn.LSTM(5, 7, dtype=torch.float64)
    module._flat_weights = [w.detach() * 2 for w in module._flat_weights]
    return module


@pytest.mark.filterwarnings("ignore:size_average:UserWarning")
@pytest.mark.parametrize(("function", "reason", "call", "tensors"), LEFT.values(), ids=LEFT)
def test_torch_takes_it_exactly(
    function: str, reason: str, call: Callable[..., Any], tensors: list[Tensor]
) -> None:
    if call is F.scaled_dot_product_attention:  # looked up when called

        def call(*qkv: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*qkv)

    ours, theirs, counts = both(call, *tensors)
    assert counts == {(function, reason): 1}
    for actual, expected in zip(ours, theirs, strict=True):
        assert torch.equal(actual, expected)


WRONG: dict[str, Callable[[], Any]] = {
    "target-shape": lambda: F.cross_entropy(randn(4, 9), CLASSES[:3]),
    "target-dtype": lambda: F.cross_entropy(randn(4, 9), CLASSES.int()),
    "no-target": lambda: F.cross_entropy(randn(4, 9)),  # type: ignore[call-arg]
    "smoothing": lambda: F.cross_entropy(randn(4, 9), CLASSES, label_smoothing=2.0),
    "reduction": lambda: F.cross_entropy(randn(4, 9), CLASSES, reduction="avg"),
    "integers": lambda: F.cross_entropy(CLASSES[None], CLASSES[:1]),
    "dtypes": lambda: attention(randn(1, 1, 2, 4), randn(1, 1, 2, 4).float(), randn(1, 1, 2, 4)),
    "widths": lambda: attention(randn(1, 1, 2, 4), randn(1, 1, 2, 3), randn(1, 1, 2, 4)),
    "lstm-width": lambda: lstm(randn(3, 2, 6)),
    "lstm-state": lambda: lstm(randn(3, 2, 5), randn(1, 2, 7)),
    "lstm-dtype": lambda: torch.nn.LSTM(5, 7)(randn(3, 2, 5)),
    "cell-width": lambda: cell(randn(2, 4)),
    "cell-state": lambda: cell(randn(2, 5), randn(3, 7), randn(3, 7)),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_mistakes_are_torchs(call: Callable[[], Any]) -> None:
    def error() -> tuple[type[BaseException], str]:
        with pytest.raises(Exception) as caught:  # noqa: PT011 (both are compared)
            call()
        return caught.type, str(caught.value)

    plain = error()
    with seqkern.accelerate():
        assert error() == plain


def loss(x: Tensor) -> Tensor:
    return F.cross_entropy(x, CLASSES)


def test_function_transforms_get_torchs() -> None:
    x = randn(4, 9)
    with counting() as counts, seqkern.accelerate():
        grad = torch.func.grad(loss)(x)
        torch.func.vmap(F.cross_entropy)(x, torch.tensor([1, 2, 3, 4]))
        torch.func.jvp(loss, (x,), (x,))
    assert counts == {(CROSS_ENTROPY, "inside a torch.func transform"): 3}
    torch.testing.assert_close(grad, outcome(loss, [x])[1] / (2 * loss(x)))


def test_forward_mode_gets_torchs() -> None:
    with counting() as counts, seqkern.accelerate(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(randn(4, 9), randn(4, 9))
        assert torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent is not None
    assert counts == {(CROSS_ENTROPY, "forward-mode differentiation"): 1}


def test_tensor_subclasses_get_torchs() -> None:
    seen: list[Any] = []

    class Mine(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(func)
            return super().__torch_function__(func, *args, **kwargs)

    x = randn(4, 9).as_subclass(Mine)
    with counting() as counts, seqkern.accelerate():
        assert type(loss(x)) is Mine
    assert counts == {(CROSS_ENTROPY, "a tensor subclass, Mine"): 1}
    assert seen.count(F.cross_entropy) == 1  # torch's own, which it may have a table by


class Net(torch.nn.Module):
    """An LSTM and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(5, 9)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(x)[0][-1]
        return F.cross_entropy(y, y.argmin(-1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_tracing_and_exporting_get_torchs() -> None:
    net, x = Net(), torch.randn(3, 4, 5)
    plain = net(x)
    with seqkern.accelerate():
        scripted = torch.jit.script(net)
        traced = torch.jit.trace(net, (x,))
        exported = torch.export.export(net, (x,))
        assert seqkern.accelerate.is_enabled()
        with counting() as counts:
            net(x)
        assert counts == {(LSTM, ""): 1, (CROSS_ENTROPY, ""): 1}
    assert "seqkern" not in str(scripted.graph) + str(traced.graph) + str(exported.graph)
    for program in (scripted, traced, exported.module()):
        torch.testing.assert_close(program(x), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loss_has_torchs_dtype(dtype: torch.dtype) -> None:
    ours, theirs, _ = both(loss, randn(4, 9, dtype=dtype))
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)  # and the dtype


def test_autocast_has_torchs_dtypes() -> None:
    net = Net()

    def step(x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            heads = net.lstm(x)[0].unflatten(-1, (3, 3))  # [T, B, 3, 3]
            y = F.scaled_dot_product_attention(heads, heads.float(), heads.float(), is_causal=True)
            return heads, y, net(x)

    ours, theirs, counts = both(step, torch.randn(3, 4, 5))
    assert counts[LSTM, ""] == 2
    assert counts[CROSS_ENTROPY, ""] == 1
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.05)


# ---------------------------------------------------------------- in force and out of it


def places() -> list[Any]:
    return [
        *vars(F).values(),
        *(vars(torch.nn)[name].forward for name in ("LSTM", "LSTMCell", "GRU", "RNN")),
        torch.jit.script,
        torch.softmax,
        "softmax" in vars(Tensor),
    ]


def test_all_is_as_before_after_a_block_left_by_an_exception() -> None:
    before = places()

    def leave() -> None:
        with seqkern.accelerate(), seqkern.accelerate():
            assert places() != before
            raise KeyError

    with pytest.raises(KeyError):
        leave()
    assert places() == before
    assert not seqkern.accelerate.is_enabled()


def test_enable_and_disable_nest() -> None:
    before = places()
    seqkern.accelerate.enable()
    with seqkern.accelerate():
        seqkern.accelerate.enable()
        seqkern.accelerate.disable()
    assert seqkern.accelerate.is_enabled()
    seqkern.accelerate.disable()
    assert places() == before
    with pytest.raises(RuntimeError, match=r"accelerate\.disable: acceleration is not on"):
        seqkern.accelerate.disable()


def test_as_a_decorator() -> None:
    @seqkern.accelerate()
    def step(x: Tensor) -> Tensor:
        assert seqkern.accelerate.is_enabled()
        return loss(x)

    step(randn(4, 9))
    assert not seqkern.accelerate.is_enabled()


def changed_names(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    return {name for name, value in after.items() if before.get(name) is not value}


def test_only_the_named_functions_are_replaced() -> None:
    """Nothing else is intercepted: no mode is pushed, every other function is the same object."""
    before = dict(vars(F))
    tensor_methods, functions = dict(vars(Tensor)), dict(vars(torch))
    with seqkern.accelerate():
        assert changed_names(before, vars(F)) == {
            name.rpartition(".")[2] for name in (ATTENTION, CROSS_ENTROPY, LINEAR)
        }
        softmaxes = {"softmax", "log_softmax"}
        assert changed_names(tensor_methods, vars(Tensor)) == softmaxes
        assert changed_names(functions, vars(torch)) == softmaxes
        assert torch._C._len_torch_function_stack() == 0
        assert torch._C._len_torch_dispatch_stack() == 0


def test_what_others_replace_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    with counting() as counts:
        with seqkern.accelerate():
            inner = F.cross_entropy

            def theirs(*args: Any, **kwargs: Any) -> Tensor:
                calls.append("theirs")
                return inner(*args, **kwargs)

            monkeypatch.setattr(F, "cross_entropy", theirs)
            loss(randn(4, 9))
        assert F.cross_entropy is theirs
        loss(randn(4, 9))
        assert inner(randn(4, 9), CLASSES).dim() == 0
    assert calls == ["theirs", "theirs"]
    assert counts == {(CROSS_ENTROPY, ""): 1}
    monkeypatch.setattr(F, "cross_entropy", inner.__wrapped__)  # type: ignore[attr-defined]


def test_blocks_of_many_threads() -> None:
    before = places()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(30):
                with seqkern.accelerate():
                    loss(randn(4, 9)).item()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert places() == before


def test_compiled_code_follows_the_block() -> None:
    """Dynamo looks again at what the function is, in the block and after it."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    torch.compiler.reset()
    net = Net()
    compiled = torch.compile(lambda x: net(x), backend=backend, fullgraph=True)
    x = torch.randn(3, 4, 5)
    plain = compiled(x)
    with counting() as counts, seqkern.accelerate():
        torch.testing.assert_close(compiled(x), plain)
        compiled(x)
        with seqkern.accelerate():
            compiled(x)
    assert torch.equal(compiled(x), plain)
    assert ["seqkern" in graph for graph in graphs] == [False, True]
    assert counts == {(LSTM, "compiled: "): 1, (CROSS_ENTROPY, "compiled: "): 1}


def test_table_says_what_ran_where() -> None:
    counts = Counts({(LSTM, ""): 12, (ATTENTION, "not causal"): 3, (LSTM, "compiled: "): 1})
    assert table(counts).splitlines() == [
        "seqkern: calls of torch's functions",
        f"  {LSTM:<{len(ATTENTION)}}         12 calls            seqkern",
        f"  {LSTM:<{len(ATTENTION)}}          1 graphs compiled  seqkern",
        f"  {ATTENTION}          3 calls            torch: not causal",
    ]
    assert table(Counts()) == "seqkern: no call that it knows was made"
