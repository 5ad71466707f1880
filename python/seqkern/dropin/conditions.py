"""When our kernels can take a call of torch's: each function says why not, "" if they can.

They have the names and the parameters of torch's functions. Whatever torch itself would refuse is
left to it, so that it fails with torch's words: a wrong type, too, and a call that does not fit the
parameters here, which raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkern._load import cuda_unavailable_reason
from seqkern.nn._dynamo import is_exporting

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_CLASSES = (torch.int64, torch.uint8)
_DEVICES = ("cpu",) if cuda_unavailable_reason else ("cpu", "cuda")
_PLAIN = (Tensor, torch.nn.Parameter)
#: Of nearly all arguments, which need no closer look.
_WITHOUT_RULES = frozenset((*_PLAIN, int, float, bool, str, tuple, type(None)))
_MAX_HEAD_WIDTH = 256
#: Elements from which ours are not slower, forward and backward (benchmarks, 2 threads): torch's
#: softmax is well vectorised, and ours gains by the memory of large results; and a loss of few
#: logits takes less time than the calls do, on the CPU.
LARGE = {"softmax": 1 << 24, "log_softmax": 1 << 18, "cross_entropy": 1 << 16}
#: Rows from which that does not hold: torch's cross-entropy takes long for each.
MANY_ROWS = 1 << 10
#: Products in a layer of an RNN from which a single step of ours is not slower on the CPU.
LARGE_STEP = 1 << 22
SUBCLASS = "a tensor subclass"
UNFIT = "arguments that do not fit"


def context() -> str:
    """Why no call is ours here, whatever its arguments."""
    if torch.compiler.is_compiling():
        if is_exporting():
            return "torch.export: the program must run without seqkern"
    elif torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    elif torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    elif torch._C._get_tracing_state() is not None:
        return "torch.jit.trace: the graph must run without seqkern"
    return ""


def is_foreign(argument: object) -> bool:
    """Whether it brings its own rules for torch's functions, as tensor subclasses do."""
    kind = type(argument)
    return kind not in _WITHOUT_RULES and hasattr(kind, "__torch_function__")


