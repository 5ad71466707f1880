"""The transformer language model: pre-norm blocks of causal attention and an MLP."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.errors import require
from seqkern.models.backends import Layers
from seqkern.models.language_model import LanguageModel, check_dropout, check_sizes
from seqkern.nn import KVCache
from seqkern.ops.attention_step import MAX_STEP_TOKENS


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`."""

    vocab_size: int
    context: int = 128  # most tokens a forward reads; the number of learned positions
    hidden: int = 256  # C, the width of the residual stream
    layers: int = 2
    heads: int = 4  # NH; D = C / NH
    dropout: float = 0.0
    tied: bool = True  # the head's weight is the embedding's

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_sizes(
            vocab_size=self.vocab_size,
            context=self.context,
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
        )
        check_dropout(self.dropout)
        require(
            self.hidden % self.heads == 0,
            f"hidden must be a multiple of heads = {self.heads}, got {self.hidden}",
        )


@dataclass
class GPTState:
    """What a `GPT` has read: the tokens [B, <= context], and their keys and values if kept.

    The next tokens are written into the cache, so a state gives it away with its first
    continuation. Another continuation of the same state reads the window anew.
    """

    window: Tensor
    cache: KVCache | None

    def take_cache(self) -> KVCache | None:
        """The cache, the first time."""
        cache, self.cache = self.cache, None
        return cache


class Attention(nn.Module):
    """Causal self-attention: position t reads positions 1 .. t."""

    def __init__(self, config: GPTConfig, layers: Layers, layer: int) -> None:
        """One product makes q, k and v of all heads; another mixes the heads."""
        super().__init__()
        self.layer = layer
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.out = nn.Linear(config.hidden, config.hidden)
        self.layers = layers

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]; an empty cache is given the keys and values."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)  # [B, T, 3, NH, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, NH, T, D]
        dropout = self.dropout if self.training else 0.0
        y = self.layers.attention(q, k, v, dropout_p=dropout)  # [B, NH, T, D]
        if cache is not None:
            cache.memory[self.layer, :, :, :, :T] = torch.stack((k, v))
        out: Tensor = self.out(y.transpose(1, 2).reshape(B, T, C))  # [B, T, C]
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: GPTConfig, layers: Layers, layer: int) -> None:
        """The MLP is four times as wide as the stream, with GELU."""
        super().__init__()
        C = config.hidden
        self.attention_norm = nn.LayerNorm(C)
        self.attention = Attention(config, layers, layer)
        self.mlp_norm = nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out

    def step_parameters(self) -> list[Tensor]:
        """Those of the block in the order of `seqkern.ops.decoder_step`."""
        attention, mlp = self.attention, self.mlp
        layers: tuple[Any, ...] = (self.attention_norm, attention.qkv, attention.out)
        layers += (self.mlp_norm, mlp[0], mlp[2])
        return [t for layer in layers for t in (layer.weight, layer.bias)]


