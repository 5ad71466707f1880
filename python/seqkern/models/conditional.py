"""One to many: p(y | condition) for sequences that end by themselves."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.errors import require
from seqkern.generation import Sampler, Sampling, row_seeds
from seqkern.models.backends import layers, loss_of_head
from seqkern.models.decoder import Decoder, DecoderConfig
from seqkern.models.decoding import Decoded, beam_search, sample_sequences
from seqkern.models.language_model import check_sizes, evaluating
from seqkern.models.padding import check_lengths, clean_tokens, valid_steps

_IGNORED = -100
Given = tuple[Tensor, tuple[Tensor, Tensor] | None]  # start [B, S], memory and which of it exists


class SequenceWriter(nn.Module, ABC):
    r"""Base of the models that write a sequence given something else.

    .. math:: p(y \mid x) = p(\mathrm{stop} \mid y, x) \prod_i p(y_i \mid y_{<i}, x)

    The stop token is V, one more than the vocabulary; the models add it, and targets hold none. In
    batches of one shape a row's result is the same bit for bit whatever its padding and the other
    rows hold; in a batch of another shape PyTorch's matrix products may round differently.

    Args:
        config: what is written.
        start: width of what the decoder reads first.
        memory: width of what it attends to; None for nothing.
        backend: `seqkern` or `torch`; the parameters of the same seed are the same for both.
    """

    def __init__(self, config: DecoderConfig, start: int, memory: int | None, backend: str) -> None:
        """See the class."""
        super().__init__()
        made = layers(backend)
        self.backend = backend
        self.vocab_size = self.stop_token = config.vocab_size
        self.decoder = Decoder(config, start, memory, made)
        self.head = nn.Linear(config.hidden, config.vocab_size + 1)
        self.loss = made.LinearCrossEntropyLoss(ignore_index=_IGNORED)
        self.token_losses = made.LinearCrossEntropyLoss(ignore_index=_IGNORED, reduction="none")

    @abstractmethod
    def given(self, source: Tensor, source_lengths: Tensor | None) -> Given:
        """What the decoder starts from, and what it attends to."""

    def forward(
        self,
        source: Tensor,
        targets: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
        *,
        return_logits: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """The loss of target sequences; each token is predicted from the right ones before it.

        Args:
            source: what is given; see the class.
            targets: int64 or int32 [B, T] of the vocabulary, T >= 0; padding holds anything.
            source_lengths: int64 or int32 [B], from 1; None where nothing is padding.
            target_lengths: int64 or int32 [B], from 0 to T; None where nothing is padding.
            return_logits: make the logits beside the loss too.

        Returns:
            (None, loss), or with return_logits (logits [B, T + 1, V + 1], loss): logits t score
            the token after the first t; loss is the mean cross-entropy in nats of all tokens, one
            stop token per row among them.

        Raises:
            UserError: an argument of the wrong dtype, shape or range.
        """
        hidden, wanted = self._states(source, targets, source_lengths, target_lengths)
        loss = loss_of_head(self.loss, self.head, hidden, wanted)
        logits: Tensor | None = self.head(hidden) if return_logits else None
        return logits, loss

    def log_prob(
        self,
        source: Tensor,
        targets: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Ln p(y | x) [B] of whole target sequences, their stop tokens included.

        Arguments as of `forward`. Differentiable; dropout as the mode says.
        """
        hidden, wanted = self._states(source, targets, source_lengths, target_lengths)
        losses = loss_of_head(self.token_losses, self.head, hidden, wanted)
        return -losses.view(wanted.shape).sum(1)

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        max_tokens: int,
        *,
        source_lengths: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        top_k: int | Tensor = 0,
        top_p: float | Tensor = 1.0,
        min_p: float | Tensor = 0.0,
        seed: int | Tensor | None = None,
    ) -> Decoded:
        """Write a sequence for each row, token by token, up to a stop token.

        Args:
            source: what is given; see the class.
            max_tokens: most tokens of a row, its stop token among them.
            source_lengths: as in `forward`.
            temperature: divides the logits; 0 picks the largest: greedy search. This and the
                options to min_p are a number or a tensor [B]; `seqkern.ops.sample` defines them.
            top_k: keep the k most probable tokens; 0 keeps all.
            top_p: keep the smallest set of most probable tokens that holds this probability.
            min_p: keep tokens at least this fraction as probable as the most probable.
            seed: the same seed gives the same tokens; None draws a new one. Row b draws what a
                batch of one would draw with seed + b; int64 [B] gives each row its own.

        Returns:
            tokens int64 [B, T], lengths [B], and ln p [B] under the model, whatever the options.

        Raises:
            UserError: an argument of the wrong dtype, shape or range.
        """
        require(max_tokens >= 1, f"max_tokens must be at least 1, got {max_tokens}")
        sampling = Sampling(temperature, top_k, top_p, min_p)
        with evaluating(self):
            start, memory = self.given(source, source_lengths)
            step = _Stepper(self, start, memory, 1, max_tokens)
            sampler = Sampler(sampling, row_seeds(seed, len(start), start.device), None)
            return sample_sequences(step, self.stop_token, max_tokens, sampler)

    @torch.no_grad()
    def beam_search(
        self,
        source: Tensor,
        max_tokens: int,
        *,
        source_lengths: Tensor | None = None,
        beams: int = 4,
        length_penalty: float = 1.0,
    ) -> Decoded:
        r"""Search for the sequence with the largest :math:`\ln p(y \mid x) / n^\alpha`.

        n counts the stop token. Every beam may end in each step; the best `beams` ways to go on do
        so; the search ends when no row can become better. Rows are searched together.

        Args:
            source: what is given; see the class.
            max_tokens: most tokens of a row, its stop token among them.
            source_lengths: as in `forward`.
            beams: sequences of each row kept at a time.
            length_penalty: alpha, at least 0: 0 favours short sequences, 1 compares means.

        Returns:
            tokens int64 [B, T], lengths [B], and ln p [B], not divided.

        Raises:
            UserError: an argument of the wrong dtype, shape or range.
        """
        require(max_tokens >= 1, f"max_tokens must be at least 1, got {max_tokens}")
        require(beams >= 1, f"beams must be at least 1, got {beams}")
        require(
            0 <= length_penalty < float("inf"),
            f"length_penalty must be at least 0 and finite, got {length_penalty}",
        )
        with evaluating(self):
            start, memory = self.given(source, source_lengths)
            step = _Stepper(self, start, memory, beams, max_tokens)
            return beam_search(
                step,
                step.state.reorder,
                len(start),
                self.stop_token,
                max_tokens,
                beams,
                length_penalty,
                start.device,
            )

    def _states(
        self,
        source: Tensor,
        targets: Tensor,
        source_lengths: Tensor | None,
        target_lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T + 1, H] and what they must predict, int64 [B, T + 1]."""
        start, memory = self.given(source, source_lengths)
        lengths = check_lengths(target_lengths, targets, "target_lengths", least=0)
        require(
            len(targets) == len(start),
            f"targets must have {len(start)} rows like source, got {len(targets)}",
        )
        valid = valid_steps(lengths, targets.shape[1])
        tokens = clean_tokens(targets, valid, self.vocab_size, "targets")  # [B, T]
        wanted = F.pad(torch.where(valid, tokens, _IGNORED), (0, 1), value=_IGNORED)
        wanted = wanted.scatter(1, lengths[:, None], self.stop_token)  # [B, T + 1]
        return self.decoder(start, tokens, memory), wanted


class _Stepper:
    """Scores of the next token, step by step."""

    def __init__(
        self,
        model: SequenceWriter,
        start: Tensor,
        memory: tuple[Tensor, Tensor] | None,
        copies: int,
        max_tokens: int,
    ) -> None:
        """Reads the start: `copies` rows of each."""
        self.model = model
        self.first, self.state = model.decoder.begin(start, memory, copies, max_tokens)

    def __call__(self, tokens: Tensor | None) -> Tensor:
        """Read tokens [N] (None at first): logits [N, V + 1]."""
        hidden = self.first if tokens is None else self.model.decoder.step(tokens, self.state)
        logits: Tensor = self.model.head(hidden)
        return logits


class ConditionalLanguageModel(SequenceWriter):
    """p(y | c) for a condition c of fixed width: one to many.

    What the decoder reads first is W c + b in the place of a token, as Vinyals et al. 2015 show a
    picture to a recurrent network. (To continue given tokens instead, one or more, there is
    `LanguageModel.generate`.)

    Args:
        config: what is written.
        condition: C, the width of c. A class is its one-hot vector.
        backend: `seqkern` or `torch`; the parameters of the same seed are the same for both.

    Shape:
        `source` is floating point [B, C]; `source_lengths` has no meaning and is None.

    Example:
        >>> model = ConditionalLanguageModel(DecoderConfig(vocab_size=10, hidden=8), condition=3)
        >>> written = model.generate(torch.eye(3), 20, seed=1)
        >>> written.tokens.shape[0]
        3
    """

    def __init__(self, config: DecoderConfig, condition: int, backend: str = "seqkern") -> None:
        """See the class."""
        check_sizes(condition=condition)
        super().__init__(config, condition, None, backend)
        self.condition = condition

    def given(self, source: Tensor, source_lengths: Tensor | None) -> Given:
        """The condition."""
        require(
            source.dim() == 2 and source.is_floating_point() and source.shape[1] == self.condition,
            f"source must be floating point [B, {self.condition}], got {source.dtype} "
            f"{list(source.shape)}",
        )
        require(source_lengths is None, "source_lengths must be None: a condition has no length")
        return source, None
