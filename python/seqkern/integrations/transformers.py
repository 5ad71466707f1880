"""`attn_implementation="seqkern"` for the models of the transformers package.

Two functions are registered: one that makes a batch's mask, once per forward, and one that attends,
in every layer. The mask is

* None where attention is causal (within a window, if the layer has one), the last query stands at
  the last key and nothing is padded: our kernel, grouped heads, window and soft-cap included;
* [B, T] where a whole batch with padding is read at once: the rows are packed one after the other
  without their padding, for our kernel;
* [B, 1, Tq, Tk] for the rest (a step after padding, static caches, custom patterns): torch's.

The first two would be misread by attention that is a model's own. So such models are refused, and
where a configuration is of no model that was seen, its mask is the one of transformers' own eager
attention, which every attention reads.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from seqkern import ops
from seqkern.errors import UserError, missing_extra
from seqkern.ops._autocast import autocast

NAME = "seqkern"
_MAX_HEAD_WIDTH = 256
#: Whether models with a class of configurations attend by `attention`, as far as is known.
_attend: dict[type, bool] = {}


def register() -> None:
    """Make `attn_implementation="seqkern"` known to transformers; again changes nothing.

    Supported are the models that use its attention interface, as GPT-2, Llama, Mistral, Qwen and
    Gemma: training, prefill, cache, padding, grouped-query attention, sliding windows and
    soft-capping. What our kernel does not take (bidirectional and cross-attention, custom masks)
    runs on torch's. Dropout drops other weights than torch for the same seed. A model with
    attention of its own, as Bloom and MPT, is refused by a ValueError when it is made.

    Raises:
        UserError: transformers is not installed, or a version without these interfaces.

    Example:
        >>> import transformers
        >>> from seqkern.integrations.transformers import register
        >>> register()
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
        >>> model = transformers.LlamaForCausalLM._from_config(
        ...     config, attn_implementation="seqkern")
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 32])
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise missing_extra("transformers", "transformers", 'attn_implementation="seqkern"') from (
            error
        )
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask  # noqa: F401 (is it there?)
    except ImportError as error:
        raise UserError(
            f"transformers {transformers.__version__} has no attention interface: "
            "pip install 'seqkern[transformers]'"
        ) from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    _refuse_unsupported(transformers.PreTrainedModel)


# ---------------------------------------------------------------- which models


def _refuse_unsupported(base: Any) -> None:
    """Let each model say no to us where it says no to torch's attention: it has no hook for it."""
    check = base.get_correct_attn_implementation
    if getattr(check, "_asks_seqkern", False):
        return

    @functools.wraps(check)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> Any:
        kind = type(self)
        if _own_attention(kind):  # even if not asked for: a configuration may be changed later
            _attend[type(self.config)] = False
        if requested_attention == NAME:
            if reason := _why_not(kind):
                raise ValueError(
                    f'{kind.__name__} does not support attn_implementation="{NAME}": {reason}'
                )
            _attend.setdefault(type(self.config), True)
        return check(self, requested_attention, *args, **kwargs)

    checked._asks_seqkern = True  # type: ignore[attr-defined]
    base.get_correct_attn_implementation = checked


def _why_not(kind: Any) -> str:
    """Why a class of models cannot attend by `attention`; empty if it can."""
    if own := _own_attention(kind):
        return f"{own} does not use transformers' attention interface"
    # Who reads no mask of torch's attention reads none of ours: None may mean causal there.
    if not (kind._supports_sdpa or kind._supports_attention_backend):
        return "its _supports_sdpa and _supports_attention_backend are False"
    return ""


def _own_attention(kind: type) -> str:
    """The attention of a class of models that cannot be another one; empty if there is none.

    As transformers has it: attention in a model's file that has no attention interface.
    """
    from transformers import AttentionInterface, PreTrainedModel

    for base in kind.__mro__:
        if base is PreTrainedModel:
            break
        found = vars(sys.modules.get(base.__module__, object))
        if any(isinstance(value, AttentionInterface) for value in found.values()):
            continue
        for name, value in found.items():
            if (
                "Attention" in name
                and isinstance(value, type)
                and torch.nn.Module in value.__bases__
                and value.__module__ == base.__module__
            ):
                return name
    return ""


def _attends(config: Any) -> bool:
    """Whether the model of a configuration is sure to attend by `attention`."""
    kind = type(config)
    # A model may have been unpickled, or its configuration changed by hand.
    if kind not in _attend and not torch.compiler.is_compiling():
        module = sys.modules.get(kind.__module__.replace("configuration_", "modeling_"))
        models = [
            value
            for value in vars(module or object).values()
            if isinstance(value, type) and getattr(value, "config_class", None) is kind
        ]
        _attend[kind] = bool(models) and not any(map(_why_not, models))
    return _attend.get(kind, False)


# ---------------------------------------------------------------- the mask of a batch


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **options: Any,
) -> Tensor | None:
    """What `attention` gets as its mask: see the module.

    Args:
        batch_size: B.
        q_length: Tq.
        kv_length: Tk.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        attention_mask: bool [B, keys so far], False for padding.
        local_size: of a window or chunk.
        allow_is_causal_skip: whether the pattern is the plain one of the layer's kind.
        config: of the model.
        options: for transformers' own function.
    """
    from transformers.masking_utils import eager_mask, prepare_padding_mask, sdpa_mask

    attends = _attends(config)
    chunked = local_size is not None and local_size != getattr(config, "sliding_window", None)
    bidirectional = options.get("allow_is_bidirectional_skip", False)
    plain = allow_is_causal_skip and not chunked and not bidirectional
    if attends and plain and isinstance(q_offset, int):
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if q_offset + q_length == kv_offset + kv_length:
            if padding is None:
                return None
            if not torch.compiler.is_compiling():  # these look at the mask's values
                if bool(padding.all()):
                    return None
                if q_length == kv_length and (local_size is None or _contiguous(padding)):
                    return padding
    make = sdpa_mask if attends else eager_mask
    full: Tensor | None = make(
        batch_size,
        q_length,
        kv_length,
        q_offset,  # type: ignore[arg-type]  # static caches have a tensor
        kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        config=config,
        **options,
    )
    return full


