"""`seqkern.patch` changes classes and nothing else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import seqkern
from seqkern.dropin.kinds import KINDS

SWAPPED = [kind for kind in KINDS.values() if kind.ours is not None]


class Model(torch.nn.Module):
    """Embedding, LSTM, cells, GRU, head and loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.lstm = torch.nn.LSTM(6, 8, 2, batch_first=True)
        self.cell = torch.nn.LSTMCell(8, 8)
        self.cells = torch.nn.ModuleList([torch.nn.GRUCell(8, 8), torch.nn.RNNCell(8, 8)])
        self.gru = torch.nn.GRU(8, 8, batch_first=True)
        self.head = torch.nn.Linear(8, 11)
        self.loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        x, _ = self.lstm(self.embedding(tokens))
        h, _ = self.cell(x[:, -1])
        for cell in self.cells:
            h = cell(h)
        y, _ = self.gru(x + h[:, None])
        loss: Tensor = self.loss(self.head(y).transpose(1, 2), target)
        return loss


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(steps):
        tokens, target = torch.randint(11, (2, 3, 5), generator=generator)
        loss = model(tokens, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def entries(record: seqkern.dropin.PatchRecord) -> dict[str, str]:
    return {e.name: e.reason for e in (*record.swapped, *record.left)}


def test_record_names_what_was_swapped_and_what_was_left() -> None:
    record = seqkern.patch(Model(), ["LSTM", "CrossEntropyLoss"])
    assert [(e.name, e.kind) for e in record.swapped] == [
        ("lstm", "LSTM"),
        ("loss", "CrossEntropyLoss"),
    ]
    assert {e.name for e in record.left} == {"cell", "cells.0", "cells.1", "gru"}
    assert str(record).splitlines()[:2] == ["swapped 2, left 4", "  lstm     LSTM"]
    assert "  cell     LSTMCell: left, not among the kinds asked for" in str(record)


def test_training_goes_on_with_the_optimizer_made_before() -> None:
    model = Model().double()
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (model, plain)]
    identity = [id(p) for p in model.parameters()]
    keys = list(model.state_dict())
    seqkern.patch(model)
    assert type(model.lstm) is seqkern.nn.LSTM
    assert type(model.loss) is seqkern.nn.CrossEntropyLoss
    assert [id(p) for p in model.parameters()] == identity
    assert list(model.state_dict()) == keys
    ours, theirs = (train(m, o, 4) for m, o in zip((model, plain), optimizers, strict=True))
    torch.testing.assert_close(ours, theirs)
    plain.load_state_dict(model.state_dict())
    seqkern.unpatch(model)
    assert type(model.lstm) is torch.nn.LSTM
    assert model.loss.__dict__.keys() == plain.loss.__dict__.keys()
    assert train(model, optimizers[0], 1) == pytest.approx(train(plain, optimizers[1], 1))


@pytest.mark.parametrize("kind", SWAPPED, ids=lambda kind: kind.name)
def test_ours_adds_nothing_to_an_instance(kind: Any) -> None:
    """What swapping by class rests on."""
    arguments = () if kind.name == "CrossEntropyLoss" else (3, 4)
    ours = kind.ours(*arguments)
    missing = vars(ours).keys() - vars(kind.torchs(*arguments)).keys()
    assert all(name in vars(kind.ours) for name in missing)


def test_patching_twice_and_modules_made_as_ours() -> None:
    model = torch.nn.Sequential(torch.nn.LSTM(2, 3), seqkern.nn.LSTM(3, 4))
    assert entries(seqkern.patch(model)) == {"0": "", "1": "already seqkern's"}
    assert entries(seqkern.patch(model)) == {"0": "already seqkern's", "1": "already seqkern's"}
    record = seqkern.unpatch(model)
    assert entries(record) == {"0": ""}
    assert str(record).startswith("restored 1, left 0")
    assert [type(m) for m in model] == [torch.nn.LSTM, seqkern.nn.LSTM]


def test_hooks_stay() -> None:
    model = torch.nn.LSTM(2, 3)
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.register_forward_hook(lambda *_: calls.append("after"))
    assert seqkern.patch(model).swapped[0].name == "(the model itself)"
    model(torch.randn(4, 1, 2))
    assert calls == ["before", "after"]


def test_shared_module_is_one_entry() -> None:
    lstm = torch.nn.LSTM(3, 3)
    model = torch.nn.ModuleDict({"a": lstm, "b": torch.nn.Sequential(lstm)})
    assert entries(seqkern.patch(model)) == {"a, b.0": ""}
    assert model["a"] is model["b"][0]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_can_be_restored(way: Callable[[Any], Any]) -> None:
    model = torch.nn.Sequential(torch.nn.LSTM(2, 3))
    seqkern.patch(model)
    other = way(model)
    assert type(other[0]) is seqkern.nn.LSTM
    seqkern.unpatch(other)
    assert type(other[0]) is torch.nn.LSTM
    assert type(model[0]) is seqkern.nn.LSTM


# ---------------------------------------------------------------- left, each with a reason


class Subclass(torch.nn.LSTM):
    """Does something else, for all we know."""


