"""Text, tokenizers and batches; time series in `seqkern.data.series`."""

from seqkern.data import series
from seqkern.data.batches import BlockSampler, unigram_entropy, validation_batches
from seqkern.data.corpus import Corpus, make_corpus, text_digest
from seqkern.data.text import embedded_text, read_text, split_text
from seqkern.data.tokenizers import (
    BpeTokenizer,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

__all__ = [
    "BlockSampler",
    "BpeTokenizer",
    "CharTokenizer",
    "Corpus",
    "Tokenizer",
    "WordTokenizer",
    "embedded_text",
    "load_tokenizer",
    "make_corpus",
    "read_text",
    "save_tokenizer",
    "series",
    "split_text",
    "text_digest",
    "train_tokenizer",
    "unigram_entropy",
    "validation_batches",
]