def _contiguous(padding: Tensor) -> bool:
    """Whether each row's tokens follow one another: a window counts positions, not tokens."""
    starts = padding[:, 1:] & ~padding[:, :-1]
    return bool((starts.sum(-1) + padding[:, 0] <= 1).all())


# ---------------------------------------------------------------- attention of a layer


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the layer.
        query: [B, NH, Tq, D].
        key: [B, NKV, Tk, D].
        value: [B, NKV, Tk, D].
        attention_mask: from `mask`, or a custom one [B, 1, Tq, Tk].
        dropout: probability.
        scaling: factor of the scores.
        sliding_window: keys a query sees at most.
        softcap: bound of the scores.
        is_causal: overrides the layer's.
        position_bias: added to the scores.
        kwargs: what only other implementations read.

    Returns:
        [B, Tq, NH, D], and None for the weights, which are never there.

    Raises:
        ValueError: attention sinks or a paged cache, which only other implementations have.
    """
    for option in ("s_aux", "cache"):
        if kwargs.get(option) is not None:
            raise ValueError(f'attn_implementation="seqkern" does not support {option}')
    # As of torch's attention: rotary embeddings leave q and k in float32 beside a v of 16 bits.
    query, key, value = autocast(query, key, value)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    kernel: dict[str, Any] = {
        "scale": scaling,
        "window": sliding_window,
        "softcap": softcap or 0.0,
        "dropout_p": dropout,
    }
    Tq, T, D = query.shape[2], key.shape[2], key.shape[3]
    fits = causal and position_bias is None and Tq <= T
    fits = fits and value.shape[3] == D <= _MAX_HEAD_WIDTH
    padded = attention_mask is not None and attention_mask.dim() == 2
    if fits and attention_mask is None:
        return ops.causal_attention(query, key, value, **kernel).transpose(1, 2), None
    if fits and padded:
        assert attention_mask is not None
        return _packed(query, key, value, attention_mask, kernel), None
    if padded:
        assert attention_mask is not None
        attention_mask = _full(attention_mask, sliding_window if causal else None, causal)
    unlike_torchs = softcap or sliding_window is not None or 1 < Tq < T
    if attention_mask is None and causal and Tq <= T and unlike_torchs:
        # Torch's causal attention has no window, and its first query stands at the first key.
        attention_mask = _causal(Tq, T, sliding_window, query.device)[None, None]
    if softcap:
        return _capped(query, key, value, attention_mask, position_bias, kernel), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    result: tuple[Tensor, None] = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=causal,
        position_bias=position_bias,
    )
    return result


def _packed(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, kernel: dict[str, Any]) -> Tensor:
    """Attention of rows of which only `tokens` [B, T] exist; 0 for the others."""
    B, T = tokens.shape
    where = tokens.flatten().nonzero().squeeze(1)  # [N] in the order of rows and positions
    lengths = tokens.sum(-1, dtype=torch.int32)
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))  # [B + 1]

    def packed(x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(0, 1)  # [B T, heads, D]
        return rows.index_select(0, where).transpose(0, 1)[None]  # [1, heads, N, D]

    out = ops.causal_attention(packed(q), packed(k), packed(v), cu_seqlens=starts, **kernel)
    rows = out[0].transpose(0, 1)  # [N, NH, D]
    padded: Tensor = rows.new_zeros(B * T, *rows.shape[1:])
    padded = padded.index_copy(0, where, rows)
    return padded.view(B, T, *rows.shape[1:])  # [B, T, NH, D]


def _full(tokens: Tensor, window: int | None, causal: bool) -> Tensor:
    """[B, T] as [B, 1, T, T]."""
    T = tokens.shape[1]
    see = tokens[:, None, None, :].expand(-1, 1, T, T)
    return see & _causal(T, T, window, tokens.device) if causal else see


def _causal(Tq: int, T: int, window: int | None, device: torch.device) -> Tensor:
    """[Tq, T] of queries of which the last stands at the last key."""
    see = torch.ones(Tq, T, dtype=torch.bool, device=device).tril(T - Tq)
    return see if window is None else see.triu(T - Tq + 1 - window)


def _capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    kernel: dict[str, Any],
) -> Tensor:
    """Attention with soft-capping and any mask, in plain torch, which has no kernel for it."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = q.shape[-1] ** -0.5 if kernel["scale"] is None else kernel["scale"]
    cap = kernel["softcap"]
    scores = torch.tanh(q @ k.transpose(2, 3) * scale / cap) * cap  # [B, NH, Tq, Tk]
    for added in (bias, mask):
        if added is None:
            continue
        if added.dtype == torch.bool:
            # Not -inf: a query of padding sees nothing, and its softmax must not be NaN.
            scores = scores.masked_fill(~added, torch.finfo(scores.dtype).min)
        else:
            scores = scores + added
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    weights = torch.nn.functional.dropout(weights, kernel["dropout_p"], kernel["dropout_p"] > 0)
    out: Tensor = weights @ v
    return out.transpose(1, 2)  # [B, Tq, NH, D]
