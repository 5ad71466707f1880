"""The transformer language model: pre-norm blocks of causal attention and an MLP."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.errors import require
from seqkern.models.backends import Layers
from seqkern.models.language_model import (
    LanguageModel,
    check_dropout,
    check_sizes,
    last_of,
)
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

    def forward(self, x: Tensor, cache: KVCache | None = None, append: bool = False) -> Tensor:
        """[B, T, C] to [B, T, C]; keys and values begin an empty cache, or are appended to it."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)  # [B, T, 3, NH, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, NH, T, D]
        if cache is not None and append:
            assert self.layers.attention_step is not None
            y = self.layers.attention_step(
                q, k, v, *cache[self.layer], cache.lengths, counters=cache.counters
            )  # [B, NH, T, D]
        else:
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

    def forward(self, x: Tensor, cache: KVCache | None = None, append: bool = False) -> Tensor:
        """[B, T, C] to [B, T, C]; the cache as `Attention` takes it."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cache, append))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out


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
        return self.output(self.hidden_states(tokens), targets, return_logits)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """The normalised stream [B, T, C] above the last block, for tokens [B, T]."""
        return self.stream(tokens)

    def stream(self, tokens: Tensor, cache: KVCache | None = None, append: bool = False) -> Tensor:
        """The normalised residual stream [B, T, C] above the last block.

        With a cache, its first T places are filled, or the tokens follow those that it holds.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # [T]
        if cache is not None and append:
            # The spare places of a cache, beyond the context, have no position of their own.
            positions = cache.lengths.unsqueeze(1) + positions  # [B, T]
            positions = positions.clamp_(max=self.config.context - 1)
        x = self.dropout(self.embedding(tokens) + self.positions(positions))  # [B, T, C]
        for block in self.blocks:
            x = block(x, cache, append)
        out: Tensor = self.norm(x)
        return out

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The embedding's weight where it is tied."""
        return (self.embedding if self.head is None else self.head).weight, None

    @property
    def keeps_state(self) -> bool:
        """Whether there is a kernel that reads a cache."""
        return self.layers.attention_step is not None

    @torch.no_grad()
    def next_logits(
        self, tokens: Tensor, state: KVCache | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, KVCache | None]:
        """Read tokens [B, T] after `state`: logits [B, V] of the next token, and the new state.

        The state is a cache, which is changed in place; there is none where no kernel reads one.
        """
        weight, bias = self.head_parameters()
        if not self.keeps_state:
            return F.linear(last_of(self.stream(tokens), lengths), weight, bias), None
        if state is None:
            state = self.empty_cache(len(tokens))
            hidden = self.stream(tokens, state)
            state.lengths += tokens.shape[1] if lengths is None else lengths
        else:
            hidden = self._append(tokens, state)
        return F.linear(last_of(hidden, lengths), weight, bias), state

    @torch.no_grad()
    def step_logits(self, tokens: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        """Read tokens [B, S] after `state`: logits [B, S, V] after each, and the new state."""
        weight, bias = self.head_parameters()
        return F.linear(self._append(tokens, state), weight, bias), state

    def _append(self, tokens: Tensor, cache: KVCache) -> Tensor:
        parts = []
        for part in torch.split(tokens, MAX_STEP_TOKENS, 1):
            parts.append(self.stream(part, cache, append=True))
            cache.advance(part.shape[1])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # [B, S, C]

    def rewind(self, state: KVCache, before: KVCache, tokens: Tensor, keep: Tensor) -> KVCache:
        """The cache without the last S - keep [B] of tokens [B, S]."""
        state.lengths -= tokens.shape[1] - keep
        return state

    @torch.no_grad()
    def reread(self, state: KVCache, rows: list[int], tokens: Tensor) -> KVCache:
        """Let `rows` of the cache hold just tokens [R, W]."""
        W = tokens.shape[1]
        index = torch.tensor(rows, device=tokens.device)
        if W > 0:
            fresh = self.empty_cache(len(rows), capacity=W)
            self.stream(tokens, fresh)
            state.memory[:, :, index, :, :W] = fresh.memory
        state.lengths[index] = W
        return state

    def select_rows(self, state: KVCache, rows: Tensor) -> KVCache:
        """The cache of rows, int64 [R]."""
        state.reorder(rows)
        return state

    def empty_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """A cache of the model's sizes for `batch` rows, by default for the context."""
        c, weight = self.config, self.embedding.weight
        return KVCache(
            c.layers,
            batch,
            c.heads,
            # To spare: what speculative decoding reads and forgets again.
            c.context + MAX_STEP_TOKENS - 1 if capacity is None else capacity,
            c.hidden // c.heads,
            dtype=weight.dtype,
            device=weight.device,
        )
