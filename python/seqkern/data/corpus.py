"""A text made ready for training: tokenizer, training tokens, held-out tokens."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from seqkern.data.batches import BlockSampler, EpochSampler, unigram_entropy
from seqkern.data.text import split_text
from seqkern.data.token_blocks import Blocks
from seqkern.data.token_file import TokenFile
from seqkern.data.tokenizers import Tokenizer
from seqkern.errors import require


@dataclass(frozen=True)
class Corpus:
    """What a run is trained and validated on."""

    tokenizer: Tokenizer
    training: Tensor  # int64 [N]; of a token file mapped from the disk, in its smaller integers
    validation: Tensor  # as training, [M]; empty where nothing is held out
    tokens_per_character: float  # of the held-out text, or of all where nothing is held out
    unigram_entropy: float  # of the whole text, nats per token
    digest: str  # SHA-256: whether two runs saw the same
    file: TokenFile | None = None  # what training and validation are parts of


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
    _check_lengths(training, validation, val_fraction, context)
    measured = (validation, validation_text) if val_fraction else (training, training_text)
    return Corpus(
        tokenizer=tokenizer,
        training=training,
        validation=validation,
        tokens_per_character=len(measured[0]) / len(measured[1]),
        unigram_entropy=unigram_entropy(torch.cat([training, validation])),
        digest=text_digest(text),
    )


def corpus_of_tokens(file: TokenFile, val_fraction: float, context: int) -> Corpus:
    """Split the tokens of a file, which stay on the disk.

    Tokens per character are those of the whole file.

    Raises:
        UserError: as `make_corpus`.
    """
    N = len(file.tokens)
    cut = N - int(N * val_fraction)
    training, validation = file.tokens[:cut], file.tokens[cut:]
    _check_lengths(training, validation, val_fraction, context)
    return Corpus(
        tokenizer=file.tokenizer,
        training=training,
        validation=validation,
        tokens_per_character=N / file.characters,
        unigram_entropy=file.unigram_entropy,
        digest=file.digest,
        file=file,
    )


def make_sampler(
    corpus: Corpus, context: int, batch_size: int, seed: int
) -> BlockSampler | EpochSampler:
    """What draws the training batches: blocks of a token file by epochs, of a text anywhere."""
    if corpus.training.dtype == torch.int64:
        return BlockSampler(corpus.training, context, batch_size, seed)
    check = None if corpus.file is None else corpus.file.check_ids
    return EpochSampler(Blocks(corpus.training, context, batch_size, seed=seed), check)


def check_vocabulary(tokenizer: Tokenizer) -> None:
    """Raise `UserError` for a vocabulary of one: its only text has probability 1 from the start."""
    require(
        tokenizer.vocab_size >= 2,
        f"the text has a vocabulary of {tokenizer.vocab_size} token ({tokenizer.kind}): there is "
        "nothing to predict",
    )


def _check_lengths(training: Tensor, validation: Tensor, val_fraction: float, context: int) -> None:
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