class GPT(LanguageModel):
    """p(x_i | x_<i) by a decoder-only transformer.

    Radford et al. 2019: learned positions, normalisation before each block, and a last one before
    the head; the head's weight is the embedding's where `tied` (Press and Wolf 2017).

    Args:
        config: the sizes.
        backend: `seqkern` or `torch`; the parameters of the same seed are the same for both.

    Example:
        >>> model = GPT(GPTConfig(vocab_size=10, context=4, hidden=8, layers=1, heads=2))
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 10])
    """

    def __init__(self, config: GPTConfig, backend: str = "seqkern") -> None:
        """See the class."""
        super().__init__(config.vocab_size, config.context, backend)
        self.config = config
        C = config.hidden
        self.embedding = nn.Embedding(config.vocab_size, C)
        self.positions = nn.Embedding(config.context, C)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, self.layers, n) for n in range(config.layers))
        self.norm = nn.LayerNorm(C)
        self.head = None if config.tied else nn.Linear(C, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of 0.02; those that write to the stream shrink with the depth.

        2 * layers branches add up in the stream: 1 / sqrt(2 * layers) keeps its variance.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                writes = name.endswith(("attention.out.weight", "mlp.2.weight"))
                depth = 2 * self.config.layers if writes else 1
                nn.init.normal_(parameter, std=0.02 * depth**-0.5)
            else:
                nn.init.ones_(parameter)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, *, return_logits: bool = False
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """Logits at every position, and the loss where targets are given.

        Args:
            tokens: int64 or int32 [B, T], T from 1 to the context.
            targets: int64 [B, T], the tokens that follow.
            return_logits: make the logits beside the loss too, which costs their memory.

        Returns:
            logits [B, T, V]; with targets (None, loss) or, with return_logits, (logits, loss);
            loss is the mean cross-entropy in nats.

        Raises:
            UserError: tokens of the wrong dtype, shape or range, or longer than the context.
        """
        self.check(tokens, targets)
        return self.output(self.stream(tokens), targets, return_logits)

    def stream(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normalised residual stream [B, T, C] above the last block.

        An empty cache is given the tokens' keys and values.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.embedding(tokens) + self.positions(positions))  # [B, T, C]
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        out: Tensor = self.norm(x)
        return out

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The stream [B, C] above the last block, before the last norm, of the last of S tokens.

        The tokens [B, S], S up to 16, follow those that each row has in the cache, and join them.
        Dropout is off, and there are no gradients. Activations are float32 also where the weights
        are 16-bit: that is more exact than 16-bit ones, and what is read is the weights.
        """
        places = cache.lengths[:, None]  # [B, 1]
        if tokens.shape[1] > 1:
            places = places + torch.arange(tokens.shape[1], device=tokens.device)  # [B, S]
        x = self.embedding(tokens) + self.positions(places)  # [B, S, C]
        if x.dtype != torch.float64:
            x = x.float()
        assert self.layers.decoder_step is not None
        blocks: Any = self.blocks
        x = self.layers.decoder_step(
            x,
            [t for block in blocks for t in block.step_parameters()],
            cache.memory,
            cache.lengths,
            eps=self.norm.eps,
            counters=cache.counters,
        )  # [B, S, C]
        cache.advance(tokens.shape[1])
        return x[:, -1]

    def step_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits [B, V] of the token after the new ones [B, S], read as `step` does."""
        assert self.layers.linear_step is not None
        norm = self.norm
        return self.layers.linear_step(
            self.step(tokens, cache),
            self.head_parameters()[0],
            norm="layer_norm",
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
        )

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The embedding's weight where it is tied."""
        return (self.embedding if self.head is None else self.head).weight, None

    def next_logits(self, tokens: Tensor, state: GPTState | None = None) -> tuple[Tensor, GPTState]:
        """Read tokens [B, T] after `state`: logits [B, V] of the next token, and the new state.

        Up to the context a token is read once, and its keys and values kept. Past it the window
        slides: every token's position changes, and the window is read anew.
        """
        held = 0 if state is None else state.window.shape[1]
        window = tokens if state is None else torch.cat([state.window, tokens], dim=1)
        weight, _ = self.head_parameters()
        fits = window.shape[1] <= self.config.context
        if not fits or self.layers.decoder_step is None or torch.is_grad_enabled():
            window = window[:, -self.config.context :]
            return F.linear(self.stream(window)[:, -1], weight), GPTState(window, None)
        cache = None if state is None else state.take_cache()
        if cache is None:
            cache, held = self.empty_cache(len(window)), 0
        if held == 0:
            return F.linear(self.stream(window, cache)[:, -1], weight), GPTState(window, cache)
        for first in range(held, window.shape[1], MAX_STEP_TOKENS):
            logits = self.step_logits(window[:, first : first + MAX_STEP_TOKENS], cache)  # [B, V]
        return logits, GPTState(window, cache)

    def empty_cache(self, batch: int) -> KVCache:
        """A cache of the model's sizes for `batch` rows."""
        c, weight = self.config, self.embedding.weight
        width = c.hidden // c.heads
        return KVCache(
            c.layers, batch, c.heads, c.context, width, dtype=weight.dtype, device=weight.device
        )