class Lazy(torch.nn.modules.lazy.LazyModuleMixin, torch.nn.LSTM):
    """Without its weights so far."""

    cls_to_become = torch.nn.LSTM  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(1, 3)
        self.weight_ih_l0 = torch.nn.UninitializedParameter()

    def initialize_parameters(self, x: Tensor, hx: Any = None) -> None:
        if self.has_uninitialized_params():
            self.weight_ih_l0.materialize((12, x.shape[-1]))  # type: ignore[union-attr]
            self.input_size = x.shape[-1]
            self._init_flat_weights()
            self.reset_parameters()


def parametrized() -> Any:
    return parametrizations.weight_norm(torch.nn.LSTM(2, 3), "weight_hh_l0")


def compiled_in_place() -> Any:
    module = torch.nn.LSTM(2, 3)
    module.compile()
    return module


def replaced_forward() -> Any:
    module = torch.nn.LSTM(2, 3)
    module.forward = module.forward  # type: ignore[method-assign]
    return module


def quantized() -> Any:
    from torch.ao.nn.quantized import dynamic

    return dynamic.LSTM(2, 3)


LEFT: dict[str, tuple[Callable[[], Any], str]] = {
    "subclass": (lambda: Subclass(2, 3), f"a subclass, {Subclass.__module__}.Subclass"),
    "lazy": (Lazy, "not initialised yet: patch after its first call"),
    "parametrized": (parametrized, "parametrized: patch before registering parametrizations"),
    "compiled": (
        lambda: torch.compile(torch.nn.LSTM(2, 3)),
        "already compiled: patch before torch.compile",
    ),
    "compiled-in-place": (compiled_in_place, "already compiled: patch before torch.compile"),
    "replaced-forward": (replaced_forward, "its forward was replaced on the instance"),
    "quantized": (quantized, "quantized"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT)
def test_left_with_a_reason(make: Callable[[], Any], reason: str) -> None:
    model = torch.nn.Sequential(make())
    before = [type(m) for m in model.modules()]
    record = seqkern.patch(model)
    assert record.swapped == ()
    assert len(record.left) == 1
    assert [e.reason for e in record.left] == [reason]
    assert [type(m) for m in model.modules()] == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_is_left() -> None:
    record = seqkern.patch(torch.jit.script(torch.nn.Sequential(torch.nn.LSTM(2, 3))))
    assert [e.reason for e in record.left] == ["scripted: patch before torch.jit.script"]


def test_kind_without_a_kernel_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(seqkern.nn, "LSTM")
    assert entries(seqkern.patch(torch.nn.LSTM(2, 3))) == {
        "(the model itself)": "seqkern has no kernel for it yet"
    }


def test_lazy_module_is_swapped_after_its_first_call() -> None:
    module = Lazy()
    module(torch.randn(2, 1, 5))
    assert entries(seqkern.patch(module)) == {"(the model itself)": ""}
    assert module(torch.randn(2, 1, 5))[0].shape == (2, 1, 3)


def test_class_changed_since_is_not_restored() -> None:
    module = torch.nn.LSTM(2, 3)
    seqkern.patch(module)
    parametrizations.weight_norm(module, "weight_hh_l0")
    (left,) = seqkern.unpatch(module).left
    assert left.reason.startswith("its class was changed since, to ")
    assert module(torch.randn(4, 1, 2))[0].shape == (4, 1, 3)


# ---------------------------------------------------------------- swapped, and still right


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_weights_made_by_a_hook(norm: Callable[..., Any]) -> None:
    """The older norms make the weight in a hook before each call; ours reads it there."""
    ours, theirs = (norm(torch.nn.LSTM(2, 3).double(), "weight_hh_l0").eval() for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    assert entries(seqkern.patch(ours)) == {"(the model itself)": ""}
    x = torch.randn(4, 2, 2, dtype=torch.float64)
    for module in (ours, theirs):
        module(x)[0].square().sum().backward()
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_meta_device_then_real() -> None:
    with torch.device("meta"):
        model = torch.nn.LSTM(2, 3)
    seqkern.patch(model)
    assert model(torch.randn(4, 1, 2, device="meta"))[0].shape == (4, 1, 3)
    real = torch.nn.LSTM(2, 3)
    model.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(4, 1, 2)
    torch.testing.assert_close(model(x)[0], real(x)[0])


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"patch: kinds must be among LSTM, .*, got 'LSTMM'"):
        seqkern.patch(torch.nn.LSTM(2, 3), ["LSTMM"])
    with pytest.raises(TypeError, match=r"patch: model must be a torch\.nn\.Module, got int"):
        seqkern.patch(3)  # type: ignore[arg-type]
    assert seqkern.patch(torch.nn.LSTM(2, 3), "LSTM").left == ()


def test_loss_of_logits_in_parts() -> None:
    """DTensors, as tensor parallelism has them, have rules for torch's functions alone."""
    from torch import distributed
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    model = torch.nn.Sequential(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
    logits, target = torch.randn(4, 8), torch.randint(8, (4,))
    expected = model[0](logits, target)
    seqkern.patch(model)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parts = distribute_tensor(logits, mesh, [Shard(0)])
        loss = model[0](parts, distribute_tensor(target, mesh, [Replicate()]))
        torch.testing.assert_close(loss.full_tensor(), expected)
    finally:
        distributed.destroy_process_group()
