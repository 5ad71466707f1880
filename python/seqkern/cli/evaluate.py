"""`seqkern evaluate`."""

import argparse
from pathlib import Path
from typing import Any

import torch

from seqkern.cli.running import set_threads
from seqkern.data import WordTokenizer, read_text
from seqkern.data.tokenizers import UNKNOWN_WORD
from seqkern.errors import UserError
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
    parser.add_argument("--data", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument("--context", type=int, help="tokens per block (default: as in training)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="blocks read at once (default: %(default)s)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="seqkern", help="whose layers")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


def _evaluate(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    context = read_config(args.run).context if args.context is None else args.context
    model, tokenizer = load_run(args.run, args.backend, args.device)
    text = read_text(args.data)
    try:
        tokens = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
        result = evaluate(model, tokens, context, args.batch_size)
    except UserError as error:
        raise UserError(f"{args.data}: {error}") from error
    bits, bits_error = result.bits_per_character(len(tokens) / len(text))
    print(f"{result.tokens:,} tokens predicted, in {result.blocks:,} blocks of up to {context}")
    print(_line("loss", result.loss, result.loss_error, "nats per token"))
    print(_line("perplexity", result.perplexity, result.perplexity_error, "per token"))
    print(_line("bits", bits, bits_error, f"per character, of {len(text):,}"))
    if isinstance(tokenizer, WordTokenizer) and (tokens == 0).any():
        unknown = int((tokens == 0).sum())
        print(f"{unknown:,} of the tokens are {UNKNOWN_WORD}, whose spelling is not predicted")
    if result.loss_error is None:
        print("a single block says nothing about the standard error: give a longer text")
    return 0


def _line(name: str, value: float, error: float | None, unit: str) -> str:
    shown = "" if error is None else f" +- {error:.4f}"
    return f"{name:12s}{value:.4f}{shown} {unit}"
