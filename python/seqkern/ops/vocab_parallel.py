"""Linear-cross-entropy of a head whose vocabulary is spread over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqkern.ops import _registry
from seqkern.ops._autocast import autocast
from seqkern.ops._mistakes import checked
from seqkern.ops.cross_entropy import REDUCTIONS


@checked("vocab_parallel_linear_cross_entropy")
def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
    return_logprobs: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""`linear_cross_entropy` where each rank holds some rows of the head's weight.

    Every rank calls it with the same `hidden` and `target` and its own rows of `weight`; ranks hold
    consecutive parts of the vocabulary in their order, of any sizes. Each folds its logits into
    five numbers per row; maximum, sum of exponentials and target logit are then combined by two
    all-reduces of O(N) numbers. The loss is the same on every rank, and so is hidden's gradient,
    which is summed over the ranks; weight and bias get the gradient of the rank's own rows. The
    backward pass makes the logits again: 4 GEMMs instead of 3. Derivation:
    docs/math/linear_cross_entropy.md.

    Args:
        hidden: [..., H], as for `linear_cross_entropy`.
        weight: [V of this rank, H].
        target: classes of the whole vocabulary, [...].
        bias: [V of this rank] or None.
        process_group: the ranks that share the head; None is the default group.
        vocab_range: the class of this rank's first row, and the size of the whole vocabulary. None
            asks the other ranks in each call.
        class_weight: weight per class of the *whole* vocabulary.
        reduction: "none", "mean" or "sum".
        ignore_index: a target of this value adds nothing.
        label_smoothing: in [0, 1].
        z_loss: weight of the squared log-sum-exp.
        softcap: bound of the logits; 0 for none.
        return_lse: return also the log-sum-exp per row; differentiable.
        return_logprobs: return also log p(target) per row; differentiable.
        chunk_bytes: memory for logits; None chooses.

    Returns:
        As `linear_cross_entropy`. It can be differentiated once, and not compiled.

    Raises:
        ValueError: an argument that does not fit.
        IndexError: on the CPU, a target outside the whole vocabulary that is not `ignore_index`.

    Source: M. Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3.

    Example:
        >>> rows = head.weight.tensor_split(dist.get_world_size())[dist.get_rank()]
        >>> loss = seqkern.ops.vocab_parallel_linear_cross_entropy(hidden, rows, target)
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            "vocab_parallel_linear_cross_entropy: reduction must be 'none', 'mean' or 'sum', "
            f"got {reduction!r}"
        )
    if class_weight is not None and class_weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "vocab_parallel_linear_cross_entropy: class_weight has no gradient here; "
            "pass class_weight.detach()"
        )
    if vocab_range is None:
        vocab_range = _vocab_range(weight, process_group)
    outputs = _registry.call(
        _VocabParallel.apply,
        *autocast(hidden, weight, bias),
        target,
        class_weight,
        process_group,
        vocab_range,
        (ignore_index, REDUCTIONS[reduction], label_smoothing, z_loss, softcap),
        chunk_bytes or 0,
    )
    wanted = (True, return_lse, return_logprobs)
    result = tuple(out for out, want in zip(outputs, wanted, strict=True) if want)
    return result if len(result) > 1 else result[0]


def _vocab_range(weight: Tensor, group: dist.ProcessGroup | None) -> tuple[int, int]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sizes = torch.zeros(world, dtype=torch.int64, device=weight.device)
    sizes[rank] = weight.shape[0]
    dist.all_reduce(sizes, group=group)
    counts = sizes.tolist()
    return sum(counts[:rank]), sum(counts)


def _combine(state: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The ranks' row states [5, N] as one of the whole vocabulary."""
    maximum, total, target, mass, dot = state
    overall = maximum.clone()
    dist.all_reduce(overall, dist.ReduceOp.MAX, group)
    shift = maximum - overall
    moved = torch.where(mass == 0, 0, mass * shift)
    sums = torch.stack([total * shift.exp(), target, mass, dot + moved])
    dist.all_reduce(sums, group=group)
    return torch.cat([overall[None], sums])


class _VocabParallel(torch.autograd.Function):
    """Forward: own logits, two all-reduces. Backward: own logits again, one all-reduce."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, bias, target, class_weight, group, vocab_range, options, chunk_bytes = (
            inputs
        )
        ignore_index, reduction, label_smoothing, z_loss, softcap = options
        ops = _registry.active
        state = _combine(
            ops.linear_cross_entropy_state(
                hidden,
                weight,
                target,
                bias,
                class_weight,
                ignore_index,
                label_smoothing,
                softcap,
                *vocab_range,
                chunk_bytes,
            ),
            group,
        )
        maximum, total, target_logit, mass, dot = state
        V = vocab_range[1]
        y = target.reshape(-1).long()  # [N]
        valid = y != ignore_index
        in_range = (y >= 0) & (y < V)
        row_weight = torch.ones_like(total)
        if class_weight is not None:
            row_weight = class_weight.to(total.dtype)[torch.where(in_range, y, 0)]
        log_sum = total.log()
        lse = maximum + log_sum
        logprobs = torch.where(valid, (target_logit - maximum) - log_sum, 0)
        logprobs = torch.where(valid & ~in_range, torch.nan, logprobs)  # as the CUDA kernels say it
        ce = (1 - label_smoothing) * row_weight * -logprobs
        if label_smoothing > 0:
            ce = ce + torch.where(valid, label_smoothing / V * (mass * log_sum - dot), 0)
        z = torch.where(valid, z_loss * lse**2, 0) if z_loss else torch.zeros_like(lse)
        norm = total.new_ones(2)
        if reduction == REDUCTIONS["mean"]:
            norm = torch.stack(
                [(row_weight * valid).sum(), valid.sum().to(norm.dtype)]
            ).reciprocal()
        loss = ce + z
        if reduction != REDUCTIONS["none"]:
            loss = ce.sum() * norm[0]
            if z_loss:
                loss = loss + z.sum() * norm[1]
        # A norm is saved for reduced losses only.
        saved = [maximum, total] + ([norm] if reduction != REDUCTIONS["none"] else [])
        ctx.save_for_backward(hidden, weight, bias, target, class_weight, torch.cat(saved))
        ctx.ops, ctx.group, ctx.vocab_range = ops, group, vocab_range
        ctx.options, ctx.chunk_bytes = options, chunk_bytes
        ctx.set_materialize_grads(False)
        rows = target.shape
        per_row = loss.reshape(rows) if reduction == REDUCTIONS["none"] else loss
        return per_row, lse.reshape(rows), logprobs.reshape(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, class_weight, saved = ctx.saved_tensors
        dhidden, dweight, dbias = ctx.ops.linear_cross_entropy_backward(
            *upstream,
            hidden,
            weight,
            target,
            bias,
            class_weight,
            saved,
            *ctx.options,
            *ctx.vocab_range,
            *ctx.needs_input_grad[:3],
            ctx.chunk_bytes,
        )
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if wants_hidden:
            dist.all_reduce(dhidden, group=ctx.group)
        return (
            dhidden.to(hidden.dtype) if wants_hidden else None,
            dweight.to(weight.dtype) if wants_weight else None,
            dbias.to(bias.dtype) if wants_bias else None,
            *(None,) * 6,
        )
