"""`seqkern demo`: train on real text, show a sample, and compare the speed with PyTorch's."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from seqkern.config import RunConfig
from seqkern.metrics import read_metrics
from seqkern.run_folder import start_run
from seqkern.speed import compare_backends
from seqkern.train import Trainer


@dataclass(frozen=True)
class DemoOptions:
    """What a demo run may change."""

    out: Path | None = None
    steps: int = 800
    hidden: int = 256
    context: int = 128
    batch_size: int = 16
    compare_rounds: int = 5
    compare_steps: int = 4
    sample_characters: int = 600
    seed: int = 0
    device: str = "auto"


PROMPT = "The "


def make_demo(options: DemoOptions) -> Trainer:
    """The trainer of the demo: one LSTM layer on the characters of the embedded text.

    Without `out` every demo gets a folder of its own, `runs/demo-<n>`.
    """
    config = RunConfig(
        model="lstm",
        layers=1,
        hidden=options.hidden,
        context=options.context,
        batch_size=options.batch_size,
        steps=options.steps,
        lr=5e-3,
        eval_every=max(1, options.steps // 8),
        save_every=max(1, options.steps // 4),
        seed=options.seed,
        device=options.device,
    )
    return start_run(config, options.out, prefix="demo")


def losses_line(trainer: Trainer) -> str:
    """Unigram entropy and last validation loss, in nats per token and bits per character."""
    corpus = trainer.corpus
    entropy = corpus.unigram_entropy
    validated = [
        row.val_loss
        for row in read_metrics(trainer.run / "metrics.csv")
        if row.val_loss is not None
    ]
    line = f"unigram entropy of the text  {entropy:.4f} nats per token"
    if validated:
        bits = validated[-1] * corpus.tokens_per_character / math.log(2)
        line += (
            f"\nvalidation loss              {validated[-1]:.4f} nats per token, "
            f"{bits:.4f} bits per character"
        )
    return line


def sample(trainer: Trainer, options: DemoOptions) -> str:
    """Text of the trained model."""
    prompt = torch.tensor([trainer.corpus.tokenizer.encode(PROMPT)], device=trainer.device)
    tokens = trainer.model.generate(
        prompt, options.sample_characters, temperature=0.7, seed=options.seed
    )
    return trainer.corpus.tokenizer.decode(tokens[0].tolist())


def speed_lines(trainer: Trainer, options: DemoOptions) -> str:
    """Tokens per second with seqkern's layers and with PyTorch's, in turns."""
    config = trainer.config
    result = compare_backends(
        config.model,
        config.sizes(trainer.corpus.tokenizer.vocab_size),
        trainer.corpus.training,
        context=config.context,
        batch_size=config.batch_size,
        rounds=options.compare_rounds,
        steps_per_round=options.compare_steps,
        lr=config.lr / 10,
        clip=config.clip,
        seed=options.seed,
        device=trainer.device,
    )
    ours, theirs = (result.tokens_per_second[name] for name in ("seqkern", "torch"))
    return "\n".join(
        (
            f"--backend seqkern  {ours:12,.0f} tokens/s",
            f"--backend torch    {theirs:12,.0f} tokens/s   (seqkern / torch {ours / theirs:.2f})",
            f"largest loss difference over {options.compare_rounds + 1} x {options.compare_steps} "
            f"steps from the same seed: {result.largest_loss_difference:.1e}",
        )
    )
