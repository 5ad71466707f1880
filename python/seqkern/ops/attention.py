"""Causal attention that stores no scores, forward and backward."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from seqkern import reference
from seqkern.ops import _registry
from seqkern.ops._autocast import agreed
from seqkern.ops._double_backward import differentiable_backward
from seqkern.ops._fakes import check_shape, register_fake
from seqkern.ops._mistakes import checked


@overload
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: Literal[False] = False,
    dropout_seed: Tensor | None = None,
) -> Tensor: ...


@overload
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: Literal[True],
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


@checked("attention")
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    dropout_seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention of each query to the keys up to its own position.

    Query :math:`i` stands at position :math:`p = i + T_k - T_q` (so the last query is aligned with
    the last key) and sees the keys :math:`j \le p`, with `window` only :math:`j > p - window`. With

    .. math:: s_{ij} = \mathrm{cap}(\mathrm{scale}\; q_i \cdot k_j) - m_h (p - j), \qquad
              \mathrm{lse}_i = \log \sum_j e^{s_{ij}}, \qquad
              o_i = \sum_j e^{s_{ij} - \mathrm{lse}_i} v_j

    where cap(x) = softcap tanh(x / softcap) if softcap > 0 (Gemma 2), and :math:`m_h` are the
    slopes of ALiBi. Derivations in docs/math/attention.md.

    Args:
        q: queries [B, NH, Tq, D], float32, float64, float16 or bfloat16, D from 1 to 256. Any
            strides; read where they are when the last dimension has stride 1.
        k: keys [B, NKV, Tk, D], Tk >= Tq. NH is a multiple of NKV: query head h reads key head
            h // (NH // NKV), and nothing is copied for it.
        v: values [B, NKV, Tk, D], of the dtype of q and k; where autocast is on and the three
            differ, as after rotary embeddings in float32, all are cast to its dtype.
        scale: factor of the scores, 1 / sqrt(D) by default.
        window: how many keys a query sees at most, itself among them; None for all.
        softcap: bound of the scores; 0 for none.
        alibi_slopes: [NH] or [B, NH], floating point, rounded to float32. They get no gradient.
        dropout_p: probability in [0, 1) with which a weight is dropped; the others are divided by
            1 - dropout_p.
        lengths: int32 or int64 [B], how many keys of each row exist (the rest is padding on the
            right), from 0 to Tk. Queries at positions beyond have output 0.
        cu_seqlens: int32 or int64 [S + 1]: where each of S sequences packed one after the other in
            q, k, v [1, heads, N, D] begins, and where the last ends. Each attends to itself alone.
        return_lse: return also the log-sum-exp per query. It is differentiable.
        dropout_seed: int64 [1] on the device of q: the mask is a function of it and of the
            positions, the same on CPU and GPU and in the backward pass. By default drawn from
            torch's generator, so that `torch.manual_seed` governs it.

    Returns:
        The output [B, NH, Tq, D] in the dtype of q, laid out as [B, Tq, NH, D], so that
        `out.transpose(1, 2).reshape(B, Tq, NH * D)` copies nothing; with `return_lse` a pair with
        the log-sum-exp [B, NH, Tq], float64 for float64 inputs and float32 otherwise. A query that
        sees no key has output 0, log-sum-exp -inf and no gradient.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit; on the CPU also lengths
            outside [0, Tk] and cu_seqlens that decrease or leave [0, N].

    Source: Dao et al. 2022, arXiv:2205.14135; the options as in
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html

    Example:
        >>> q, k, v = (torch.randn(2, 8, 128, 64) for _ in range(3))
        >>> out = seqkern.ops.causal_attention(q, k, v, window=32)
    """
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1 or None, got {window}")
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("attention: alibi_slopes has no gradient here; pass alibi_slopes.detach()")
    if dropout_p > 0 and dropout_seed is None:
        dropout_seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=q.device)
    q, k, v = agreed(q, k, v)
    inputs = (
        q,
        k,
        v,
        lengths,
        cu_seqlens,
        alibi_slopes,
        dropout_seed if dropout_p > 0 else None,
        scale if scale is not None else q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 0.0,
        window or 0,
        softcap,
        dropout_p,
    )
    if torch.compiler.is_compiling():
        out, lse = _registry.active.attention(*inputs)
    elif _registry.is_transformed(q, k, v):
        plain: Any = _plain
        *tensors, factor, reach, cap, p = inputs
        out, lse = plain(*tensors, scale=factor, window=reach, softcap=cap, dropout_p=p)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _registry.call(_Attention.apply, *inputs)
    else:
        out, lse = _registry.call(_registry.active.attention_forward, *inputs)
    return (out, lse) if return_lse else out


# ---------------------------------------------------------------- fakes


def _fake(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    check_shape("attention", "q", q, (None,) * 4)
    check_shape("attention", "k", k, (q.shape[0], None, None, q.shape[3]))
    check_shape("attention", "v", v, k.shape)
    check_shape("attention", "lengths", lengths, q.shape[:1])
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=acc)


def _fake_backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


def _empty_heads(like: Tensor) -> Tensor:
    B, heads, T, D = like.shape
    return like.new_empty((B, T, heads, D)).transpose(1, 2)


# ---------------------------------------------------------------- gradients


class _Attention(torch.autograd.Function):
    """The gradient as eager code takes it: the functions that are registered too, without the cost
    of `torch.library`'s autograd wrapper.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _registry.active.attention_forward(*inputs)
        _setup(ctx, inputs, output)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, window, softcap, dropout_p = inputs
    ctx.ops = _registry.active
    ctx.options = (scale, window, softcap, dropout_p)
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, *others, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 11
    op = partial(ctx.ops.attention_backward, dout, dlse, q, k, v, out, lse, *others, *ctx.options)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        scale, window, softcap, dropout_p = ctx.options
        plain = partial(_plain, scale=scale, window=window, softcap=softcap, dropout_p=dropout_p)
        made = [i if needed else None for i, needed in enumerate(ctx.needs_input_grad[:3])]
        grads = differentiable_backward(op, plain, made, (dout, dlse), (q, k, v, *others))
    else:
        grads = op()
    wanted = zip(grads, ctx.needs_input_grad, strict=False)
    return *(grad if needed else None for grad, needed in wanted), *(None,) * 8


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    *,
    scale: float,
    window: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The reference, in the precision of the kernels."""
    acc = torch.promote_types(q.dtype, torch.float32)
    out, lse = reference.causal_attention(
        q.to(acc),
        k.to(acc),
        v.to(acc),
        scale=scale,
        window=window or None,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        dropout_seed=seed,
    )
    return out.to(q.dtype), lse


@_registry.registration
def register(namespace: str) -> None:
    """Add fakes and gradients to the ops of `namespace`.

    No autocast rule: the kernels accumulate in float32 from any inputs.
    """
    register_fake(namespace, "attention", _fake)
    register_fake(namespace, "attention_forward", _fake)
    register_fake(namespace, "attention_backward", _fake_backward)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        _setup(ctx, inputs, output)
        ctx.ops = getattr(torch.ops, namespace)

    torch.library.register_autograd(f"{namespace}::attention", _backward, setup_context=setup)
