"""Many to many, aligned: a tag for every character, which depends on what comes after it.

    python examples/tagging.py            # less than a minute
    python examples/tagging.py --small    # seconds; learns nothing

The tutorial beside it: docs/tutorials/variable_length.md.
"""

import argparse
import random

import torch
from torch import Tensor

from seqkern import data, models

UNITS = {"kg": 1, "g": 1, "cm": 2, "m": 2, "hours": 3, "days": 3}
NAMES = ("other", "mass", "length", "time")
ALPHABET = data.train_tokenizer("char", "0123456789abcdefghijklmnopqrstuvwxyz ,")


def line(rng: random.Random) -> tuple[list[int], list[int]]:
    """Characters and their tags: a number is tagged as what its unit measures."""
    text, tags = "", []
    for _ in range(rng.randint(1, 5)):
        unit = rng.choice(list(UNITS))
        number = str(rng.randint(1, 9999))
        rest = f" {unit} of {''.join(rng.choices('abcdefghij', k=rng.randint(2, 8)))}, "
        text += number + rest
        tags += [UNITS[unit]] * len(number) + [0] * len(rest)
    return ALPHABET.encode(text), tags


def batch(rows: int, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Characters [B, longest], lengths [B], tags [B, longest]."""
    characters, tags = zip(*(line(rng) for _ in range(rows)), strict=True)
    padded, lengths = data.pad_rows(characters)
    return padded, lengths, data.pad_rows(tags)[0]


def accuracy(model: models.SequenceTagger, rows: int) -> float:
    """Part of the digits of new lines that get the right tag."""
    x, lengths, tags = batch(rows, random.Random(1))
    asked = tags > 0
    return float((model.probabilities(x, lengths).argmax(-1)[asked] == tags[asked]).float().mean())


def main() -> None:
    """Train a tagger that reads both ways and one that reads forwards only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a run of seconds")
    small = parser.parse_args().small
    steps, rows = (3, 4) if small else (200, 32)

    for bidirectional in (True, False):
        torch.manual_seed(0)
        rng = random.Random(0)
        model = models.SequenceTagger(
            models.EncoderConfig(ALPHABET.vocab_size, hidden=64, bidirectional=bidirectional),
            tags=len(NAMES),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(steps):
            x, lengths, tags = batch(rows, rng)
            _, loss = model(x, lengths, tags)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ways = "both ways" if bidirectional else "forwards "
        print(f"reading {ways}: loss {loss.item():.3f}, digits right {accuracy(model, 200):.3f}")
        if bidirectional:
            text = "12 kg of abc, 7 cm of fig, "
            tags = model.probabilities(torch.tensor([ALPHABET.encode(text)])).argmax(-1)[0]
            print(f"  {text}\n  {''.join(NAMES[tag][0] for tag in tags.tolist())}")


if __name__ == "__main__":
    main()
