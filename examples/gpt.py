"""A transformer language model of characters: random blocks, validation, generation.

    python examples/gpt.py            # minutes
    python examples/gpt.py --small    # seconds; learns nothing

The tutorial beside it: docs/tutorials/language_models.md.
"""

import argparse
import math

import torch

from seqkern import data, models


def main() -> None:
    """Train on Python's language reference and continue it, with a sample per temperature."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a run of seconds")
    small = parser.parse_args().small
    hidden, layers, context, batch_size, steps = (
        (16, 1, 8, 4, 5) if small else (128, 3, 96, 24, 500)
    )
    torch.manual_seed(0)

    text = data.embedded_text()[: 20_000 if small else None]
    tokenizer = data.train_tokenizer("char", text)
    tokens = torch.tensor(tokenizer.encode(text))
    training, held_out = tokens[:-10_000], tokens[-10_000:]

    model = models.GPT(
        models.GPTConfig(tokenizer.vocab_size, context, hidden, layers, heads=4, dropout=0.0)
    )
    print(f"{model.num_parameters():,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    blocks = data.blocks(training, context, batch_size, seed=0)
    for step in range(1, steps + 1):
        block = blocks.draw()  # [B, n + 1]
        _, loss = model(block[:, :-1], block[:, 1:].contiguous())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 5) == 0:
            print(f"step {step:4d}: {loss.item():.3f} nats per character")

    total = 0.0
    with torch.no_grad():
        for inputs, targets in data.validation_batches(held_out, context, 64):
            total += float(model(inputs, targets)[1]) * targets.numel()
    bits = total / (len(held_out) - 1) / math.log(2)
    print(f"held-out text: {bits:.3f} bits per character")

    prompt = torch.tensor([tokenizer.encode("The ")]).repeat(2, 1)
    temperature = torch.tensor([0.4, 0.9])  # an option per row
    written = model.generate(prompt, 20 if small else 150, temperature=temperature, seed=0)
    for t, row in zip(temperature.tolist(), written.tolist(), strict=True):
        print(f"--- temperature {t:.1f}\n{tokenizer.decode(row)}")


if __name__ == "__main__":
    main()
