"""A language model of words: text, token file, random blocks, training, generation.

    python examples/word_lm.py            # minutes
    python examples/word_lm.py --small    # seconds; learns nothing

The tutorial beside it: docs/tutorials/language_models.md.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from seqkern import data, models


def main() -> None:
    """Train on Python's language reference and continue a sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a run of seconds")
    small = parser.parse_args().small
    hidden, context, batch_size, steps = (16, 8, 4, 5) if small else (128, 32, 16, 300)
    torch.manual_seed(0)

    with TemporaryDirectory() as folder:
        # What `seqkern prepare text.txt --tokenizer word --out tokens.bin` does.
        text = data.embedded_text()
        path = Path(folder) / "text.txt"
        path.write_text(text[:20_000] if small else text, encoding="utf-8")
        tokenizer = data.train_tokenizer("word", path.read_text(encoding="utf-8"), 4096)
        data.write_token_file(path, tokenizer, Path(folder) / "tokens.bin")

        # Blocks of context + 1 tokens, read from the disk as they are drawn.
        blocks = data.blocks(Path(folder) / "tokens.bin", context, batch_size, seed=0)
        print("a block stands for these examples (spaces are tokens too):")
        for prefix, token in data.prefix_examples(blocks.draw()[0, :6]):
            print(f"  {tokenizer.decode(prefix.tolist())!r} -> {tokenizer.decode([int(token)])!r}")

        model = models.LSTMLanguageModel(
            models.LSTMConfig(tokenizer.vocab_size, hidden, layers=1, dropout=0.1)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for step in range(1, steps + 1):
            block = blocks.draw()  # [B, n + 1]
            _, loss = model(block[:, :-1], block[:, 1:].contiguous())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % max(1, steps // 8) == 0:
                print(f"step {step:4d}, epoch {blocks.epoch}: {loss.item():.3f} nats per token")

    prompt = torch.tensor([tokenizer.encode("The function")])
    tokens = model.generate(prompt, 10 if small else 60, temperature=0.7, top_p=0.95, seed=0)
    print(tokenizer.decode(tokens[0].tolist()))


if __name__ == "__main__":
    main()
