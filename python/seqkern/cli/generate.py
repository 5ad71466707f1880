"""`seqkern generate`."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from seqkern.cli.running import set_threads
from seqkern.data import Tokenizer
from seqkern.errors import UserError, require
from seqkern.generation import Sampling, check_draft, check_new_tokens
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
    generate.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="divide the score of tokens seen; above 1 repeats less (default: 1)",
    )
    generate.add_argument(
        "--presence-penalty", type=float, default=0.0, help="off the score of tokens seen (0)"
    )
    generate.add_argument(
        "--frequency-penalty", type=float, default=0.0, help="the same once per occurrence (0)"
    )
    generate.add_argument(
        "--draft",
        type=Path,
        metavar="DIR",
        help="run folder of a smaller model with the same tokenizer, which proposes tokens; their "
        "distribution stays the large model's",
    )
    generate.add_argument(
        "--draft-tokens", type=int, default=4, help="proposals at a time (default: %(default)s)"
    )
    generate.add_argument("--seed", type=int, help="same seed, same text (default: a new one)")
    generate.add_argument("--backend", choices=BACKENDS, default="seqkern", help="whose layers")
    generate.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    generate.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


class _TextStream:
    """Prints tokens as text, as soon as they make whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.waiting: list[int] = []

    def show(self, ids: Sequence[int], last: bool = False) -> None:
        self.waiting.extend(ids)
        text = self.tokenizer.decode(self.waiting)
        # U+FFFD stands for the first bytes of a character whose last are still to come.
        if last or not text.endswith("\ufffd"):
            print(text, end="", flush=True)
            self.waiting = []


def _generate(args: argparse.Namespace) -> int:
    options = {field.name: getattr(args, field.name) for field in fields(Sampling)}
    Sampling(**options)  # before the model is read
    seed = args.seed
    require(seed is None or 0 <= seed < 2**63, f"seed must be in [0, 2**63), got {seed}")
    set_threads(args.threads)
    require(args.prompt != "", "--prompt must hold at least one character")
    model, tokenizer = load_run(args.run, args.backend, args.device)
    draft = None
    if args.draft is not None:
        draft, its_tokenizer = load_run(args.draft, args.backend, args.device)
        require(
            its_tokenizer.dumps() == tokenizer.dumps(),
            f"--draft must have the tokenizer of {args.run}, got another in {args.draft}",
        )
    try:
        ids = tokenizer.encode(args.prompt)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from error
    device = next(model.parameters()).device
    prompt = torch.tensor([ids], device=device)
    new = args.max_new_tokens
    check_new_tokens(1, new)
    model.check(prompt)  # nothing is printed for a prompt that is refused
    if draft is not None:
        check_draft(model, draft, args.draft_tokens)
        draft.check(prompt)
    stream = _TextStream(tokenizer)
    stream.show(ids)
    model.generate(
        prompt,
        new,
        **options,
        seed=seed,
        draft=draft,
        draft_tokens=args.draft_tokens,
        on_token=lambda token: stream.show(token.tolist()),
    )
    stream.show([], last=True)
    print(flush=True)
    return 0
