"""Problems, runs and the float64 truth that the tests of attention share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern import ops, reference

#: Where attention has kernels: the one place to add a backend.
BACKENDS = ["cpu", "emu", "cuda"]
#: Those that run at full speed.
NATIVE = [name for name in BACKENDS if name != "emu"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Sizes:
    B: int = 2
    NH: int = 2
    NKV: int = 2
    Tq: int = 17
    Tk: int = 17
    D: int = 8

    def __str__(self) -> str:
        return "-".join(f"{k}{v}" for k, v in vars(self).items())


def make(sizes: Sizes, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v: made on the CPU, so that every backend gets the same."""
    s = sizes
    shapes = [(s.B, s.NH, s.Tq, s.D), (s.B, s.NKV, s.Tk, s.D), (s.B, s.NKV, s.Tk, s.D)]
    q, k, v = (torch.randn(shape).to(device=device, dtype=dtype) for shape in shapes)
    return q, k, v


def run(function: Any, qkv: Any, flip: bool = False, **options: Any) -> list[Tensor]:
    """Output, log-sum-exp where the function gives it, and dq, dk, dv under uneven gradients
    (those of the output reversed along D with `flip`).
    """
    leaves = [t.detach().clone().requires_grad_() for t in qkv]
    result = function(*leaves, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    grads = torch.autograd.grad(outputs, leaves, [_upstream(o, flip) for o in outputs])
    return [*(o.detach() for o in outputs), *grads]


def _upstream(output: Tensor, flip: bool = False) -> Tensor:
    wave = torch.linspace(0.0, 17.0, max(output.numel(), 1), device=output.device).sin() + 0.1
    wave = wave.reshape(output.shape).to(output.dtype)
    return wave.flip(-1) if flip and output.dim() == 4 else wave


def ours(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return ops.causal_attention(q, k, v, return_lse=True, **options)


def torchs(qkv: Any, **options: Any) -> list[Tensor]:
    """What PyTorch's own operations make of it in the same dtype; the log-sum-exp in float32."""
    dtype = qkv[0].dtype
    acc = torch.promote_types(dtype, torch.float32)
    if dtype == torch.float64:
        # The truth itself would have no error: the same, summed over D in the other order.
        flipped = run(reference.causal_attention, [t.flip(-1) for t in qkv], flip=True, **options)
        return [t.flip(-1) if t.dim() == 4 else t for t in flipped]
    results = run(reference.causal_attention, qkv, **options)
    results[1] = reference.causal_attention(*(t.to(acc) for t in qkv), **options)[1]
    return results


def exact(qkv: Any, **options: Any) -> list[Tensor]:
    return run(reference.causal_attention, [t.double() for t in qkv], **options)


def sdpa(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """PyTorch's own, with the mask written out."""
    Tq, Tk = q.shape[2], k.shape[2]
    mask = reference.attention.visible(1, Tq, Tk, window, None, None, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def resolve(options: dict[str, Any], sizes: Sizes, device: str) -> dict[str, Any]:
    """Options of a case with their tensors: "alibi", "lengths" and "dropout" name them."""
    options = dict(options)
    if "alibi" in options:
        rows = (sizes.B,) if options.pop("alibi") == "rows" else ()
        options["alibi_slopes"] = torch.rand(*rows, sizes.NH).to(device)
    if options.pop("lengths", False):
        options["lengths"] = torch.tensor(
            [(sizes.Tk, sizes.Tk - 1, sizes.Tk // 2, 0)[b % 4] for b in range(sizes.B)]
        ).to(device)
    if "dropout" in options:
        options["dropout_p"] = options.pop("dropout")
        options["dropout_seed"] = torch.tensor([2**40 + 7], device=device)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], device=device)
    return options


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "negative-scale": {"scale": -0.4},
    "window": {"window": 5},
    "window-1": {"window": 1},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": "heads"},
    "alibi-rows": {"alibi": "rows"},
    "lengths": {"lengths": True},
    "dropout": {"dropout": 0.3},
    "all": {"lengths": True, "alibi": "rows", "softcap": 2.0, "dropout": 0.2, "window": 9},
}


def with_heads(sizes: Sizes, NH: int, NKV: int) -> Sizes:
    return replace(sizes, NH=NH, NKV=NKV)
