"""ops.decoder_step: the same bits as its parts, and what a plain transformer computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from mistakes import refused
from seqkern import ops
from seqkern.nn import KVCache

B, NH, D, L, LAYERS = 2, 2, 4, 9, 2
C = NH * D
SHAPES = [(C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,)]
SHAPES += [(C,), (C,), (4 * C, C), (4 * C,), (C, 4 * C), (C,)]


def make(
    S: int, device: str, dtype: torch.dtype, weights: torch.dtype
) -> tuple[Tensor, list[Tensor], KVCache]:
    """New tokens, parameters, and a cache whose rows hold 3 and 0 tokens."""
    x = torch.randn(B, S, C, dtype=torch.float64).to(device, dtype)
    shapes = SHAPES * LAYERS
    parameters = [torch.randn(s, dtype=torch.float64).to(device, weights) / 2 for s in shapes]
    cache = KVCache(LAYERS, B, NH, L, D, dtype=weights, device=device)
    cache.memory.normal_()
    cache.lengths[0] = 3
    return x, parameters, cache


def by_parts(x: Tensor, parameters: list[Tensor], cache: KVCache) -> Tensor:
    """Op by op."""
    S = x.shape[1]
    for layer in range(LAYERS):
        w = parameters[12 * layer : 12 * layer + 12]
        norm: dict[str, Any] = {"norm": "layer_norm", "norm_weight": w[0], "norm_bias": w[1]}
        qkv = ops.linear_step(x, w[2], w[3], **norm).view(B, S, 3, NH, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = ops.attention_step(q, k, v, *cache[layer], cache.lengths)
        x = ops.linear_step(y.transpose(1, 2).reshape(B, S, C), w[4], w[5], residual=x)
        norm = {"norm": "layer_norm", "norm_weight": w[6], "norm_bias": w[7]}
        wide = ops.linear_step(x, w[8], w[9], activation="gelu", **norm)
        x = ops.linear_step(wide, w[10], w[11], residual=x)
    return x


def plain(x: Tensor, parameters: list[Tensor]) -> Tensor:
    """PyTorch's operations on whole sequences, for an empty cache."""
    S = x.shape[1]
    for layer in range(LAYERS):
        w = parameters[12 * layer : 12 * layer + 12]
        qkv = F.linear(F.layer_norm(x, (C,), w[0], w[1]), w[2], w[3]).view(B, S, 3, NH, D)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + F.linear(y.transpose(1, 2).reshape(B, S, C), w[4], w[5])
        wide = F.gelu(F.linear(F.layer_norm(x, (C,), w[6], w[7]), w[8], w[9]))
        x = x + F.linear(wide, w[10], w[11])
    return x


