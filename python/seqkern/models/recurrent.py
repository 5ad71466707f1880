"""What the recurrent language models share: embedding, stacked recurrence, linear head."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from seqkern.models.backends import OURS, run_recurrent
from seqkern.models.language_model import LanguageModel, last_of
from seqkern.models.parts import is_lookup, is_plain


class RecurrentLanguageModel(LanguageModel):
    """Base of the language models with a state of fixed size and no longest input.

    A state holds tensors [layers, B, H] or [B, H].
    """

    dropout: nn.Dropout
    head: nn.Linear

    @property
    @abstractmethod
    def recurrence(self) -> nn.Module:
        """The layers."""

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, *, return_logits: bool = False
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """Logits at every position, and the loss where targets are given.

        Args:
            tokens: int64 or int32 [B, T], T >= 1.
            targets: int64 [B, T], the tokens that follow.
            return_logits: make the logits beside the loss too, which costs their memory.

        Returns:
            logits [B, T, V]; with targets (None, loss) or, with return_logits, (logits, loss);
            loss is the mean cross-entropy in nats.

        Raises:
            UserError: tokens of the wrong dtype, shape or range.
        """
        self.check(tokens, targets)
        return self.output(self.hidden_states(tokens), targets, return_logits)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """The last layer's, [B, T, H], for tokens [B, T] from a zero state."""
        return self._read(tokens, None)[0]

    def _read(
        self, tokens: Tensor, state: Any, lengths: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Hidden states [B, T, H] that the head reads, and the state after each row's last."""
        is_dropping = not is_plain(self.dropout, nn.Dropout) or (self.training and self.dropout.p)
        is_ours = is_plain(self.recurrence, *OURS)
        if is_ours and not is_dropping and is_lookup(self.embedding):
            # The embedding is multiplied by W_ih before it is looked up, where that is less work.
            hidden, state = self.recurrence(
                tokens, state, lengths=lengths, embedding=self.embedding.weight
            )
        else:
            x = self.dropout(self.embedding(tokens))  # [B, T, H]
            hidden, state = run_recurrent(self.recurrence, x, state, lengths)
        return self.dropout(hidden), state

    @torch.no_grad()
    def next_logits(
        self,
        tokens: Tensor,
        state: Any = None,
        lengths: Tensor | None = None,
        *,
        capacity: int | None = None,
    ) -> tuple[Tensor, Any]:
        """Read tokens [B, T] after `state`: logits [B, V] of the next token, and the new state.

        `state` stays as it is: it can be continued twice.
        """
        hidden, state = self._read(tokens, state, lengths)
        return self.logits(last_of(hidden, lengths)), state

    @torch.no_grad()
    def step_logits(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read tokens [B, S] after `state`: logits [B, S, V] after each, and the new state."""
        hidden, state = self._read(tokens, state)
        return self.logits(hidden), state

    @torch.no_grad()
    def rewind(self, state: Any, before: Any, tokens: Tensor, keep: Tensor) -> Any:
        """The state after keep [B] >= 1 of tokens [B, S], which were read from `before` on."""
        return self._read(tokens, before, keep)[1]

    def select_rows(self, state: Any, rows: Tensor) -> Any:
        """The state of rows, int64 [R]."""
        return tree_map(lambda t: t.index_select(-2, rows), state)

    def reread(self, state: Any, rows: list[int], tokens: Tensor) -> Any:
        """Never asked for: there is no context to run out of."""
        raise AssertionError("a recurrent model has no windows")
