"""`seqkern examples`."""

import argparse
from typing import Any

from seqkern.data import prefix_examples
from seqkern.errors import require


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "examples",
        help="print the next-word examples that a block of text stands for",
        description="Print the n examples (input prefix, next word) that a block of n + 1 words "
        "stands for. Words are what white space separates; the block is the first of the text.",
    )
    parser.set_defaults(command=_examples)
    parser.add_argument("text", metavar="TEXT", help="at least n + 1 words")
    parser.add_argument(
        "--context", type=int, help="n, the longest prefix (default: all words but the last)"
    )


def _examples(args: argparse.Namespace) -> int:
    words = args.text.split()
    require(len(words) >= 2, f"the text must hold at least 2 words, got {len(words)}")
    n = len(words) - 1 if args.context is None else args.context
    require(n >= 1, f"--context must be at least 1, got {n}")
    require(
        n < len(words),
        f"--context {n} needs {n + 1} words, got {len(words)}: use a longer text or a smaller "
        "context",
    )
    rows = [(" ".join(prefix), word) for prefix, word in prefix_examples(words[: n + 1])]
    width = max(len(prefix) for prefix, _ in rows)
    digits = len(str(n))
    print(f"{'n':>{digits}}  {'input':<{width}}  next word")
    for i, (prefix, word) in enumerate(rows, 1):
        print(f"{i:>{digits}}  {prefix:<{width}}  {word}")
    return 0
