"""Many to one: which machine made a recording? Records of different lengths, no sorting.

    python examples/classification.py            # less than a minute
    python examples/classification.py --small    # seconds; learns nothing

The tutorial beside it: docs/tutorials/variable_length.md.
"""

import argparse
import math

import torch
from torch import Tensor

from seqkern import data, models

MACHINES = ("pump", "fan", "drill")
PERIODS = (9.0, 13.0, 19.0)


def recording(machine: int) -> Tensor:
    """[T, 2], T from 20 to 80: two sensors that see a hum of the machine's period, and noise."""
    T = int(torch.randint(20, 81, ()))
    phase = 2 * math.pi * (torch.arange(T) / PERIODS[machine] + torch.rand(()))
    return torch.stack([phase.sin(), phase.cos()], 1) + 0.8 * torch.randn(T, 2)


def batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Recordings [B, longest, 2], lengths [B], machines [B]."""
    machines = torch.randint(len(MACHINES), (rows,))
    return *data.pad_rows([recording(int(machine)) for machine in machines]), machines


def main() -> None:
    """Train, and test on recordings never seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a run of seconds")
    small = parser.parse_args().small
    steps, rows = (3, 4) if small else (300, 64)
    torch.manual_seed(0)

    model = models.SequenceClassifier(
        models.EncoderConfig(features=2, kind="lstm", hidden=64), len(MACHINES), pooling="mean"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(1, steps + 1):
        x, lengths, machines = batch(rows)
        _, loss = model(x, lengths, machines)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 5) == 0:
            print(f"step {step:4d}: {loss.item():.3f} nats per recording")

    x, lengths, machines = batch(50 if small else 1000)
    right = model.probabilities(x, lengths).argmax(-1) == machines
    for name, group in (("all", lengths > 0), ("short", lengths < 40), ("long", lengths >= 40)):
        print(f"accuracy on {name:5s} recordings: {right[group].float().mean():.3f}")


if __name__ == "__main__":
    main()
