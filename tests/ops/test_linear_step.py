"""ops.linear_step against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from seqkern import ops, reference
from tests.accuracy import assert_accurate

#: Of x, and of the parameters.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
FULL: dict[str, Any] = {"norm": "layer_norm", "activation": "gelu", "residual": True}


def exact16(*shape: int, scale: float = 1.0) -> Tensor:
    """Values that both 16-bit types hold exactly, in float64."""
    return (torch.randn(shape) * scale).to(torch.bfloat16).double().clamp(-4, 4)


def make(
    N: int,
    K: int,
    M: int,
    *,
    bias: bool = True,
    norm: str | None = None,
    residual: bool = False,
    gated: bool = False,
    **options: Any,
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """x, weight, bias; and the options, tensors among them."""
    R = 2 * M if gated else M
    tensors = [exact16(N, K), exact16(R, K, scale=K**-0.5), exact16(R) if bias else None]
    options |= {"norm": norm, "gated": gated}
    if norm is not None:
        options["norm_weight"] = exact16(K)
    if norm == "layer_norm":
        options["norm_bias"] = exact16(K)
    if residual:
        options["residual"] = exact16(N, M)
    return tensors, options


def cast(
    tensors: list[Tensor | None],
    options: dict[str, Any],
    dtype: torch.dtype,
    weights: torch.dtype,
    device: str,
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Copies in the dtypes of a call."""

    def to(name: str, t: Any) -> Any:
        own = dtype if name in ("0", "residual") else weights
        return t.to(device, own) if isinstance(t, Tensor) else t

    return (
        [to(str(i), t) for i, t in enumerate(tensors)],
        {name: to(name, value) for name, value in options.items()},
    )


