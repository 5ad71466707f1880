"""`seqkern generate`."""

import argparse
from pathlib import Path
from typing import Any

import torch

from seqkern.cli.running import set_threads
from seqkern.errors import UserError, require
from seqkern.generate import Sampling
from seqkern.models.backends import BACKENDS
from seqkern.run_folder import load_run


def add(commands: Any) -> None:
    """Add the command."""
    generate = commands.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description="Continue a prompt with the model of a run folder. The options are applied "
        "in the order temperature, top-k, top-p, min-p.",
    )
    generate.set_defaults(command=_generate)
    generate.add_argument("run", type=Path, metavar="DIR", help="run folder of `seqkern train`")
    generate.add_argument("--prompt", required=True, help="text to continue")
    generate.add_argument(
        "--max-new-tokens", type=int, default=200, help="tokens to add (default: %(default)s)"
    )
    generate.add_argument(
        "--temperature", type=float, default=1.0, help="0: always the most probable (default: 1)"
    )
    generate.add_argument(
        "--top-k", type=int, default=0, help="keep the k most probable tokens (default: 0, all)"
    )
    generate.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="keep the most probable tokens that together have this probability (default: 1)",
    )
    generate.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="keep tokens at least this fraction as probable as the best (default: 0)",
    )
    generate.add_argument("--seed", type=int, help="same seed, same text (default: a new one)")
    generate.add_argument("--backend", choices=BACKENDS, default="seqkern", help="whose layers")
    generate.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    generate.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


def _generate(args: argparse.Namespace) -> int:
    Sampling(args.temperature, args.top_k, args.top_p, args.min_p)  # before the model is read
    seed = args.seed
    require(seed is None or 0 <= seed < 2**63, f"seed must be in [0, 2**63), got {seed}")
    set_threads(args.threads)
    require(args.prompt != "", "--prompt must hold at least one character")
    model, tokenizer = load_run(args.run, args.backend, args.device)
    try:
        ids = tokenizer.encode(args.prompt)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from error
    device = next(model.parameters()).device
    tokens = model.generate(
        torch.tensor([ids], device=device),
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=seed,
    )
    print(tokenizer.decode(tokens[0].tolist()), flush=True)
    return 0
