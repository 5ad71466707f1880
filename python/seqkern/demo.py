"""`seqkern demo`: train on real text, show a sample, and compare the speed with PyTorch's."""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from seqkern.config import RunConfig
from seqkern.errors import require
from seqkern.machine import most_threads
from seqkern.metrics import read_metrics
from seqkern.run_folder import start_run
from seqkern.speed import choose_threads, compare_backends
from seqkern.train import Trainer


@dataclass(frozen=True)
class DemoOptions:
    """What a demo run may change."""

    out: Path | None = field(default=None, metadata={"help": "run folder"})
    steps: int = field(default=800, metadata={"help": "updates"})
    hidden: int = field(default=256, metadata={"help": "width of the LSTM"})
    context: int = field(default=128, metadata={"help": "characters per training block"})
    batch_size: int = field(default=16, metadata={"help": "blocks per step"})
    max_seconds: int = field(
        default=150,
        metadata={"help": "longest training: a slower machine stops earlier, saved and resumable"},
    )
    compare_rounds: int = field(
        default=5, metadata={"help": "timed rounds per backend in the comparison"}
    )
    compare_steps: int = field(default=4, metadata={"help": "updates per round"})
    sample_characters: int = field(default=600, metadata={"help": "length of the sample"})
    seed: int = field(default=0, metadata={"help": "of parameters, batches and sample"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N"})
    threads: int = field(
        default=0, metadata={"help": "CPU threads; 0: one or all, whichever is faster now"}
    )

    def __post_init__(self) -> None:
        """Check what the run's own configuration does not."""
        for name in ("compare_rounds", "compare_steps"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, got {value}")
        for name in ("max_seconds", "sample_characters", "threads"):
            value = getattr(self, name)
            require(value >= 0, f"{name} must be at least 0, got {value}")
        most = most_threads()
        require(
            self.threads <= most,
            f"threads must be at most {most} on this machine, got {self.threads}",
        )


PROMPT = "The "
_COMPARISON_SECONDS = 45.0


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


def set_threads(trainer: Trainer, options: DemoOptions) -> str:
    """Set the number of CPU threads; a line that says why."""
    available = torch.get_num_threads()
    if options.threads or available == 1 or trainer.device.type != "cpu":
        torch.set_num_threads(options.threads or available)
        return f"CPU threads: {options.threads or available}"
    model = copy.deepcopy(trainer.model)
    batch = torch.zeros(options.batch_size, options.context, dtype=torch.int64)
    choice = choose_threads(lambda: model(batch, batch)[1].backward(), available)
    torch.set_num_threads(choice.threads)
    timed = ", ".join(f"{n}: {1000 * s:.0f} ms" for n, s in choice.seconds.items())
    return f"CPU threads: {choice.threads} of {available}, the faster (a step with {timed})"


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
        max_seconds=_COMPARISON_SECONDS,
    )
    ours, theirs = (result.tokens_per_second[name] for name in ("seqkern", "torch"))
    return "\n".join(
        (
            f"--backend seqkern  {ours:12,.0f} tokens/s",
            f"--backend torch    {theirs:12,.0f} tokens/s   (seqkern / torch {ours / theirs:.2f})",
            f"largest loss difference over {result.steps} steps from the same seed: "
            f"{result.largest_loss_difference:.1e}",
        )
    )
