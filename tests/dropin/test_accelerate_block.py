"""Where `seqkern.accelerate` reaches, and where not: transforms, blocks, threads, compiled code."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import ATTENTION, CLASSES, CROSS_ENTROPY, LINEAR, LSTM, both, outcome, randn
from torch import Tensor

import seqkern
from seqkern.dropin.counts import Counts, counting, table


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


def has_ours(graph: object) -> bool:
    """Whether an operation or module is ours; a folder that it names may be `seqkern`, too."""
    return re.search(r"seqkern(::|\.)", str(graph)) is not None


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
    for graph in (scripted.graph, traced.graph, exported.graph):
        assert not has_ours(graph)
    for program in (scripted, traced, exported.module()):
        torch.testing.assert_close(program(x), plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_script_modules_are_made_of_torchs(kind: str) -> None:
    plain, x = getattr(torch.nn, kind)(5, 7), torch.randn(3, 5)

    class Scripted(torch.jit.ScriptModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = copy.deepcopy(plain)

        @torch.jit.script_method
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    with seqkern.accelerate():
        scripted = Scripted()
        assert seqkern.accelerate.is_enabled()
    assert not has_ours(scripted.graph)
    x = torch.randn(3, 5)
    torch.testing.assert_close(scripted(x), plain(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loss_has_torchs_dtype(dtype: torch.dtype) -> None:
    ours, theirs, _ = both(loss, randn(4, 9, dtype=dtype))
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)  # and the dtype


def test_logits_changed_before_the_backward_are_an_error() -> None:
    """Ours reads them again, torch's does not: the docstring says so."""
    x = randn(4, 9).requires_grad_()
    with seqkern.accelerate():
        logits = x * 2
        value = loss(logits)
    logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


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
        *(
            vars(torch.nn)[name].forward
            for name in ("LSTM", "LSTMCell", "GRU", "GRUCell", "RNN", "RNNCell")
        ),
        torch.jit.script,
        torch.jit._recursive.create_script_module,
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
        ours = {name.rpartition(".")[2] for name in (ATTENTION, CROSS_ENTROPY, LINEAR)}
        assert changed_names(before, vars(F)) == ours & set(before)  # torch has LINEAR of late
        softmaxes = {"softmax", "log_softmax"}
        assert changed_names(tensor_methods, vars(Tensor)) == softmaxes
        assert changed_names(functions, vars(torch)) == softmaxes
        assert torch._C._len_torch_function_stack() == 0
        assert torch._C._len_torch_dispatch_stack() == 0


def test_what_others_replace_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set before the block as well, so that this is what stands there after the test.
    monkeypatch.setattr(F, "cross_entropy", F.cross_entropy)
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
    compiled = torch.compile(lambda x: net(x), backend=backend)  # torch's LSTM breaks the graph
    x = torch.randn(3, 4, 5)
    plain = compiled(x)
    outside = len(graphs)
    with counting() as counts, seqkern.accelerate():
        whole = torch.compile(lambda x: net(x), backend=backend, fullgraph=True)
        torch.testing.assert_close(whole(x), plain)
        whole(x)
        with seqkern.accelerate():
            whole(x)
        assert counts == {(LSTM, "compiled: "): 1, (CROSS_ENTROPY, "compiled: "): 1}
        torch.testing.assert_close(compiled(x), plain)
    assert ["seqkern" in graph for graph in graphs[: outside + 1]] == [False] * outside + [True]
    after = len(graphs)
    assert torch.equal(compiled(x), plain)
    assert not any("seqkern" in graph for graph in graphs[after:])


def test_table_says_what_ran_where() -> None:
    counts = Counts({(LSTM, ""): 12, (ATTENTION, "not causal"): 3, (LSTM, "compiled: "): 1})
    assert table(counts).splitlines() == [
        "seqkern: calls of torch's functions",
        f"  {LSTM:<{len(ATTENTION)}}         12 calls            seqkern",
        f"  {LSTM:<{len(ATTENTION)}}          1 graphs compiled  seqkern",
        f"  {ATTENTION}          3 calls            torch: not causal",
    ]
    assert table(Counts()) == "seqkern: no call that it knows was made"


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_states_that_torch_refuses_are_refused_by_torch(name: str) -> None:
    """In torch's words, and so are the dtypes that autocast leaves different."""
    module = getattr(torch.nn, name)(5, 7)
    x = randn(3, 5, dtype=torch.float32)
    h = randn(3, 7, dtype=torch.float32)
    if not name.endswith("Cell"):
        x, h = x[None], h[None]
    pairs = name.startswith("LSTM")
    for hx in [h, (h, h, h), ()] if pairs else [(h, h), (h,), [h], ()]:
        with pytest.raises(Exception) as plain:  # noqa: PT011
            module(x, hx)
        with seqkern.accelerate(), pytest.raises(type(plain.value)) as ours:
            module(x, hx)
        assert str(ours.value) == str(plain.value)
    with torch.autocast("cpu", torch.bfloat16):
        for wrong in (lambda: module.double()(x), lambda: module.float()(x.double())):
            with pytest.raises(RuntimeError) as plain:
                wrong()
            with seqkern.accelerate(), pytest.raises(RuntimeError) as ours:
                wrong()
            assert str(ours.value) == str(plain.value)
        with seqkern.accelerate():
            assert module.double()(x.double())[0].dtype == torch.float64
