"""A word-level LSTM language model in plain PyTorch, as a script of its own.

Prints the loss of every step on stdout and the speed on stderr.
"""

import argparse
import re
import sys
import time
from pydoc_data import topics

import torch
from torch import nn


def tokens(vocab_size: int) -> torch.Tensor:
    """Python's language reference as word ids; rare words share the last one."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(topics.topics.values()))
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    common = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - 1]
    ids = {word: i for i, word in enumerate(common)}
    return torch.tensor([ids.get(word, vocab_size - 1) for word in words])


class Model(nn.Module):
    def __init__(self, vocab_size: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, vocab_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=8000)
    args = parser.parse_args()

    torch.manual_seed(0)
    text = tokens(args.vocab_size)
    model = Model(args.vocab_size, args.hidden, args.layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    criterion = nn.CrossEntropyLoss()
    seconds = 0.0
    for step in range(args.steps):
        started = time.perf_counter()
        starts = torch.randint(len(text) - args.context, (args.batch_size, 1))
        block = text[starts + torch.arange(args.context + 1)]
        logits = model(block[:, :-1])
        loss = criterion(logits.flatten(0, 1), block[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"step {step} loss {loss.item():.6f}")
        if step:  # the first one also loads libraries
            seconds += time.perf_counter() - started
    speed = (args.steps - 1) * args.batch_size * args.context / seconds
    print(f"{speed:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
