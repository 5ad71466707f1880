"""What all language models share: checks, the loss, probabilities and generation.

A language model is p(x) = prod_i p(x_i | x_<i): from integer tokens [B, T] to logits [B, T, V],
where row (b, t) scores the token that follows x_b1 .. x_bt.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.errors import require
from seqkern.generate import Sampling, generate
from seqkern.models.backends import Layers, layers

_INTEGERS = (torch.int64, torch.int32)


class LanguageModel(nn.Module, ABC):
    """Base of the models.

    Args:
        vocab_size: V.
        context: the most tokens `forward` reads at once; None where there is no limit.
        backend: `seqkern` or `torch`, see `seqkern.models.backends`.
    """

    def __init__(self, vocab_size: int, context: int | None, backend: str) -> None:
        """See the class."""
        super().__init__()
        self.layers: Layers = layers(backend)
        self.backend = backend
        self.vocab_size = vocab_size
        self.context = context
        self.loss = self.layers.CrossEntropyLoss()
        self.head_loss = self.layers.LinearCrossEntropyLoss()

    @abstractmethod
    def next_logits(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read tokens [B, T] after `state` (None at the start): logits [B, V] and the new state."""

    def check(self, tokens: Tensor, targets: Tensor | None = None) -> None:
        """Raise `UserError` for tokens that are not integers [B, T] of the vocabulary.

        The range is not looked at on a GPU, where reading it would stall the stream, nor while
        compiling: there the embedding's own assertion stands.
        """
        require(
            tokens.dim() == 2 and tokens.dtype in _INTEGERS,
            f"tokens must be int64 or int32 [B, T], got {tokens.dtype} {list(tokens.shape)}",
        )
        B, T = tokens.shape
        require(B >= 1 and T >= 1, f"tokens must hold at least one token, got [{B}, {T}]")
        require(
            self.context is None or self.context >= T,
            f"tokens must be at most the context of {self.context} long, got {T}",
        )
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in torch.aminmax(tokens))
            require(
                low >= 0 and high < self.vocab_size,
                f"tokens must be in [0, {self.vocab_size}), got {low if low < 0 else high}",
            )
        if targets is not None:
            require(
                targets.shape == tokens.shape and targets.dtype == torch.int64,
                f"targets must be int64 {list(tokens.shape)} like tokens, "
                f"got {targets.dtype} {list(targets.shape)}",
            )

    @abstractmethod
    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, H] and bias [V] that make logits of hidden states."""

    def output(
        self, hidden: Tensor, targets: Tensor | None, return_logits: bool
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """What `forward` returns for hidden states [B, T, H].

        Without targets the logits [B, T, V]. With them (None, loss), loss the mean cross-entropy
        in nats per token, for which the logits need not exist; (logits, loss) where asked for.
        """
        weight, bias = self.head_parameters()
        if targets is not None and not return_logits:
            return None, self.head_loss(hidden, weight, targets, bias)
        logits = F.linear(hidden, weight, bias)  # [B, T, V]
        if targets is None:
            return logits
        flat = logits.reshape(-1, self.vocab_size)  # [B*T, V]
        return logits, self.loss(flat, targets.reshape(-1))

    def probabilities(self, tokens: Tensor) -> Tensor:
        """p(next token | the tokens so far) at every position, dropout off.

        Args:
            tokens: int64 or int32 [B, T].

        Returns:
            [B, T, V], at least float32; the last dimension sums to 1.
        """
        with self._evaluating():
            logits: Tensor = self(tokens)
        return torch.softmax(logits, -1, torch.promote_types(logits.dtype, torch.float32))

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop_tokens: Collection[int] | None = None,
        on_token: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Continue a prompt token by token; `seqkern.generate` defines the sampling exactly.

        A transformer reads the last `context` tokens: past the context the window slides, and
        positions count from the window's start. Recurrent models carry their state and have no
        limit.

        Args:
            prompt: int64 or int32 [B, T], T from 1 to the context.
            max_new_tokens: tokens to add to each row.
            temperature: divides the logits; 0 picks the largest logit.
            top_k: keep the k most probable tokens; 0 keeps all.
            top_p: keep the smallest set of most probable tokens that holds this probability.
            min_p: keep tokens at least this fraction as probable as the most probable.
            seed: the same seed gives the same tokens; None draws a new one.
            stop_tokens: a row that produces one of these ends; its remaining places repeat it,
                and generation ends when every row has ended.
            on_token: called with each new token [B].

        Returns:
            int64 [B, T + new], the prompt included; new < max_new_tokens only where all rows
            stopped.

        Raises:
            UserError: a prompt that `forward` would refuse, or an option outside its range.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p)
        self.check(prompt)
        with self._evaluating():
            return generate(
                self,
                prompt,
                max_new_tokens,
                sampling,
                seed=seed,
                stop_tokens=stop_tokens,
                on_token=on_token,
            )

    def num_parameters(self) -> int:
        """Trainable numbers in all."""
        return sum(parameter.numel() for parameter in self.parameters())

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)


def check_sizes(**sizes: int) -> None:
    """Raise `UserError` for a size that is not at least 1."""
    for name, size in sizes.items():
        require(size >= 1, f"{name} must be at least 1, got {size}")


def check_dropout(dropout: float) -> None:
    """Raise `UserError` for a dropout outside [0, 1)."""
    require(0 <= dropout < 1, f"dropout must be in [0, 1), got {dropout}")