def foreign(args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """Why a call is theirs who bring rules: known before anything is asked of them, since a proxy
    of torch.fx's notes down what it is asked.
    """
    if torch.compiler.is_compiling():
        return ""
    for argument in (*args, *kwargs.values()):
        if type(argument) not in _WITHOUT_RULES and is_foreign(argument):
            return f"{SUBCLASS}, {type(argument).__name__}"
    return ""


def refusal(*tensors: Tensor | None) -> str:
    """Why no kernel takes these floating point tensors together."""
    first = tensors[0]
    assert first is not None
    if not first.is_cpu and first.device.type not in _DEVICES:
        return f"no kernels for {first.device.type}"
    if first.dtype not in _DTYPES:
        return f"dtype {first.dtype}"
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN:
            return f"{SUBCLASS}, {type(t).__name__}"
        if t.dtype != first.dtype:
            return "tensors of different dtypes"
        if t.device != first.device:
            return "tensors on different devices"
        if t.layout != torch.strided:
            return f"layout {t.layout}"
    return ""


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> str:
    """For `torch.nn.functional.cross_entropy`."""
    if size_average is not None or reduce is not None:
        return "the deprecated size_average or reduce"
    if input.dim() == 0:
        return UNFIT
    batch = input.shape[:1] if input.dim() > 1 else input.shape[:0]
    rows = batch + input.shape[2:]
    V = input.shape[1 if input.dim() > 1 else 0]
    large = 0 if torch.compiler.is_compiling() or not input.is_cpu else LARGE["cross_entropy"]
    if input.numel() < large and input.numel() < MANY_ROWS * V:
        return f"fewer than {large} logits in few rows, where torch's is faster"
    return _loss(input, target, weight, ignore_index, reduction, label_smoothing, rows, V)


def _loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    rows: torch.Size,
    V: int,
) -> str:
    if input.numel() == 0 or V == 0:
        return "nothing in it"
    if target.is_floating_point():
        fits = target.shape == input.shape and ignore_index < 0
        reason = refusal(input, target, weight)
    else:
        fits = target.shape == rows and target.dtype in _CLASSES and target.device == input.device
        reason = refusal(input, weight)
    if weight is not None:
        fits = fits and weight.shape == (V,)
        if weight.requires_grad and torch.is_grad_enabled():
            return "gradient of the class weights"
    fits = fits and reduction in ("none", "mean", "sum") and 0.0 <= label_smoothing <= 1.0
    fits = fits and isinstance(ignore_index, int) and not isinstance(ignore_index, bool)
    return reason if reason or fits else UNFIT


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
) -> str:
    """For `torch.nn.functional.linear_cross_entropy`, which some versions of torch have."""
    if target.is_floating_point():
        return "class probabilities"
    if linear_weight.dim() != 2 or input.dim() not in (1, 2):
        return "a loss of several dimensions"
    V, H = linear_weight.shape
    if input.shape[-1] != H or (linear_bias is not None and linear_bias.shape != (V,)):
        return UNFIT
    reason = refusal(input, linear_weight, linear_bias)
    if reason:
        return reason
    ignored = -100 if ignore_index is None else ignore_index
    rows = input.shape[:-1]
    return _loss(input, target, weight, ignored, reduction, label_smoothing, rows, V)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    """For `torch.nn.functional.scaled_dot_product_attention`."""
    if attn_mask is not None:
        return "an attention mask"
    if not isinstance(is_causal, bool) or not isinstance(scale, (int, float, type(None))):
        return UNFIT
    if not is_causal:
        return "not causal"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return "not 4 dimensions"
    B, NH, T, D = query.shape
    if key.shape[2] != T or value.shape[2] != T:
        # torch aligns the first query with the first key, our kernel the last with the last.
        return "another number of keys than queries"
    if D > _MAX_HEAD_WIDTH or value.shape[3] != D:
        return f"heads wider than {_MAX_HEAD_WIDTH}, or of different widths"
    NKV = key.shape[1]
    fits = key.shape == value.shape and key.shape[0] == B and key.shape[3] == D
    fits = fits and (NKV == NH or (enable_gqa and NKV > 0 and NH % NKV == 0))
    if not fits or query.numel() == 0 or not 0.0 <= dropout_p < 1.0:
        return UNFIT
    return refusal(query, key, value)


def softmax(*args: Any, **kwargs: Any) -> str:
    """For `torch.softmax`."""
    return _softmax(_softmax_function, "softmax", args, kwargs)


def softmax_method(*args: Any, **kwargs: Any) -> str:
    """For `torch.Tensor.softmax`."""
    return _softmax(_softmax_method, "softmax", args, kwargs)


def log_softmax(*args: Any, **kwargs: Any) -> str:
    """For `torch.log_softmax`."""
    return _softmax(_softmax_function, "log_softmax", args, kwargs)


def log_softmax_method(*args: Any, **kwargs: Any) -> str:
    """For `torch.Tensor.log_softmax`."""
    return _softmax(_softmax_method, "log_softmax", args, kwargs)


def _softmax(parse: Callable[..., str], name: str, args: Any, kwargs: Any) -> str:
    # Before the arguments are looked at: Dynamo does not trace a call that does not fit, while
    # torch takes some (axis=) that we do not know.
    if torch.compiler.is_compiling():
        return "torch.compile, which fuses it with what is around it"
    return parse(LARGE[name], *args, **kwargs)


def _softmax_function(
    large: int,
    input: Tensor,
    dim: object,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
) -> str:
    return "a tensor to write to" if out is not None else _softmax_method(large, input, dim, dtype)


def _softmax_method(
    large: int, input: Tensor, /, dim: object, dtype: torch.dtype | None = None
) -> str:
    if not isinstance(dim, int) or isinstance(dim, bool) or dim not in (-1, input.dim() - 1):
        return "another dimension than the last"
    if input.dim() == 0:
        return UNFIT
    if dtype is not None and dtype != input.dtype:
        return "another dtype asked for"
    if input.numel() < large:
        return f"fewer than {large} elements, where torch's is faster"
    if input.dtype != torch.float64 and _casts(input):
        return "autocast"
    return refusal(input)