def compare(backend: Any, made: Any, dtype: torch.dtype, weights: torch.dtype) -> None:
    """By the accuracy rule; torch computes in the dtype of x."""
    exact = reference.linear_step(*made[0], **made[1])
    tensors, options = cast(*made, dtype, dtype, "cpu")
    torchs = reference.linear_step(*tensors, **options)  # type: ignore[arg-type]
    tensors, options = cast(*made, dtype, weights, backend.device)
    ours = ops.linear_step(*tensors, **options)  # type: ignore[arg-type]
    assert ours.dtype == dtype
    assert_accurate(ours, torchs, exact, dtype)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (1, 16, 16), (2, 17, 33), (3, 40, 7), (4, 64, 48), (5, 7, 100), (16, 96, 50)],
    ids=str,
)
def test_matches_the_reference(
    backend: Any, shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    compare(backend, make(*shape), *dtypes)
    compare(backend, make(*shape, **FULL), *dtypes)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("N", [9, 17, 33, 70])
def test_many_rows(backend: Any, N: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """More than a kernel takes at once."""
    K = 70 if N < 40 else 8
    compare(backend, make(N, K, 37), *dtypes)
    compare(backend, make(N, K, 37, **FULL), *dtypes)
    compare(backend, make(N, K, 21, gated=True, activation="silu", norm="rms_norm"), *dtypes)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu", "relu"])
@pytest.mark.parametrize("norm", [None, "layer_norm", "rms_norm"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_options(
    backend: Any, activation: str | None, norm: str | None, gated: bool, dtype: torch.dtype
) -> None:
    made = make(3, 20, 21, norm=norm, activation=activation, gated=gated, residual=True)
    compare(backend, made, dtype, dtype)
    plain = make(1, 20, 21, norm=norm, activation=activation, gated=gated, bias=False)
    compare(backend, plain, dtype, dtype)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_norm_without_parameters(backend: Any, norm: str) -> None:
    tensors, options = make(2, 30, 9, norm=norm, eps=0.5)
    for name in ("norm_weight", "norm_bias"):
        options.pop(name, None)
    compare(backend, (tensors, options), torch.float32, torch.float32)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 2])
@pytest.mark.parametrize("K", [1024, 1100, 1303])
def test_inputs_longer_than_a_tile(
    backend: Any, N: int, K: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """On CUDA, inputs go through shared memory 256 to 1024 at a time."""
    # Of few outputs of long sums, which of two errors is larger would be chance.
    M = 3 if backend.tiny else 64
    K = {"cpu": K // 4, "emu": K, "cuda": K + 4 * 1024}[backend.name]
    compare(backend, make(N, K, M, **FULL), *dtypes)
    compare(backend, make(N, K, M, gated=True, activation="silu", norm="rms_norm"), *dtypes)


def moved(t: Tensor, offset: int) -> Tensor:
    """The same values `offset` elements into their memory, rows apart by as many."""
    room = torch.full((*t.shape[:-1], t.shape[-1] + offset), 7.0, dtype=t.dtype, device=t.device)
    if t.dim() == 1:
        room[offset:] = t
        return room[offset:]
    rows = room[..., offset:]
    rows.copy_(t)
    return rows


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("K", [40, 43])
@pytest.mark.parametrize("N", [1, 5])
def test_alignments(backend: Any, K: int, N: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The same bits wherever the elements lie."""
    (x, weight, bias), options = cast(*make(N, K, 5, **FULL), *dtypes, backend.device)
    assert x is not None
    assert weight is not None
    aligned = ops.linear_step(x, weight, bias, **options)
    for offset in (1, 4):
        norm = {name: moved(options[name], offset) for name in ("norm_weight", "norm_bias")}
        others = options | norm
        assert torch.equal(ops.linear_step(moved(x, offset), weight, bias, **options), aligned)
        assert torch.equal(ops.linear_step(x, moved(weight, offset), bias, **options), aligned)
        assert torch.equal(ops.linear_step(x, weight, bias, **others), aligned)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_weight_for_several_threads(weights: torch.dtype) -> None:
    class Cpu:
        device = "cpu"

    compare(Cpu, make(3, 1000, 2100, **FULL), torch.float32, weights)
    compare(Cpu, make(40, 301, 700, gated=True, activation="silu"), torch.float32, weights)
    compare(Cpu, make(150, 1301, 83, **FULL), torch.float32, weights)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_activations_of_all_sizes(backend: Any, activation: str) -> None:
    """Relative accuracy in the tails too, which the rule's one scale does not see."""
    x = torch.linspace(-9, 9, 200 if backend.tiny else 20001, device=backend.device)
    one = torch.ones(1, 1, device=backend.device)
    ours = ops.linear_step(x[:, None], one, activation=activation)[:, 0].double()
    exact = reference.linear_step(x[:, None].double(), one.double(), activation=activation)[:, 0]
    # An error of x, half a unit, is an error of exp(-x^2 / 2) in the tail: x^2 / 2 times as large.
    allowed = 1e-6 * (1 + x.double().square()) * exact.abs() + 1e-12
    torch_error = reference.linear_step(x[:, None], one, activation=activation)[:, 0].double()
    allowed = torch.maximum(allowed, 2 * (torch_error - exact).abs())
    assert ((ours - exact).abs() <= allowed).all()


def test_not_a_number_stays(backend: Any) -> None:
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]], device=backend.device)
    weight = torch.eye(2, device=backend.device)
    for activation in ("gelu", "gelu_tanh", "silu", "relu"):
        y = ops.linear_step(x, weight, activation=activation)
        assert y[0].isnan().all()
        assert torch.isfinite(y[1]).all()


@pytest.mark.parametrize("dtypes", DTYPES[:5], ids=str)
@pytest.mark.parametrize("K", [70, 1100])
def test_a_row_depends_on_nothing_around_it(
    backend: Any, K: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    # Around the rows that share a load of the weight, and the columns of a tile.
    N = 37
    tensors, options = cast(*make(N, K, 11, **FULL), *dtypes, backend.device)
    residual = options.pop("residual")
    x, rest = tensors[0], tensors[1:]
    assert x is not None
    together = ops.linear_step(x, *rest, residual=residual, **options)  # type: ignore[arg-type]
    for n in (0, 5, 8, 15, 16, 30, 36) if backend.tiny else range(N):
        row = slice(n, n + 1)
        alone = ops.linear_step(x[row], *rest, residual=residual[row], **options)  # type: ignore
        assert torch.equal(alone, together[row])


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    tensors, options = cast(*make(2, 1500, 900, **FULL), torch.float32, torch.float32, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.linear_step(*tensors, **options))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strides_and_leading_dimensions(backend: Any) -> None:
    """Rows of x and residual as parts of larger tensors, columns of weight too."""
    big = torch.randn(2, 3, 2, 12, device=backend.device)
    weight = torch.randn(5, 20, device=backend.device)[:, 4:16]
    bias = torch.randn(10, device=backend.device)[::2]
    x, residual = big[:, :, 1], torch.randn(2, 5, 3, device=backend.device).transpose(1, 2)
    y = ops.linear_step(x, weight, bias, residual=residual)
    expected = ops.linear_step(
        x.contiguous(), weight.contiguous(), bias.contiguous(), residual=residual.contiguous()
    )
    assert y.shape == (2, 3, 5)
    assert torch.equal(y, expected)
    vector = ops.linear_step(x[0, 0], weight, bias)
    assert torch.equal(vector, ops.linear_step(x[:1, :1], weight, bias)[0, 0])


def test_no_rows_or_outputs(backend: Any) -> None:
    weight = torch.zeros(5, 4, device=backend.device)
    assert ops.linear_step(weight.new_zeros(0, 4), weight).shape == (0, 5)
    assert ops.linear_step(weight.new_zeros(3, 4), weight[:0]).shape == (3, 0)


def test_opcheck(backend: Any) -> None:
    made = make(2, 8, 6, gated=True, **FULL)
    (x, weight, bias), options = cast(*made, torch.float32, torch.float32, backend.device)
    norm = options["norm_weight"], options["norm_bias"]
    residual = options["residual"]
    op = backend.ops.linear_step
    opcheck(op, (x, weight, bias, 1, *norm, 1e-5, 1, True, residual))
    opcheck(op, (x, weight, None, 0, None, None, 1e-5, 0, False, None))


def test_compiles_whole() -> None:
    def forward(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return ops.linear_step(x, weight, norm="rms_norm", residual=residual) * 2

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    for N in (2, 3):
        args = torch.randn(N, 8), torch.randn(6, 8), torch.randn(N, 6)
        torch.testing.assert_close(compiled(*args), forward(*args))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, "x must be float32, float64, float16 or"),
        ({"weight": torch.zeros(4)}, r"weight must be \[M, K\], got float32 \[4\]"),
        (
            {"weight": torch.zeros(6, 4, dtype=torch.float64)},
            "weight must be float32, bfloat16 or float16 with x float32, got float64",
        ),
        (
            {"x": torch.zeros(2, 4, dtype=torch.float64)},
            "weight must be float64 with x float64, got float32",
        ),
        ({"weight": torch.zeros(6, 5)}, r"weight must be \[M, 4\] with x \[2, 4\], got float32"),
        ({"weight": torch.zeros(4, 6).t()}, "weight must have stride 1 in its last dimension"),
        ({"weight": torch.zeros(5, 4), "gated": True}, "weight must have an even number of rows"),
        ({"bias": torch.zeros(5)}, r"bias must be float32 \[6\] like weight, got float32 \[5\]"),
        (
            {"bias": torch.zeros(6, dtype=torch.bfloat16)},
            r"bias must be float32 \[6\] like weight, got bfloat16 \[6\]",
        ),
        ({"norm_weight": torch.zeros(3)}, r"norm_weight must be float32 \[4\] like weight"),
        ({"norm": None}, "norm must be given with norm_weight or norm_bias, got none"),
        ({"norm": "rms_norm"}, "norm_bias must be none without a layer norm, got one"),
        ({"norm": "batch_norm"}, "norm must be one of .*, got 'batch_norm'"),
        ({"activation": "tanh"}, "activation must be one of .*, got 'tanh'"),
        ({"eps": -1.0}, "eps must be at least 0, got -1"),
        (
            {"residual": torch.zeros(2, 5)},
            r"residual must be float32 of the result's shape, \[..., 6\] with x \[2, 4\], got",
        ),
        (
            {"residual": torch.zeros(2, 6, dtype=torch.bfloat16)},
            "residual must be float32 of the result's shape",
        ),
    ],
)
def test_errors(backend: Any, changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 4),
        "weight": torch.zeros(6, 4),
        "bias": torch.zeros(6),
        "norm": "layer_norm",
        "norm_weight": torch.zeros(4),
        "norm_bias": torch.zeros(4),
    }
    arguments = {
        name: t.to(backend.device) if isinstance(t, Tensor) else t
        for name, t in (arguments | changed).items()
    }
    with pytest.raises(ValueError, match=f"^linear_step: {message}"):
        ops.linear_step(**arguments)


def test_gradients_are_refused() -> None:
    weight = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"no argument must need gradients; use torch.no_grad\(\)"):
        ops.linear_step(torch.zeros(1, 2), weight)
    with torch.no_grad():
        assert not ops.linear_step(torch.zeros(1, 2), weight).requires_grad
