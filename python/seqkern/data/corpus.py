"""A text made ready for training: tokenizer, training tokens, held-out tokens."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from seqkern.data.batches import unigram_entropy
from seqkern.data.text import split_text
from seqkern.data.tokenizers import Tokenizer
from seqkern.errors import require


@dataclass(frozen=True)
class Corpus:
    """What a run is trained and validated on."""

    tokenizer: Tokenizer
    training: Tensor  # int64 [N]
    validation: Tensor  # int64 [M]; empty where nothing is held out
    tokens_per_character: float  # of the held-out text, or of all where nothing is held out
    unigram_entropy: float  # of the whole text, nats per token


def text_digest(text: str) -> str:
    """SHA-256 of a text: whether two runs saw the same."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def make_corpus(text: str, tokenizer: Tokenizer, val_fraction: float, context: int) -> Corpus:
    """Split a text and encode it.

    Raises:
        UserError: the training part is shorter than one block of context + 1 tokens, or the
            held-out part has fewer than two tokens.
    """
    training_text, validation_text = split_text(text, val_fraction)
    training = torch.tensor(tokenizer.encode(training_text), dtype=torch.int64)
    validation = torch.tensor(tokenizer.encode(validation_text), dtype=torch.int64)
    require(
        len(training) >= context + 1,
        f"the text is too short: {len(training)} training tokens, less than one block of "
        f"context + 1 = {context + 1}",
    )
    require(
        val_fraction == 0 or len(validation) >= 2,
        f"the text is too short: a val_fraction of {val_fraction} holds out "
        f"{len(validation)} tokens, less than 2",
    )
    measured = (validation, validation_text) if val_fraction else (training, training_text)
    return Corpus(
        tokenizer=tokenizer,
        training=training,
        validation=validation,
        tokens_per_character=len(measured[0]) / len(measured[1]),
        unigram_entropy=unigram_entropy(torch.cat([training, validation])),
    )
