"""What all language models share: checks, the loss, probabilities and generation.

A language model is p(x) = prod_i p(x_i | x_<i): from integer tokens [B, T] to logits [B, T, V],
where row (b, t) scores the token that follows x_b1 .. x_bt.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.errors import check_tensor, require
from seqkern.generation import Sampling, check_draft, generate
from seqkern.models.backends import Layers, layers, loss_of_head
from seqkern.models.padding import check_lengths, valid_steps
from seqkern.models.parts import is_plain

_INTEGERS = (torch.int64, torch.int32)


class LanguageModel(nn.Module, ABC):
    """Base of the models.

    Args:
        vocab_size: V.
        context: the most tokens `forward` reads at once; None where there is no limit.
        backend: `seqkern` or `torch`, see `seqkern.models.backends`.
    """

    embedding: nn.Embedding
    head: nn.Linear | None  # None: the logits' weight is the embedding's

    def __init__(self, vocab_size: int, context: int | None, backend: str) -> None:
        """See the class."""
        super().__init__()
        self.layers: Layers = layers(backend)
        self.backend = backend
        self.vocab_size = vocab_size
        self.context = context
        self.loss = self.layers.CrossEntropyLoss()
        self.head_loss = self.layers.LinearCrossEntropyLoss()
        self.token_losses = self.layers.LinearCrossEntropyLoss(reduction="none")

    @property
    def keeps_state(self) -> bool:
        """Whether generation reads each token once; else whole windows."""
        return True

    @property
    def is_capturable(self) -> bool:
        """Whether a step may be captured in a CUDA graph: nothing in it is of the user's making.

        That might wait for the device, or do in Python what a graph does not repeat.
        """
        known = ("torch.nn.modules.", "seqkern.")
        return all(
            is_plain(part, type(part)) and type(part).__module__.startswith(known)
            for part in self.modules()
        )

    @abstractmethod
    def next_logits(
        self,
        tokens: Tensor,
        state: Any = None,
        lengths: Tensor | None = None,
        *,
        capacity: int | None = None,
    ) -> tuple[Tensor, Any]:
        """Read tokens [B, T] after `state`: logits [B, V] of the next token, and the new state.

        At the start, state None, rows may have lengths [B] from 1 to T, and a state that takes
        memory for each token takes it for `capacity` of them, by default for the whole context.
        There are no gradients.
        """

    @abstractmethod
    def step_logits(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read a few tokens [B, S] after `state`: logits [B, S, V], and the new state."""

    @abstractmethod
    def rewind(self, state: Any, before: Any, tokens: Tensor, keep: Tensor) -> Any:
        """The state after keep [B] >= 1 of tokens [B, S], which were read from `before` on."""

    @abstractmethod
    def reread(self, state: Any, rows: list[int], tokens: Tensor) -> Any:
        """The state in which `rows` hold just tokens [R, W], W from 0; the others as they are."""

    @abstractmethod
    def select_rows(self, state: Any, rows: Tensor) -> Any:
        """The state of rows, int64 [R]."""

    def check(self, tokens: Tensor, targets: Tensor | None = None) -> None:
        """Raise `UserError` for tokens that are not integers [B, T] of the vocabulary.

        The range is not looked at on a GPU, where reading it would stall the stream, nor while
        compiling: there the embedding's own assertion stands.
        """
        check_tensor("tokens", tokens)
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
    def hidden_states(self, tokens: Tensor) -> Tensor:
        """What the head makes logits of, [B, T, H], for tokens [B, T] from a fresh state."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of what `hidden_states` gives, [..., H]."""
        if self.head is None:
            return F.linear(hidden, self.embedding.weight)
        logits: Tensor = self.head(hidden)
        return logits

    def _loss(self, criterion: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        """`criterion`, a loss of hidden states and a head's parameters, of hidden [B, T, H]."""
        if self.head is None:
            loss: Tensor = criterion(hidden, self.embedding.weight, targets)
            return loss
        return loss_of_head(criterion, self.head, hidden, targets)

    def output(
        self, hidden: Tensor, targets: Tensor | None, return_logits: bool
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """What `forward` returns for hidden states [B, T, H].

        Without targets the logits [B, T, V]. With them (None, loss), loss the mean cross-entropy
        in nats per token, for which the logits need not exist; (logits, loss) where asked for.
        """
        if targets is not None and not return_logits:
            return None, self._loss(self.head_loss, hidden, targets)
        logits = self.logits(hidden)  # [B, T, V]
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

    def next_log_probs(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The log of p(target | the tokens so far) everywhere, dropout off, without stored logits.

        Args:
            tokens: int64 or int32 [B, T].
            targets: int64 [B, T], the tokens that follow.

        Returns:
            [B, T] in nats.
        """
        self.check(tokens, targets)
        with self._evaluating():
            losses = self._loss(self.token_losses, self.hidden_states(tokens), targets)
        return -losses.reshape(targets.shape)

    def log_prob(self, sequences: Tensor, lengths: Tensor | None = None) -> Tensor:
        r"""Log-probability of each sequence by the chain rule, dropout off.

        .. math:: \log p(x_2, .., x_n | x_1) = \sum_{i=2}^{n} \log p(x_i | x_1, .., x_{i-1})

        The first token is conditioned on and not counted: the models have no start token, so they
        give it no probability. A sequence of one token has log-probability 0. A row's result does
        not depend on its padding or on the other rows of a batch of the same shape.

        Args:
            sequences: int64 or int32 [B, T]; for a transformer T is at most the context + 1.
            lengths: int64 or int32 [B], each from 1 to T: how many tokens of a row count. What
                comes after them may be any integer.

        Returns:
            [B] in nats, differentiable in the parameters.

        Raises:
            UserError: tokens that `forward` would refuse, or lengths of another shape or range.

        Example:
            >>> model = LSTMLanguageModel(LSTMConfig(vocab_size=10, hidden=8))
            >>> model.log_prob(torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2])).shape
            torch.Size([2])
        """
        check_tensor("sequences", sequences)
        require(
            sequences.dim() == 2 and sequences.dtype in _INTEGERS,
            f"sequences must be int64 or int32 [B, T], got {sequences.dtype} "
            f"{list(sequences.shape)}",
        )
        B, T = sequences.shape
        if lengths is not None:
            lengths = check_lengths(lengths, sequences)
            within = valid_steps(lengths, T)  # [B, T]
            sequences = sequences.masked_fill(~within, 0)
        if T == 1:
            self.check(sequences)
            return self.embedding.weight.new_zeros(B)
        # Padding is computed and thrown away: left out, it would change the shape of the products
        # and with it the last bits of every row.
        terms = self.next_log_probs(sequences[:, :-1], sequences[:, 1:].long())  # [B, T - 1]
        return (terms if lengths is None else terms.where(within[:, 1:], 0)).sum(1)

    def perplexity(self, sequences: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The exp of the mean negative log-probability per predicted token, over all rows: [].

        A model that knows nothing has perplexity V, one that is always sure and right has 1. The
        arguments and errors are those of `log_prob`; at least one row must have two tokens.

        Example:
            >>> LSTMLanguageModel(LSTMConfig(vocab_size=10)).perplexity(torch.tensor([[1, 2, 3]]))
            tensor(...)
        """
        log_prob = self.log_prob(sequences, lengths)
        B, T = sequences.shape
        predicted = B * (T - 1) if lengths is None else int((lengths - 1).sum())
        require(predicted >= 1, "sequences must hold a token that follows another, got none")
        return torch.exp(-log_prob.sum() / predicted)

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        lengths: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        top_k: int | Tensor = 0,
        top_p: float | Tensor = 1.0,
        min_p: float | Tensor = 0.0,
        repetition_penalty: float | Tensor = 1.0,
        presence_penalty: float | Tensor = 0.0,
        frequency_penalty: float | Tensor = 0.0,
        seed: int | Tensor | None = None,
        stop_tokens: Collection[int] | None = None,
        on_token: Callable[[Tensor], None] | None = None,
        return_logprobs: bool = False,
        draft: "LanguageModel | None" = None,
        draft_tokens: int = 4,
    ) -> Any:
        """Continue a prompt token by token; `seqkern.ops.sample` defines the sampling exactly.

        A row's tokens depend on its prompt, options and seed, not on the rows beside it. A
        transformer reads at most `context` tokens: when its window is full, the next token drops
        the window's older half, and positions count from the new start
        (`seqkern.generation.window_start`). Recurrent models carry their state and have no limit.

        Args:
            prompt: int64 or int32 [B, T], T from 1 to the context.
            max_new_tokens: tokens to add to each row.
            lengths: int64 or int32 [B], tokens of each row's prompt, from 1 to T, where they
                differ; what stands behind is not read, and may be any integer.
            temperature: divides the logits; 0 picks the largest logit. This and the options to
                frequency_penalty are a number or a tensor [B].
            top_k: keep the k most probable tokens; 0 keeps all.
            top_p: keep the smallest set of most probable tokens that holds this probability.
            min_p: keep tokens at least this fraction as probable as the most probable.
            repetition_penalty: divides positive, multiplies negative logits of tokens seen, in
                the prompt or since.
            presence_penalty: taken off the logit of each token seen.
            frequency_penalty: taken off once per occurrence.
            seed: the same seed gives the same tokens; None draws a new one. Row b draws what a
                batch of one would draw with seed + b; int64 [B] gives each row its own.
            stop_tokens: a row that produces one of these, of the vocabulary, ends.
            on_token: called with the i-th new token of all rows [B], i = 0, 1, ...; rows that
                have ended repeat their last. On a GPU it makes every step wait for the device;
                without it the host looks for stop tokens at every 16th step only.
            return_logprobs: return also the tokens' log-probabilities under the model,
                log softmax(logits), whatever the sampling options.
            draft: a smaller model of the same vocabulary that proposes tokens for this one to
                judge, several in one reading. The distribution of the tokens is this model's,
                whatever the draft; at temperature 0 the tokens are those without it.
            draft_tokens: proposals per reading, 1 to 15.

        Returns:
            int64 [B, longest], each row its prompt and its new tokens right behind; beyond a
            row's end its last token is repeated. With return_logprobs also float32
            [B, most new tokens], 0 beyond a row's end.

        Raises:
            UserError: a prompt that `forward` would refuse, an option outside its range, or logits
                without a distribution: NaN, +inf or only -inf in a row.
        """
        sampling = Sampling(
            *(temperature, top_k, top_p, min_p),
            *(repetition_penalty, presence_penalty, frequency_penalty),
        )
        check_tensor("prompt", prompt)
        if lengths is not None:
            lengths = check_lengths(lengths, prompt)
            prompt = prompt.masked_fill(~valid_steps(lengths, prompt.shape[1]), 0)
        self.check(prompt)
        if draft is not None:
            require(
                isinstance(draft, LanguageModel),
                f"draft must be a language model, got {type(draft).__name__}",
            )
            check_draft(self, draft, draft_tokens)
            draft.check(prompt)
        with self._evaluating(), nullcontext() if draft is None else draft._evaluating():
            return generate(
                self,
                prompt,
                max_new_tokens,
                sampling,
                lengths=lengths,
                seed=seed,
                stop_tokens=stop_tokens,
                on_token=on_token,
                return_logprobs=return_logprobs,
                draft=draft,
                draft_tokens=draft_tokens,
            )

    def num_parameters(self) -> int:
        """Trainable numbers in all."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _evaluating(self) -> AbstractContextManager[None]:
        return evaluating(self)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block the module is in evaluation mode; after it, each part in its own again."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, was_training in training.items():
            part.training = was_training


def last_of(hidden: Tensor, lengths: Tensor | None) -> Tensor:
    """The hidden state [B, H] of each row's last token, of hidden [B, T, H]."""
    if lengths is None:
        return hidden[:, -1]
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def check_sizes(**sizes: int) -> None:
    """Raise `UserError` for a size that is not at least 1."""
    for name, size in sizes.items():
        require(size >= 1, f"{name} must be at least 1, got {size}")


def check_dropout(dropout: float) -> None:
    """Raise `UserError` for a dropout outside [0, 1)."""
    require(0 <= dropout < 1, f"dropout must be in [0, 1), got {dropout}")
