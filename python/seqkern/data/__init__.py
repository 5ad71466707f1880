"""Text, tokenizers, token files and batches; time series in `seqkern.data.series`."""

from seqkern.data import series
from seqkern.data.batches import BlockSampler, pad_rows, unigram_entropy, validation_batches
from seqkern.data.corpus import Corpus, make_corpus, text_digest
from seqkern.data.text import embedded_text, read_text, split_text
from seqkern.data.token_blocks import Blocks, blocks, prefix_examples
from seqkern.data.token_file import TokenFile, is_token_file, write_token_file
from seqkern.data.tokenizers import (
    BpeTokenizer,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    train_tokenizer_on,
)

__all__ = [
    "BlockSampler",
    "Blocks",
    "BpeTokenizer",
    "CharTokenizer",
    "Corpus",
    "TokenFile",
    "Tokenizer",
    "WordTokenizer",
    "blocks",
    "embedded_text",
    "is_token_file",
    "load_tokenizer",
    "make_corpus",
    "pad_rows",
    "prefix_examples",
    "read_text",
    "save_tokenizer",
    "series",
    "split_text",
    "text_digest",
    "train_tokenizer",
    "train_tokenizer_on",
    "unigram_entropy",
    "validation_batches",
    "write_token_file",
]
