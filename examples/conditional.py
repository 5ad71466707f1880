"""One to many: the English words of a number, which is given as a vector.

    python examples/conditional.py            # less than a minute
    python examples/conditional.py --small    # seconds; learns nothing

The tutorial beside it: docs/tutorials/sequence_to_sequence.md.
"""

import argparse

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from seqkern import data, models

SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
TEENS = SMALL.split()
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
VOCABULARY = [*TEENS, *TENS, "hundred", "and"]


def words(n: int) -> list[str]:
    """A number below 1000 in words."""
    if n < 20:
        return [TEENS[n]]
    if n < 100:
        return [TENS[n // 10 - 2], *([TEENS[n % 10]] if n % 10 else [])]
    return [TEENS[n // 100], "hundred", *(["and", *words(n % 100)] if n % 100 else [])]


def condition(numbers: Tensor) -> Tensor:
    """[B, 30]: hundreds, tens and ones, each one-hot."""
    digits = torch.stack([numbers // 100, numbers // 10 % 10, numbers % 10], 1)  # [B, 3]
    return one_hot(digits, 10).flatten(1).float()


def main() -> None:
    """Train on four fifths of the numbers, and write the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a run of seconds")
    small = parser.parse_args().small
    steps, rows = (3, 4) if small else (400, 64)
    torch.manual_seed(0)
    numbers = torch.randperm(1000)
    training, held_out = numbers[:800], numbers[800:]

    model = models.ConditionalLanguageModel(
        models.DecoderConfig(len(VOCABULARY), kind="lstm", hidden=64), condition=30
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(1, steps + 1):
        drawn = training[torch.randint(len(training), (rows,))]
        ids = [[VOCABULARY.index(word) for word in words(n)] for n in drawn.tolist()]
        targets, lengths = data.pad_rows(ids)
        _, loss = model(condition(drawn), targets, target_lengths=lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 4) == 0:
            print(f"step {step:4d}: {loss.item():.4f} nats per word")

    found = model.generate(condition(held_out), 8, temperature=0)
    written = [
        [VOCABULARY[token] for token in tokens[:length]]
        for tokens, length in zip(found.tokens.tolist(), found.lengths.tolist(), strict=True)
    ]
    right = sum(words(n) == got for n, got in zip(held_out.tolist(), written, strict=True))
    print(f"held-out numbers written right: {right} of {len(held_out)}")
    for n, got, log_prob in list(zip(held_out.tolist(), written, found.log_prob, strict=True))[:4]:
        print(f"  {n:3d}: {' '.join(got)} (p = {log_prob.exp():.3f})")


if __name__ == "__main__":
    main()
