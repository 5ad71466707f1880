"""Tokens per second of whole models that decode greedily, on the CPU.

python -m benchmarks.decode [small] [large] [--seconds S] [--threads N] [--batch B]

`small` is nanoGPT's CPU configuration (4 layers of 128, context 64), beside a model that reads its
window anew for each token, as nanoGPT's sampling does, and a plain PyTorch loop with a static cache
of keys and values. `large` has GPT-2's shape with random weights, beside transformers'
`GPT2LMHeadModel.generate` on the same weights where that is installed; their tokens are compared.
`--batch` decodes so many rows of it together.
Rounds are interleaved; a line has the median and quartiles of the tokens per second, and the median
over the rounds of the ratio to ours.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import WallTimer, interleave
from seqkern.models import GPT, GPTConfig


def window_loop(model: Any, prompt: Tensor, new: int) -> Tensor:
    """Crop to the context, read all of it, softmax of the last logits, multinomial."""
    tokens = prompt
    for _ in range(new):
        logits = model(tokens[:, -model.config.context :])[:, -1]
        drawn = torch.multinomial(F.softmax(logits, dim=-1), 1)
        tokens = torch.cat((tokens, drawn), dim=1)
    return tokens


def cache_loop(model: Any, prompt: Tensor, new: int) -> Tensor:
    """PyTorch's operations on a static cache, greedily."""
    config = model.config
    NH, D = config.heads, config.hidden // config.heads
    B = prompt.shape[0]
    memory = torch.zeros(config.layers, 2, B, NH, config.context, D)
    tokens, at = prompt, 0
    read = prompt
    for _ in range(new):
        T = read.shape[1]
        x = model.embedding(read) + model.positions(torch.arange(at, at + T))
        for block, (k_cache, v_cache) in zip(model.blocks, memory, strict=True):
            qkv = block.attention.qkv(block.attention_norm(x)).view(B, T, 3, NH, D)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            k_cache[:, :, at : at + T] = k
            v_cache[:, :, at : at + T] = v
            y = F.scaled_dot_product_attention(
                q, k_cache[:, :, : at + T], v_cache[:, :, : at + T], is_causal=T > 1
            )
            x = x + block.attention.out(y.transpose(1, 2).reshape(B, T, NH * D))
            x = x + block.mlp(block.mlp_norm(x))
        at += T
        logits = F.linear(model.norm(x[:, -1]), model.embedding.weight)
        read = logits.argmax(dim=-1, keepdim=True)
        tokens = torch.cat((tokens, read), dim=1)
    return tokens


def gpt2_like(model: GPT) -> Any:
    """Transformers' GPT-2 with the weights of ours; None where it is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    c = model.config
    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.context,
        n_embd=c.hidden,
        n_layer=c.layers,
        n_head=c.heads,
        activation_function="gelu",
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs: Any = GPT2LMHeadModel(config)
    theirs.eval()
    state = {
        "wte.weight": model.embedding.weight,
        "wpe.weight": model.positions.weight,
        "ln_f.weight": model.norm.weight,
        "ln_f.bias": model.norm.bias,
    }
    names = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for n, block in enumerate(model.blocks):
        ours: Any = block.step_parameters(model.norm.eps)  # type: ignore[operator]
        for i, name in enumerate(names):
            weight, bias = ours[2 * i], ours[2 * i + 1]
            # Its linear layers keep the transposed weight.
            state[f"h.{n}.{name}.weight"] = weight.t() if weight.dim() == 2 else weight
            state[f"h.{n}.{name}.bias"] = bias
    theirs.transformer.load_state_dict(state)
    return theirs


def spread_out(config: GPTConfig) -> GPT:
    """Random weights, larger than a fresh model's: greedy chains that are not constant."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embedding" not in name:
                parameter.mul_(3)
    return model


def report(
    title: str, calls: dict[str, Callable[[], Tensor]], new: int, seconds: float, most: int
) -> None:
    """Time the calls, each of which makes `new` tokens."""
    with torch.no_grad():
        measured = interleave(
            calls, timer=WallTimer(), seconds=seconds, min_sample=0, warmup=0, max_rounds=most
        )
    print(f"{title}, {measured.rounds} rounds")
    ours = next(iter(calls))
    for name in calls:
        s = measured.seconds(name)
        ratio = measured.speedup(ours, name).median
        print(
            f"  {name:<34} {new / s.median:8.1f} tokens/s ({new / s.q3:.1f} to {new / s.q1:.1f})"
            f"   ours is {ratio:.2f} times as fast"
        )


def small(seconds: float) -> None:
    """4 x 128, V 65, context 64."""
    config = GPTConfig(vocab_size=65, context=64, hidden=128, layers=4, heads=4)
    model = spread_out(config)
    prompt, new = torch.tensor([[1]]), 63
    with torch.no_grad():
        same = torch.equal(
            model.generate(prompt, new, temperature=0), cache_loop(model, prompt, new)
        )
    print(f"greedy tokens of the plain loop with a cache: {'the same' if same else 'DIFFERENT'}")
    calls = {
        "seqkern": lambda: model.generate(prompt, new, seed=0),
        "seqkern, greedy": lambda: model.generate(prompt, new, temperature=0),
        "window anew, multinomial": lambda: window_loop(model, prompt, new),
        "plain loop with a cache, greedy": lambda: cache_loop(model, prompt, new),
    }
    report("GPT 4 x 128, V 65, context 64, B 1, 63 tokens", calls, new, seconds, 200)


def large(seconds: float, new: int, batch: int) -> None:
    """12 x 768, V 50257."""
    config = GPTConfig(vocab_size=50257, context=1024, hidden=768, layers=12, heads=12)
    model = spread_out(config)
    rounded = GPT(config).eval()
    rounded.load_state_dict(model.state_dict())
    rounded.bfloat16()
    prompt = torch.randint(config.vocab_size, (batch, 128))
    calls: dict[str, Callable[[], Tensor]] = {
        "seqkern": lambda: model.generate(prompt, new, temperature=0),
        "seqkern, bfloat16 weights": lambda: rounded.generate(prompt, new, temperature=0),
        "plain loop with a cache": lambda: cache_loop(model, prompt, new),
    }
    theirs = gpt2_like(model)
    if theirs is None:
        print("transformers is not installed")
    else:
        mask = torch.ones_like(prompt)
        calls["transformers"] = lambda: theirs.generate(
            prompt, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new
        )
        with torch.no_grad():
            a, b = calls["seqkern"](), calls["transformers"]()
        agree = (a == b)[:, 128:].long().cumprod(1).sum(1).tolist()
        print(f"greedy tokens that agree with transformers', each row: {agree} of {new}")
        print(f"different tokens of the first row: {len(set(a[0, 128:].tolist()))}")
        their_rounded = copy.deepcopy(theirs).bfloat16()
        calls["transformers, bfloat16"] = lambda: their_rounded.generate(
            prompt, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new
        )
    title = f"GPT 12 x 768, V 50257, prompt 128, B {batch}, {new} tokens"
    report(title, calls, batch * new, seconds, 20)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Tokens per second of whole models.")
    parser.add_argument("models", nargs="*", choices=["small", "large"], default=["small", "large"])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, default=128, help="tokens of the large model")
    parser.add_argument("--batch", type=int, default=1, help="rows of the large model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "small" in args.models:
        small(args.seconds)
    if "large" in args.models:
        large(args.seconds, args.new, args.batch)


if __name__ == "__main__":
    main()