@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_same_bits_as_its_parts(
    backend: Any, S: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x, parameters, cache = make(S, backend.device, *dtypes)
    again = KVCache(LAYERS, B, NH, L, D, dtype=dtypes[1], device=backend.device)
    again.memory.copy_(cache.memory)
    again.lengths.copy_(cache.lengths)
    before = x.clone()
    y = ops.decoder_step(x, parameters, cache.memory, cache.lengths, counters=cache.counters)
    assert y.dtype == x.dtype
    assert torch.equal(x, before)
    assert torch.equal(y, by_parts(x, parameters, again))
    assert torch.equal(cache.memory, again.memory)
    assert cache.lengths.tolist() == [3, 0]


def test_what_a_transformer_computes(backend: Any) -> None:
    x, parameters, cache = make(4, backend.device, torch.float64, torch.float64)
    cache.truncate(0)
    expected = plain(x, parameters)
    for t in range(4):
        new = x[:, t : t + 1]
        y = ops.decoder_step(new, parameters, cache.memory, cache.lengths)
        cache.advance(1)
        torch.testing.assert_close(y, expected[:, t : t + 1], rtol=1e-10, atol=1e-10)


def test_opcheck(backend: Any) -> None:
    x, parameters, cache = make(2, backend.device, torch.float32, torch.float32)
    opcheck(
        backend.ops.decoder_step,
        (x, parameters, cache.memory, cache.lengths, cache.counters, 1e-5, 1),
    )


def test_errors(backend: Any) -> None:
    x, parameters, cache = make(1, backend.device, torch.float32, torch.float32)
    memory, lengths = cache.memory, cache.lengths

    def refused(message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            ops.decoder_step(*args, **options)

    refused(r"^decoder_step: x must be \[B, S, C\], got", x[0], parameters, memory, lengths)
    refused(
        r"^decoder_step: cache must be \[layers, 2, 2, NH, L, D\] with NH D = 8, got float32",
        x,
        parameters,
        memory[..., :3],
        lengths,
    )
    refused(
        "^decoder_step: parameters must be 12 for each of 2 layers, got 12",
        x,
        parameters[:12],
        memory,
        lengths,
    )
    wrong = [*parameters[:2], parameters[2][:-1], parameters[3][:-1], *parameters[4:]]
    refused(r"^decoder_step: parameters\[2\] must be \[24, 8\], got", x, wrong, memory, lengths)
    refused(
        "^decoder_step: activation must be one of .*, got 'tanh'",
        x,
        parameters,
        memory,
        lengths,
        activation="tanh",
    )
    refused(
        r"^decoder_step: no argument must need gradients; use torch.no_grad\(\)",
        x,
        [p.requires_grad_() for p in parameters],
        memory,
        lengths,
    )


def test_errors_of_the_steps_inside_name_the_arguments_of_the_whole(backend: Any) -> None:
    x, parameters, cache = make(1, backend.device, torch.float32, torch.float32)
    right = {"x": x, "parameters": parameters, "cache": cache.memory, "lengths": cache.lengths}
    last = 12 * (LAYERS - 1)

    def parameter(n: int, change: Any) -> dict[str, Any]:
        return {"parameters": [change(p) if i == n else p for i, p in enumerate(parameters)]}

    def wide(t: Tensor) -> Tensor:
        return t.repeat_interleave(2, -1)[..., ::2]

    wrong: list[tuple[dict[str, Any], str]] = [
        (
            {"x": x.long()},
            r"x must be float32, float64, float16 or bfloat16, got int64 \[2, 1, 8\]",
        ),
        ({"x": x.repeat(1, 17, 1)}, r"x must hold 1 to 16 new tokens, got float32 \[2, 17, 8\]"),
        ({"x": x[:, :0]}, r"x must hold 1 to 16 new tokens, got float32 \[2, 0, 8\]"),
        (
            {"cache": cache.memory.double()},
            r"cache must be float32 or bfloat16 or float16 with x float32, got float64 \[2, ",
        ),
        ({"cache": cache.memory[..., :0, :]}, "cache must hold at least the 1 new tokens, got fl"),
        (
            {"cache": cache.memory[0, 0], "counters": cache.counters},
            r"cache must be \[layers, 2, 2, NH, L, D\] with NH D = 8, got float32 \[2, 2, 9, 4\]",
        ),
        (
            {"cache": cache.memory[0, 0, 0], "counters": cache.counters},
            r"cache must be \[layers, 2, 2, NH, L, D\] with NH D = 8, got float32 \[2, 9, 4\]",
        ),
        ({"cache": wide(cache.memory)}, "cache must have stride 1 in its last dimension, got 2"),
        ({"lengths": cache.lengths.int()}, r"lengths must be int64 \[2\], got int32 \[2\]"),
        ({"lengths": cache.lengths[:1]}, r"lengths must be int64 \[2\], got int64 \[1\]"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
        (parameter(0, lambda p: p[1:]), r"parameters\[0\] must be \[8\], got float32 \[7\]"),
        (
            parameter(last + 10, lambda p: p.T),
            rf"parameters\[{last + 10}\] must be \[8, 32\], got float32 \[32, 8\]",
        ),
        (
            parameter(last + 9, lambda p: p.half()),
            rf"parameters\[{last + 9}\] must have the dtype of parameters\[{last + 8}\], float32, "
            r"got float16 \[32\]",
        ),
        (
            parameter(4, lambda p: p.double()),
            r"parameters\[4\] must be float32 or bfloat16 or float16, got float64 \[8, 8\]",
        ),
        (
            parameter(2, wide),
            r"parameters\[2\] must have stride 1 in its last dimension, got 2",
        ),
    ]
    if backend.name == "cpu":
        lengths = torch.tensor([3, 9])
        wrong.append(
            (
                {"lengths": lengths},
                r"lengths must be in \[0, 8\] for 1 new tokens in a cache of 9, got 9 for row 1",
            )
        )
    for changed, message in wrong:
        refused(
            lambda changed=changed: ops.decoder_step(**right | changed),
            ValueError,
            f"decoder_step: {message}",
        )


def test_parameters_that_can_be_read_once() -> None:
    x, parameters, cache = make(1, "cpu", torch.float32, torch.float32)
    expected = ops.decoder_step(x, parameters, cache.memory.clone(), cache.lengths)
    made = ops.decoder_step(x, iter(parameters), cache.memory.clone(), cache.lengths)
    assert torch.equal(made, expected)
    refused(
        lambda: ops.decoder_step(x, iter(parameters[:12]), cache.memory, cache.lengths),
        ValueError,
        "decoder_step: parameters must be 12 for each of 2 layers, got 12$",
    )
