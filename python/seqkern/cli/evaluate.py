"""`seqkern evaluate`."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqkern.cli.running import set_threads
from seqkern.data import TokenFile, Tokenizer, WordTokenizer, is_token_file, read_text
from seqkern.data.token_file import refuse_cut_token_file
from seqkern.data.tokenizers import UNKNOWN_WORD, dump_tokenizer
from seqkern.errors import UserError, require
from seqkern.evaluate import evaluate
from seqkern.models.backends import BACKENDS
from seqkern.run_folder import load_run, read_config


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="how well a trained model predicts a text",
        description="Print the mean loss, perplexity and bits per character of a text under the "
        "model of a run folder, each with its standard error (from the spread of the blocks). "
        "Every token but the first is predicted once, as in training's validation.",
    )
    parser.set_defaults(command=_evaluate)
    parser.add_argument("run", type=Path, metavar="DIR", help="run folder of `seqkern train`")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="UTF-8 text file, or a token file of `seqkern prepare` with the run's tokenizer",
    )
    parser.add_argument("--context", type=int, help="tokens per block (default: as in training)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="blocks read at once (default: %(default)s)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="seqkern", help="whose layers")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _evaluate(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    context = read_config(args.run).context if args.context is None else args.context
    model, tokenizer = load_run(args.run, args.backend, args.device)
    tokens, characters = _tokens(args.data, tokenizer)
    try:
        result = evaluate(model, tokens, context, args.batch_size, progress=not args.quiet)
    except UserError as error:
        raise UserError(f"{args.data}: {error}") from error
    bits, bits_error = result.bits_per_character(len(tokens) / characters)
    print(f"{result.tokens:,} tokens predicted, in {result.blocks:,} blocks of up to {context}")
    print(_line("loss", result.loss, result.loss_error, "nats per token"))
    print(_line("perplexity", result.perplexity, result.perplexity_error, "per token"))
    print(_line("bits", bits, bits_error, f"per character, of {characters:,}"))
    if isinstance(tokenizer, WordTokenizer):
        unknown = sum(int((some.long() == 0).sum()) for some in torch.split(tokens, 1 << 20))
        if unknown:
            print(f"{unknown:,} of the tokens are {UNKNOWN_WORD}, whose spelling is not predicted")
    if result.loss_error is None:
        print("a single block says nothing about the standard error: give a longer text")
    return 0


def _tokens(path: Path, tokenizer: Tokenizer) -> tuple[Tensor, int]:
    """The tokens of a text, or of a file of tokens, and the number of characters."""
    if is_token_file(path):
        file = TokenFile(path)
        require(
            dump_tokenizer(file.tokenizer) == dump_tokenizer(tokenizer),
            f"{path} holds the tokens of another tokenizer than the run's",
        )
        file.verify()
        return file.tokens, file.characters
    refuse_cut_token_file(path)
    text = read_text(path)
    try:
        return torch.tensor(tokenizer.encode(text), dtype=torch.int64), len(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _line(name: str, value: float, error: float | None, unit: str) -> str:
    shown = "" if error is None else f" +- {error:.4f}"
    return f"{name:12s}{value:.4f}{shown} {unit}"
