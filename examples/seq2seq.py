"""Many to many, unaligned: dates as people write them to dates as ISO 8601 does.

    python examples/seq2seq.py                  # one to two minutes
    python examples/seq2seq.py --kind transformer
    python examples/seq2seq.py --small          # seconds; learns nothing

The tutorial beside it: docs/tutorials/sequence_to_sequence.md.
"""

import argparse
import datetime
import random

import torch
from torch import Tensor

from seqkern import data, models

FORMATS = (
    "{d} {month} {y}",
    "{month} {d}, {y}",
    "{d}.{m}.{y}",
    "{month:.3} {d} {y}",
    "{y}/{m}/{d}",
)
SOURCE = data.train_tokenizer("char", "0123456789abcdefghijklmnopqrstuvwxyz ,./")
TARGET = data.train_tokenizer("char", "0123456789-")


def pair(rng: random.Random) -> tuple[str, str]:
    """A date in one of the formats, and in ISO 8601."""
    date = datetime.date(1900, 1, 1) + datetime.timedelta(days=rng.randrange(73_000))
    month = f"{date:%B}".lower()
    written = rng.choice(FORMATS).format(d=date.day, m=date.month, y=date.year, month=month)
    return written, date.isoformat()


def batch(pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sources [B, S], targets [B, T], and the lengths of both."""
    x, x_lengths = data.pad_rows([SOURCE.encode(written) for written, _ in pairs])
    y, y_lengths = data.pad_rows([TARGET.encode(iso) for _, iso in pairs])
    return x, y, x_lengths, y_lengths


def texts(found: models.Decoded) -> list[str]:
    """What a model wrote, each row up to its end."""
    rows = zip(found.tokens.tolist(), found.lengths.tolist(), strict=True)
    return [TARGET.decode(tokens[:length]) for tokens, length in rows]


def main() -> None:
    """Train, and rewrite dates never seen, by greedy and by beam search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("lstm", "transformer"), default="lstm")
    parser.add_argument("--small", action="store_true", help="a run of seconds")
    args = parser.parse_args()
    hidden, steps, rows = (16, 3, 4) if args.small else (96, 600, 64)
    torch.manual_seed(0)
    rng = random.Random(0)

    model = models.Seq2Seq(
        models.EncoderConfig(SOURCE.vocab_size, kind=args.kind, hidden=hidden),
        models.DecoderConfig(TARGET.vocab_size, kind=args.kind, hidden=hidden),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(1, steps + 1):
        x, y, x_lengths, y_lengths = batch([pair(rng) for _ in range(rows)])
        _, loss = model(x, y, x_lengths, y_lengths)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 6) == 0:
            print(f"step {step:4d}: {loss.item():.4f} nats per character")

    pairs = [pair(rng) for _ in range(4 if args.small else 300)]
    x, _, x_lengths, _ = batch(pairs)
    greedy = texts(model.generate(x, 16, source_lengths=x_lengths, temperature=0))
    beams = texts(model.beam_search(x, 16, source_lengths=x_lengths, beams=4))
    for name, found in (("greedy", greedy), ("4 beams", beams)):
        right = sum(iso == text for (_, iso), text in zip(pairs, found, strict=True))
        print(f"{name:7s}: {right} of {len(pairs)} right")
    for (written, _), text in list(zip(pairs, beams, strict=True))[:5]:
        print(f"  {written:20s} -> {text}")


if __name__ == "__main__":
    main()
