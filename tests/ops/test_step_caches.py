"""The caches that ops.attention_step and ops.decoder_step write: what they refuse, and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from every_op import block, randn
from mistakes import refused
from seqkern import ops
from seqkern.nn import KVCache

B, NH, NKV, L, D = 2, 4, 2, 6, 8


def attention_step(device: str, **changed: Any) -> Any:
    given: dict[str, Any] = {
        "q": randn(B, NH, 1, D).to(device),
        "k_new": randn(B, NKV, 1, D).to(device),
        "v_new": randn(B, NKV, 1, D).to(device),
        "k_cache": randn(B, NKV, L, D).to(device),
        "v_cache": randn(B, NKV, L, D).to(device),
        "positions": torch.tensor([0, 3], device=device),
    }
    return ops.attention_step(**given | changed)


def decoder_step(device: str, **changed: Any) -> Any:
    given: dict[str, Any] = {
        "x": randn(B, 1, 4).to(device),
        "parameters": [p.to(device) for p in block(4)],
        "cache": torch.zeros(1, 2, B, 2, L, 2, device=device),
        "lengths": torch.tensor([0, 3], device=device),
    }
    return ops.decoder_step(**given | changed)


def test_one_tensor_for_both_caches(backend: Any) -> None:
    cache = randn(B, NKV, L, D).to(backend.device)
    message = "attention_step: v_cache must be other memory than k_cache, got the same tensor$"
    for other in (cache, cache[:], cache.view(B, NKV, L, D)):
        before = cache.clone()
        refused(
            lambda other=other: attention_step(backend.device, k_cache=cache, v_cache=other),
            ValueError,
            message,
        )
        assert torch.equal(cache, before)
    k, v = torch.zeros(2, B, NKV, L, D, device=backend.device)
    attention_step(backend.device, k_cache=k, v_cache=v)


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_an_expanded_cache(backend: Any, name: str) -> None:
    cache = randn(1, NKV, L, D).to(backend.device).expand(B, -1, -1, -1)
    refused(
        lambda: attention_step(backend.device, **{name: cache}),
        ValueError,
        rf"attention_step: {name} must have memory for each of its elements, got an "
        r"expanded tensor float32 \[2, 2, 6, 8\] of strides \[0, 48, 8, 1\]$",
    )
    whole = torch.zeros(1, 2, 1, 2, L, 2, device=backend.device).expand(-1, -1, B, -1, -1, -1)
    refused(
        lambda: decoder_step(backend.device, cache=whole),
        ValueError,
        "decoder_step: cache must have memory for each of its elements, got an expanded tensor ",
    )


def test_strided_caches_are_taken(backend: Any) -> None:
    cache = torch.zeros(B, L, 2, NKV, D, device=backend.device)
    k, v = cache.permute(2, 0, 3, 1, 4)
    attention_step(backend.device, k_cache=k, v_cache=v)
    assert cache[0, 0].any()
    assert cache[1, 3].any()


@pytest.mark.parametrize("scale", [float("nan"), torch.tensor(torch.nan)])
def test_a_scale_that_is_no_number(backend: Any, scale: Any) -> None:
    refused(
        lambda: attention_step(backend.device, scale=scale),
        ValueError,
        r"attention_step: scale must be a number, got (tensor\()?nan\)?$",
    )


def test_counters_are_looked_at_on_every_device(backend: Any) -> None:
    zeros = torch.zeros(2 * B * NKV, dtype=torch.int32, device=backend.device)
    for step in (attention_step, decoder_step):
        step(backend.device, counters=zeros[: B * NKV])
        for wrong in (zeros[: B * NKV - 1], zeros.long(), zeros[::2]):
            refused(
                lambda step=step, wrong=wrong: step(backend.device, counters=wrong),
                ValueError,
                rf"{step.__name__}: counters must be contiguous int32 with at least 4 elements, "
                "all zero, ",
            )


def test_new_tokens_that_need_gradients(backend: Any) -> None:
    q = randn(B, NH, 1, D).to(backend.device).requires_grad_()
    refused(
        lambda: attention_step(backend.device, q=q),
        ValueError,
        r"attention_step: q, k_new, v_new .* must not need gradients; use torch.no_grad\(\)",
    )
    with torch.no_grad():
        assert not attention_step(backend.device, q=q).requires_grad


def test_caches_that_need_gradients(backend: Any) -> None:
    cache = randn(B, NKV, L, D).to(backend.device).requires_grad_()
    for name in ("k_cache", "v_cache"):
        refused(
            lambda name=name: attention_step(backend.device, **{name: cache}),
            ValueError,
            r"attention_step: .* the caches must not need gradients; use torch.no_grad\(\)",
        )
    whole = torch.zeros(1, 2, B, 2, L, 2, device=backend.device, requires_grad=True)
    refused(
        lambda: decoder_step(backend.device, cache=whole),
        ValueError,
        "decoder_step: no argument must need gradients",
    )
    with torch.no_grad():
        attention_step(backend.device, k_cache=cache)
        decoder_step(backend.device, cache=whole)


def compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(step, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("how", [lambda step: step, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("which", ["k", "v", "decoder"])
def test_autograd_learns_that_a_cache_has_changed(
    backend: Any, which: str, how: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """A graph that kept the cache's old values refuses to go on, as after torch's `copy_`."""
    shape = (1, 2, B, 2, L, 2) if which == "decoder" else (B, NKV, L, D)
    cache = torch.zeros(shape, device=backend.device)
    weight = randn(*shape).to(backend.device).requires_grad_()
    y = (weight * cache).sum()
    if which == "decoder":
        step = how(lambda cache: decoder_step(backend.device, cache=cache))
    else:
        step = how(lambda cache: attention_step(backend.device, **{f"{which}_cache": cache}))
    step(cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_caches_made_in_inference_mode(backend: Any) -> None:
    """They count no versions."""
    with torch.inference_mode():
        cache = KVCache(1, B, NKV, L, D, device=backend.device)
        k, v = cache[0]
        attention_step(backend.device, k_cache=k, v_cache=v, counters=cache.counters)
        decoder_step(backend.device, cache=torch.zeros(1, 2, B, 2, L, 2, device=backend.device))
    assert k.any()


def test_fakes_have_no_memory_to_look_at() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out: Tensor = attention_step("cpu")
    assert out.shape == (B, NH, 1, D)
