"""nn.CausalSelfAttention against PyTorch's modules and functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ops.attention_cases import BACKENDS
from seqkern import nn

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def make(backend: Any, *args: Any, **options: Any) -> nn.CausalSelfAttention:
    return nn.CausalSelfAttention(*args, **options).to(backend.device)


def test_is_torchs_multihead_attention(backend: Any) -> None:
    layer = make(backend, 12, 3)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True, device=backend.device)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(layer.qkv.weight)
        theirs.in_proj_bias.copy_(layer.qkv.bias)
        theirs.out_proj.load_state_dict(layer.out.state_dict())
    x = torch.randn(2, 9, 12, device=backend.device)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9, device=backend.device)
    expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(layer(x), expected)


def by_hand(layer: nn.CausalSelfAttention, x: Tensor, mask: Tensor) -> Tensor:
    """The layer in PyTorch's functions, keys and values repeated for their groups."""
    B, T, _ = x.shape
    NH, NKV, D = layer.num_heads, layer.num_kv_heads, layer.head_dim
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).split([NH * D, NKV * D, NKV * D], -1)
    q = q.view(B, T, NH, D).transpose(1, 2)
    k, v = (
        t.view(B, T, NKV, D).transpose(1, 2).repeat_interleave(NH // NKV, dim=1) for t in (k, v)
    )
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scale)
    return F.linear(y.transpose(1, 2).reshape(B, T, NH * D), layer.out.weight, layer.out.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"scale": 0.7}, {"head_dim": 5}], ids=str)
def test_grouped_heads_and_gradients(backend: Any, bias: bool, options: dict[str, Any]) -> None:
    layer = make(backend, 16, 4, 2, bias=bias, **options)
    x = torch.randn(2, 9, 16, device=backend.device)
    mask = torch.ones(9, 9, dtype=torch.bool, device=backend.device).tril()
    if layer.window:
        mask = mask.triu(1 - layer.window)
    expected = by_hand(layer, x, mask)
    actual = layer(x)
    torch.testing.assert_close(actual, expected)
    parameters = list(layer.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(actual.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_lengths_and_packing(backend: Any) -> None:
    layer = make(backend, 8, 2)
    x = torch.randn(1, 9, 8, device=backend.device)
    first, second = layer(x[:, :4]), layer(x[:, 4:])
    packed = layer(x, cu_seqlens=torch.tensor([0, 4, 9], device=backend.device))
    torch.testing.assert_close(packed, torch.cat([first, second], 1))
    padded = layer(x, lengths=torch.tensor([4], device=backend.device))
    torch.testing.assert_close(padded[:, :4], first)


def test_dropout_in_training_alone(backend: Any) -> None:
    layer = make(backend, 8, 2, dropout=0.5)
    x = torch.randn(1, 9, 8, device=backend.device)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_repr_shows_what_is_set(backend: Any) -> None:
    layer = make(backend, 8, 2, window=3)
    assert layer.extra_repr() == "8, num_heads=2, num_kv_heads=2, window=3, head_dim=4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "embed_dim must be a multiple of num_heads .* got 8 and 3"),
        (
            {"num_heads": 4, "num_kv_heads": 3},
            "num_kv_heads must divide num_heads, got 3 and 4",
        ),
        ({"num_heads": 4, "dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_arguments(backend: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"CausalSelfAttention: {message}"):
        nn.CausalSelfAttention(8, **arguments)
