"""The next token of a language model: penalties, truncation and the draw in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqkern.ops import _registry
from seqkern.ops._fakes import check_shape, register_fake
from seqkern.ops._mistakes import checked

_LOGPROBS = {"drawn": False, "model": True}


def _diagnosis(error: Exception, **_: Any) -> Exception | None:
    # The kernels count in int32, and what they say of counts is about those.
    text = str(error).replace("int32 [", "int32 or int64 [", 1)
    return ValueError(text) if text.startswith("sample: token_counts must be ") else None


@checked("sample", _diagnosis)
def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    token_counts: Tensor | None = None,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    logprobs: str = "drawn",
) -> tuple[Tensor, Tensor]:
    r"""Draw one token per row of `logits`.

    For a row :math:`x` with tokens seen :math:`c` times, in this order:

    1. penalties: where :math:`c_v > 0`, :math:`y_v = x_v / r` if :math:`x_v > 0` else
       :math:`x_v r`, less frequency_penalty :math:`c_v` and presence_penalty; else
       :math:`y_v = x_v`;
    2. temperature: :math:`p = \mathrm{softmax}(y / T)`; at 0 the token of the largest score;
    3. top-k: the k tokens of the largest scores stay;
    4. top-p: in falling order, tokens stay as long as the sum before them is below top_p (the
       first always does);
    5. min-p: tokens of at least min_p times the largest probability stay;
    6. the draw, from what stays, renormalised.

    Equal scores rank by lower id throughout. Only row, options, seed and step decide: not the rows
    around it, nor the number of threads; the CPU and CUDA take the same token for the same
    float32 logits. Nothing is sorted and nothing waits for the device.

    Args:
        logits: [B, V], any floating dtype, taken as float32; -inf bans a token.
        temperature: at least 0.
        top_k: at least 0; 0 for all tokens.
        top_p: in (0, 1].
        min_p: in [0, 1].
        repetition_penalty: r, above 0; of Keskar et al. 2019.
        presence_penalty: taken off the score of each token seen.
        frequency_penalty: taken off once per occurrence.
        token_counts: int32 or int64 [B, V], how often each token was seen; penalties need it.
        seed: an integer, each row having its own stream of random numbers; or int64 [B], where a
            row draws the same in any batch.
        step: the position being drawn: the same seed and step draw the same number.
        logprobs: "drawn": of the distribution drawn from, after all steps; "model": of
            softmax(logits).

        Each option from temperature to frequency_penalty, seed and step is a number, or a tensor
        [B] on the device of the logits.

    Returns:
        tokens int64 [B], and the logarithms of their probabilities, float32 [B].

    Raises:
        ValueError: a shape, dtype, device or option that does not fit; on the CPU also a value of a
            tensor of options outside its range, and a row with NaN or +inf, or with nothing above
            -inf. On CUDA such a row gives token -1 and log-probability NaN.

    Source: docs/math/sample.md; random numbers: Philox4x32-10, Salmon et al. 2011.

    Example:
        >>> logits = torch.tensor([[0.0, 9.0, 1.0], [5.0, 0.0, 5.0]])
        >>> seqkern.ops.sample(logits, temperature=0)[0]
        tensor([1, 0])
    """
    if logprobs not in _LOGPROBS:
        raise ValueError(f"sample: logprobs must be 'drawn' or 'model', got {logprobs!r}")
    numbers: list[float] = []
    rows: list[Tensor | None] = []
    for option, default in (
        (temperature, 1.0),
        (top_k, 0),
        (top_p, 1.0),
        (min_p, 0.0),
        (repetition_penalty, 1.0),
        (presence_penalty, 0.0),
        (frequency_penalty, 0.0),
        (seed, 0),
        (step, 0),
    ):
        per_row = isinstance(option, Tensor)
        numbers.append(default if per_row else option)  # type: ignore[arg-type]
        rows.append(option if per_row else None)  # type: ignore[arg-type]
    if isinstance(token_counts, Tensor) and token_counts.dtype == torch.int64:
        token_counts = token_counts.clamp(0, 2**31 - 1)  # the kernels' are int32
    op = _registry.active.sample
    result: tuple[Tensor, Tensor] = _registry.call(
        op, logits, token_counts, *numbers, *rows, _LOGPROBS[logprobs]
    )
    return result


def _fake(logits: Tensor, token_counts: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    check_shape("sample", "logits", logits, (None, None))
    check_shape("sample", "token_counts", token_counts, logits.shape)
    B = logits.shape[0]
    return logits.new_empty(B, dtype=torch.int64), logits.new_empty(B, dtype=torch.float32)


@_registry.registration
def register(namespace: str) -> None:
    """Add the fake. A draw has no gradient."""
    register_fake(namespace, "sample", _fake)
