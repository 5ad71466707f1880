"""Softmax in plain PyTorch: the definition the kernels are tested against."""

from __future__ import annotations

from torch import Tensor


def softmax(x: Tensor, log: bool = False) -> Tensor:
    """exp(x - m) / s over the last dimension, or with `log` x - m - log s."""
    d = x - x.amax(-1, keepdim=True)
    s = d.exp().sum(-1, keepdim=True)
    return d - s.log() if log else d.exp() / s


def softmax_backward(dy: Tensor, y: Tensor, log: bool = False) -> Tensor:
    """The gradient of x, from that of y and y itself."""
    if log:
        return dy - y.exp() * dy.sum(-1, keepdim=True)
    return y * (dy - (dy * y).sum(-1, keepdim=True))