def recurrent(module: torch.nn.RNNBase, input: Tensor | PackedSequence, hx: object = None) -> str:
    """For the forward of `torch.nn.LSTM` and its kin."""
    data = input.data if isinstance(input, PackedSequence) else input
    if not torch.compiler.is_compiling():
        if data is input and _is_small_step(module, data):
            return "a small single step of an RNN, where torch's is faster"
        # Whoever exchanges weights behind torch's back gets what torch makes of it. From the
        # dictionary: attributes of modules take as long as all the rest.
        own, names = module._parameters, module._flat_weights_names
        for name, weight in zip(names, module._flat_weights, strict=True):
            if own.get(name) is not weight and getattr(module, name, None) is not weight:
                return "weights that are not the module's attributes"
    first = module.weight_ih_l0
    assert isinstance(first, Tensor)
    autocast = _casts(data)
    if not _dtypes_fit(data, first, autocast):
        return "tensors of different dtypes"
    directions = module.num_layers * (2 if module.bidirectional else 1)
    if isinstance(input, PackedSequence):
        batch = [int(input.batch_sizes[0])]
    else:
        if data.dim() not in (2, 3) or data.numel() == 0:
            return UNFIT
        batch = [] if data.dim() == 2 else [data.shape[0 if module.batch_first else 1]]
    if data.shape[-1] != module.input_size:
        return UNFIT
    widths = [module.proj_size or module.hidden_size]
    if module.mode == "LSTM":
        widths.append(module.hidden_size)
    shapes = [[directions, *batch, width] for width in widths]
    return _states(hx, shapes, data, autocast) or refusal(data) or refusal(first)


def _is_small_step(module: torch.nn.RNNBase, data: Tensor) -> bool:
    """Whether a call costs what the one product of a layer does, which torch makes slowly of 16-bit
    numbers alone.
    """
    if module.mode in ("LSTM", "GRU") or not data.is_cpu or data.element_size() < 4:
        return False
    times = data.dim() - 2 if module.batch_first else 0
    if data.dim() not in (2, 3) or data.shape[times] != 1 or _casts(data):
        return False
    H = module.hidden_size
    return H * (data.numel() + data.shape[:-1].numel() * H) < LARGE_STEP


def cell(module: torch.nn.RNNCellBase, input: Tensor, hx: object = None) -> str:
    """For the forward of `torch.nn.LSTMCell` and its kin."""
    if input.dim() not in (1, 2) or input.numel() == 0 or input.shape[-1] != module.input_size:
        return UNFIT
    autocast = _casts(input)
    if not _dtypes_fit(input, module.weight_ih, autocast):
        return "tensors of different dtypes"
    if getattr(module, "nonlinearity", "tanh") not in ("tanh", "relu"):
        return UNFIT
    shape = [*input.shape[:-1], module.hidden_size]
    states = 2 if isinstance(module, torch.nn.LSTMCell) else 1
    reason = _states(hx, [shape] * states, input, autocast)
    return reason or refusal(input) or refusal(module.weight_ih, module.weight_hh)


def _casts(t: Tensor) -> bool:
    device = "cpu" if t.is_cpu else t.device.type  # the second takes six times as long
    return device in _DEVICES and torch.is_autocast_enabled(device)


def _dtypes_fit(data: Tensor, weight: Tensor, autocast: bool) -> bool:
    if not autocast:
        return data.dtype == weight.dtype
    # Autocast casts no float64, and what torch makes of the other 16 bits depends on the processor.
    cast = (torch.float32, torch.get_autocast_dtype(data.device.type))
    return data.dtype in cast and weight.dtype in cast


def _states(hx: object, shapes: list[list[int]], data: Tensor, autocast: bool) -> str:
    if hx is None:
        return ""
    states: list[Any] = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    if (len(shapes) == 1) != isinstance(hx, Tensor):  # one state is no tuple, two are no tensor
        return UNFIT
    for state in states:
        if not isinstance(state, Tensor):
            return UNFIT
        if not _dtypes_fit(state, data, autocast):
            return "tensors of different dtypes"
        reason = refusal(state)
        if reason:
            return reason
    fits = [list(state.shape) for state in states] == shapes
    return "" if fits else UNFIT
