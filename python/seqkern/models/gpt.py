"""The transformer language model: pre-norm blocks of causal attention and an MLP."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqkern.errors import require
from seqkern.models.backends import Layers
from seqkern.models.language_model import (
    LanguageModel,
    check_dropout,
    check_sizes,
    last_of,
)
from seqkern.models.parts import is_plain
from seqkern.models.transformer import step_attention
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

    def forward(self, x: Tensor, cache: KVCache | None = None, steps: bool = False) -> Tensor:
        """[B, T, C] to [B, T, C].

        A cache is given the keys and values in its first T places; or, with `steps`, behind those
        that each row has in it, and all of them are read.
        """
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)  # [B, T, 3, NH, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, NH, T, D]
        if steps:
            assert cache is not None
            y = step_attention(self.layers, q, k, v, cache, self.layer)
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

    def forward(self, x: Tensor, cache: KVCache | None = None, steps: bool = False) -> Tensor:
        """[B, T, C] to [B, T, C]; of the cache see `Attention`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cache, steps))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out

    def step_parameters(self, eps: float) -> list[Tensor] | None:
        """The block's parameters in the order of `seqkern.ops.decoder_step`, which takes one eps.

        None where the block does something else than that op.
        """
        # Every step asks: in its dictionary a part is found in a tenth of the time.
        parts: Any = self._modules
        attention, mlp = parts["attention"], parts["mlp"]
        if not (
            is_plain(self, Block)
            and is_plain(attention, Attention)
            and is_plain(mlp, nn.Sequential)
            and is_plain(parts["dropout"], nn.Dropout)
            and len(mlp._modules) == 3
        ):
            return None
        expand, activation, contract = mlp._modules.values()
        norms = parts["attention_norm"], parts["mlp_norm"]
        linear = attention._modules["qkv"], attention._modules["out"], expand, contract
        if not (
            is_plain(activation, nn.GELU)
            and activation.approximate == "none"
            and all(is_plain(norm, nn.LayerNorm) and norm.eps == eps for norm in norms)
            and all(is_plain(layer, nn.Linear) for layer in linear)
        ):
            return None
        layers = norms[0], *linear[:2], norms[1], *linear[2:]
        # A layer of these classes has a weight and a bias, in this order, or None for one.
        found = [t for layer in layers for t in layer._parameters.values()]
        return None if any(t is None for t in found) else found


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

    def stream(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normalised residual stream [B, T, C] above the last block.

        A cache is given the tokens' keys and values, in its first T places.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.embedding(tokens) + self.positions(positions))  # [B, T, C]
        for block in self.blocks:
            x = block(x, cache)
        out: Tensor = self.norm(x)
        return out

    def _step_parameters(self) -> list[Tensor] | None:
        """Those of all blocks for `seqkern.ops.decoder_step`; None where steps go by modules."""
        norm, head, found = self.norm, self.head, []
        is_plain_end = is_plain(norm, nn.LayerNorm) and (head is None or is_plain(head, nn.Linear))
        if not is_plain_end or not is_plain(self.dropout, nn.Dropout):
            return None
        blocks: Any = self.blocks
        for block in blocks:
            of_block = block.step_parameters(norm.eps) if isinstance(block, Block) else None
            if of_block is None:
                return None
            found += of_block
        return found

    def _step(self, tokens: Tensor, cache: KVCache, parameters: list[Tensor] | None) -> Tensor:
        """The stream [B, S, C] above the last block, before the last norm, of S new tokens.

        The tokens [B, S], S up to 16, follow those that each row has in the cache, and join them.
        With the blocks' parameters there is no dropout, and activations are float32 also where the
        weights are 16-bit: that is more exact than 16-bit ones, and what is read is the weights.
        """
        places = cache.lengths[:, None]  # [B, 1]
        if tokens.shape[1] > 1:
            places = places + torch.arange(tokens.shape[1], device=tokens.device)  # [B, S]
        # The spare places of a cache, beyond the context, have no position of their own.
        places = places.clamp(max=self.config.context - 1)
        x: Tensor = self.embedding(tokens) + self.positions(places)  # [B, S, C]
        if parameters is None:
            x = self.dropout(x)
            for block in self.blocks:
                x = block(x, cache, True)
        else:
            assert self.layers.decoder_step is not None
            x = self.layers.decoder_step(
                x if x.dtype == torch.float64 else x.float(),
                parameters,
                cache.memory,
                cache.lengths,
                eps=self.norm.eps,
                counters=cache.counters,
            )  # [B, S, C]
        cache.advance(tokens.shape[1])
        return x

    def _step_head(self, x: Tensor, parameters: list[Tensor] | None) -> Tensor:
        """Logits [..., V] of the stream [..., C] that `_step` returns with these parameters."""
        norm, head = self.norm, self.head
        if parameters is None:
            return self.logits(norm(x))
        assert self.layers.linear_step is not None
        return self.layers.linear_step(
            x,
            (self.embedding if head is None else head).weight,
            None if head is None else head.bias,
            norm="layer_norm",
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
        )

    @property
    def keeps_state(self) -> bool:
        """Whether there is a kernel that reads a cache."""
        return self.layers.decoder_step is not None

    @torch.no_grad()
    def next_logits(
        self,
        tokens: Tensor,
        state: KVCache | None = None,
        lengths: Tensor | None = None,
        *,
        capacity: int | None = None,
    ) -> tuple[Tensor, KVCache | None]:
        """Read tokens [B, T] after `state`: logits [B, V] of the next token, and the new state.

        The state is a cache, which is changed in place; there is none where no kernel reads one. A
        new one has room for `capacity` tokens of a row, by default and at most for the context.
        """
        if state is not None:
            parameters = self._step_parameters()
            for part in torch.split(tokens, MAX_STEP_TOKENS, 1):
                x = self._step(part, state, parameters)  # [B, S, C]
            return self._step_head(x[:, -1], parameters), state
        if self.keeps_state:
            context = self.config.context
            most = context if capacity is None else min(max(capacity, tokens.shape[1]), context)
            # To spare: what speculative decoding reads and forgets again.
            state = self.empty_cache(len(tokens), most + MAX_STEP_TOKENS - 1)
            state.lengths += tokens.shape[1] if lengths is None else lengths
        hidden = last_of(self.stream(tokens, state), lengths)  # [B, C]
        return self.logits(hidden), state

    @torch.no_grad()
    def step_logits(self, tokens: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        """Read tokens [B, S] after `state`: logits [B, S, V] after each, and the new state."""
        parameters = self._step_parameters()
        return self._step_head(self._step(tokens, state, parameters), parameters), state

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
