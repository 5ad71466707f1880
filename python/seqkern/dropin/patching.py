"""`patch` and `unpatch`: torch's modules in a model become ours, in place, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from seqkern.dropin.kinds import KINDS, Kind
from seqkern.errors import require

_MARK = "_seqkern_patched"  # on the instance, so that it goes with copies and pickles


@dataclass(frozen=True)
class Entry:
    """One module of a model: where it is, what it is, and why it was left ("" if it was not)."""

    name: str  # its path in the model; several, with commas, if it is shared
    kind: str
    reason: str = ""


@dataclass(frozen=True)
class PatchRecord:
    """What `patch` or `unpatch` did. `str(record)` is a line per module.

    Attributes:
        swapped: the modules that changed.
        left: the others of the kinds that seqkern knows, each with a reason.
    """

    swapped: tuple[Entry, ...]
    left: tuple[Entry, ...]
    verb: str = "swapped"

    def __str__(self) -> str:
        """A line per module."""
        lines = [f"{self.verb} {len(self.swapped)}, left {len(self.left)}"]
        width = max((len(entry.name) for entry in (*self.swapped, *self.left)), default=0)
        for entry in self.swapped:
            lines.append(f"  {entry.name:<{width}}  {entry.kind}")
        for entry in self.left:
            lines.append(f"  {entry.name:<{width}}  {entry.kind}: left, {entry.reason}")
        return "\n".join(lines)


def patch(model: torch.nn.Module, kinds: Iterable[str] | None = None) -> PatchRecord:
    """Make torch's recurrent modules and losses in `model` seqkern's, in place.

    Each keeps its identity, its parameters and its hooks: only its class changes, to a subclass
    with another `forward`. Optimizers, DDP, `state_dict` and references from elsewhere notice
    nothing. Formula, dtypes and errors of the results: `seqkern.nn`. Under a 16-bit dtype a loss is
    returned in float32, where torch rounds it. What GRU, RNN, cells and an LSTM with `proj_size`
    return, and all weights and biases, their backward reads: to change one in place before that is
    an error of autograd's.

    What is left as it was is in the record with its reason: subclasses and parametrized modules
    (which may do something else), whatever is compiled, scripted, quantized or not yet initialised
    already, modules whose `forward` was replaced on the instance, and kinds without a kernel.

    Args:
        model: any module; itself may be one of the kinds.
        kinds: which of "LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell" and
            "CrossEntropyLoss" to swap; None for all.

    Returns:
        What was swapped, and what was left and why. Swapping again changes nothing.

    Raises:
        ValueError: a kind that is not one.
        TypeError: `model` is not a module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LSTM(8, 16), torch.nn.Identity())
        >>> print(seqkern.patch(model))
        swapped 1, left 0
          0  LSTM
        >>> seqkern.unpatch(model).swapped[0].name
        '0'
    """
    wanted = _wanted(kinds)
    compiled = _compiled(_checked("patch", model))
    swapped, left = [], []
    for name, module, kind in _candidates(model):
        reason = _reason(module, kind, wanted, compiled)
        if reason:
            left.append(Entry(name, kind.name, reason))
            continue
        assert kind.ours is not None
        kind.become(module, kind.ours)
        module.__dict__[_MARK] = True
        swapped.append(Entry(name, kind.name))
    return PatchRecord(tuple(swapped), tuple(left))


def unpatch(model: torch.nn.Module) -> PatchRecord:
    """Undo `patch`: what it swapped in `model` is torch's again; modules made as ours stay ours.

    Works on copies and unpickled models too.

    Args:
        model: a module.

    Returns:
        What was restored. A module whose class something else has changed since is left.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> model = torch.nn.LSTM(8, 16)
        >>> record = seqkern.patch(model)
        >>> type(model), record.swapped[0].kind, seqkern.unpatch(model) and type(model)
        (<class 'seqkern.nn.lstm.LSTM'>, 'LSTM', <class 'torch.nn.modules.rnn.LSTM'>)
    """
    swapped, left = [], []
    for name, module, kind in _candidates(_checked("unpatch", model)):
        if _MARK not in module.__dict__:
            continue
        if type(module) is kind.ours:
            kind.become(module, kind.torchs)
            del module.__dict__[_MARK]
            swapped.append(Entry(name, kind.name))
        else:
            reason = f"its class was changed since, to {_class_name(module)}"
            left.append(Entry(name, kind.name, reason))
    return PatchRecord(tuple(swapped), tuple(left), "restored")


def _wanted(kinds: Iterable[str] | None) -> set[str]:
    if kinds is None:
        return set(KINDS)
    wanted = {kinds} if isinstance(kinds, str) else set(kinds)
    for name in sorted(wanted):
        require(name in KINDS, f"patch: kinds must be among {', '.join(KINDS)}, got {name!r}")
    return wanted


def _checked(function: str, model: torch.nn.Module) -> torch.nn.Module:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def _candidates(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, Kind]]:
    """Each module that is of a kind, or of what was one, once, with all its paths."""
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(name or "(the model itself)")
    for module in model.modules():
        kind = _kind(module)
        if kind is not None:
            yield ", ".join(paths[id(module)]), module, kind


def _kind(module: torch.nn.Module) -> Kind | None:
    for kind in KINDS.values():
        if isinstance(module, kind.torchs):
            return kind
    if isinstance(module, torch.jit.ScriptModule):
        return KINDS.get(getattr(module, "original_name", ""))
    return KINDS.get(type(module).__name__) if _is_quantized(module) else None


def _compiled(model: torch.nn.Module) -> set[int]:
    """Ids of the modules that are, or are inside, a compiled one."""
    # Importing it takes seconds; where nobody has, nothing is compiled.
    frame = sys.modules.get("torch._dynamo.eval_frame")
    wrapper = () if frame is None else (frame.OptimizedModule,)
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, wrapper) or module._compiled_call_impl is not None:
            found.update(map(id, module.modules()))
    return found


def _is_quantized(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.")


def _class_name(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _reason(module: torch.nn.Module, kind: Kind, wanted: set[str], compiled: set[int]) -> str:
    """Why a module is not swapped; empty if it is."""
    cases = (
        (kind.name not in wanted, "not among the kinds asked for"),
        (kind.ours is None, "seqkern has no kernel for it yet"),
        (kind.ours is not None and type(module) is kind.ours, "already seqkern's"),
        (id(module) in compiled, "already compiled: patch before torch.compile"),
        (isinstance(module, torch.jit.ScriptModule), "scripted: patch before torch.jit.script"),
        (_is_quantized(module), "quantized"),
        (
            isinstance(module, LazyModuleMixin) and module.has_uninitialized_params(),
            "not initialised yet: patch after its first call",
        ),
        (is_parametrized(module), "parametrized: patch before registering parametrizations"),
        (type(module) is not kind.torchs, f"a subclass, {_class_name(module)}"),
        ("forward" in module.__dict__, "its forward was replaced on the instance"),
    )
    return next((reason for holds, reason in cases if holds), "")
