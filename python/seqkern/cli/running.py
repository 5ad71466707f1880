"""What the commands that train or sample have in common."""

import math
import os

import torch

from seqkern import demo
from seqkern.errors import UserError, require
from seqkern.machine import most_threads
from seqkern.run_folder import draw_run
from seqkern.train import Trainer


def describe(trainer: Trainer) -> str:
    """The run, its model and its data in a line."""
    corpus = trainer.corpus
    return (
        f"{trainer.run}: {trainer.config.model}, {trainer.model.num_parameters():,} parameters, "
        f"vocabulary {corpus.tokenizer.vocab_size}, {len(corpus.training):,} training and "
        f"{len(corpus.validation):,} validation tokens, {trainer.device}"
    )


def fit(
    trainer: Trainer,
    stop_after: int | None = None,
    progress: bool = True,
    plot: bool = True,
    max_seconds: float = math.inf,
) -> int:
    """Train, draw the picture, say how it went; the exit code."""
    outcome = trainer.fit(stop_after, progress, max_seconds)
    code = 0 if outcome.signal is None else 128 + outcome.signal
    if trainer.parallel.rank:
        return code
    if plot:
        try:
            draw_run(trainer.run)
        except UserError as error:  # training is worth more than its picture
            print(f"loss.png was not drawn: {error}")
    print(demo.losses_line(trainer))
    if outcome.step < trainer.config.steps:
        print(
            f"stopped and saved at step {outcome.step} of {trainer.config.steps}; continue with: "
            f"seqkern train --resume --out {trainer.run}"
        )
    return code


def set_threads(threads: int | None) -> None:
    """Use so many CPU threads; None leaves torch's choice."""
    if threads is not None:
        require(threads >= 1, f"--threads must be at least 1, got {threads}")
        most = most_threads()
        require(
            threads <= most,
            f"--threads must be at most {most} on this machine of {os.cpu_count()} CPUs, "
            f"got {threads}",
        )
        torch.set_num_threads(threads)
