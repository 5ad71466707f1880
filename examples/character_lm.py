"""A character language model: train, evaluate, compare two sentences, generate.

    python examples/character_lm.py            # some two minutes
    python examples/character_lm.py --small    # seconds; learns nothing

The tutorial beside it, with the same on the command line: docs/tutorials/character_lm.md.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from seqkern.config import RunConfig
from seqkern.data import embedded_text
from seqkern.evaluate import evaluate
from seqkern.run_folder import load_run, start_run


def main() -> None:
    """Train on Python's language reference in a run folder, then use what it holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a run of seconds")
    small = parser.parse_args().small
    hidden, context, steps = (16, 16, 5) if small else (192, 96, 300)

    with TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(embedded_text()[: 20_000 if small else None], encoding="utf-8")
        run = Path(folder) / "run"

        # seqkern train --model lstm --data text.txt --out run ..
        config = RunConfig(
            model="lstm",
            data=str(text),
            hidden=hidden,
            layers=1,
            context=context,
            batch_size=16,
            steps=steps,
            lr=5e-3,
            eval_every=max(1, steps // 4),
            device="cpu",
        )
        trainer = start_run(config, run)
        held_out = trainer.corpus.validation
        trainer.fit(progress=False)

        # seqkern evaluate run --data held_out.txt
        model, tokenizer = load_run(run)
        result = evaluate(model, held_out, context)
        bits, error = result.bits_per_character(tokens_per_character=1.0)
        print(f"loss        {result.loss:.4f} +- {result.loss_error:.4f} nats per character")
        print(f"perplexity  {result.perplexity:.4f} +- {result.perplexity_error:.4f}")
        print(f"bits        {bits:.4f} +- {error:.4f} per character")

        # The probability of whole sequences: rows of different lengths in one batch.
        sentences = ["The value of the expression.", "Eht eulav fo het xpressenoi."]
        rows = [torch.tensor(tokenizer.encode(sentence)) for sentence in sentences]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        with torch.no_grad():
            for sentence, log_prob in zip(
                sentences, model.log_prob(padded, lengths).tolist(), strict=True
            ):
                print(f"log p = {log_prob:8.2f} nats: {sentence}")

        # seqkern generate run --prompt "The " ..
        prompt = torch.tensor([tokenizer.encode("The ")])
        tokens = model.generate(prompt, 20 if small else 300, temperature=0.7, seed=0)
        print(f"\n{tokenizer.decode(tokens[0].tolist())}")


if __name__ == "__main__":
    main()
