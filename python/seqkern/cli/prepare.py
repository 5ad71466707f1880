"""`seqkern prepare`."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from seqkern.data import TokenFile, train_tokenizer_on, write_token_file
from seqkern.data.corpus import check_vocabulary
from seqkern.data.text import text_chunks
from seqkern.data.token_file import is_token_file, refuse_cut_token_file
from seqkern.data.tokenizers import TOKENIZERS
from seqkern.errors import UserError, require


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "prepare",
        help="make a token file of a text of any size",
        description="Encode a text file, of any size, into a file of tokens that `seqkern train "
        "--data` reads from the disk as it goes. The text is read twice, a piece at a time: once "
        "for the vocabulary, once to encode it. The tokenizer is kept in the file.",
    )
    parser.set_defaults(command=_prepare)
    parser.add_argument("text", type=Path, metavar="FILE", help="UTF-8 text file")
    parser.add_argument(
        "--tokenizer", choices=TOKENIZERS, default="char", help="what a token is (default: char)"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=4096,
        help="most ids of a word or bpe vocabulary (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help="the token file; must not exist")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _prepare(args: argparse.Namespace) -> int:
    require(not args.out.exists(), f"{args.out} already exists: remove it, or use another --out")
    require(args.out.parent.is_dir(), f"there is no folder {args.out.parent} for {args.out.name}")
    try:
        size = args.text.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {args.text}: {error.strerror}") from error
    require(size > 0, f"{args.text} is empty")
    require(not is_token_file(args.text), f"{args.text} is a token file already")
    refuse_cut_token_file(args.text)

    def bar(stage: str) -> AbstractContextManager[Any]:
        shown: AbstractContextManager[Any] = tqdm(
            total=size, desc=stage, unit="B", unit_scale=True, disable=args.quiet
        )
        return shown

    with bar("vocabulary") as progress:
        chunks = text_chunks(args.text, on_bytes=progress.update)
        tokenizer = train_tokenizer_on(args.tokenizer, chunks, args.vocab_size)
    check_vocabulary(tokenizer)
    with bar("encoding") as progress:
        update: Callable[[int], object] = progress.update
        write_token_file(args.text, tokenizer, args.out, update)
    made = TokenFile(args.out)
    print(
        f"{args.out}: {len(made.tokens):,} tokens of {made.characters:,} characters, vocabulary "
        f"{tokenizer.vocab_size} ({tokenizer.kind}), {args.out.stat().st_size:,} bytes"
    )
    print(f"try: seqkern train --data {args.out}")
    return 0
