"""loss.png: how training went, as a picture."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqkern.errors import missing_extra
from seqkern.files import replace_file
from seqkern.metrics import Row

_TRAIN, _VALIDATION, _REFERENCE = "#9bb8d3", "#c8442d", "#555555"
_SMOOTHED = "#1f5c99"


@dataclass(frozen=True)
class PlotLabels:
    """What the picture says beside its curves."""

    title: str
    unigram_entropy: float  # nats per token
    token: str  # what a token is: character, word, byte pair


def plot_losses(rows: list[Row], labels: PlotLabels, path: Path) -> None:
    """Draw training and validation loss over the tokens trained on.

    The left axis is in nats per token, the right in bits per token; the dashed line is the
    entropy of the token frequencies, the loss of the best model without context.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ModuleNotFoundError as error:
        raise missing_extra("matplotlib", "plot", "loss.png") from error
    train = [(row.tokens, row.train_loss) for row in rows if row.train_loss is not None]
    validation = [(row.tokens, row.val_loss) for row in rows if row.val_loss is not None]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if train:
        tokens, losses = zip(*train, strict=True)
        axes.plot(tokens, losses, color=_TRAIN, linewidth=0.8, label="training, each batch")
        smooth = _smoothed(list(losses))
        axes.plot(tokens, smooth, color=_SMOOTHED, linewidth=1.6, label="training, smoothed")
    if validation:
        tokens, losses = zip(*validation, strict=True)
        last = f"validation (last {losses[-1]:.3f})"
        axes.plot(tokens, losses, color=_VALIDATION, marker="o", markersize=4, label=last)
    axes.axhline(
        labels.unigram_entropy,
        color=_REFERENCE,
        linestyle="--",
        linewidth=1.2,
        label=f"unigram entropy ({labels.unigram_entropy:.3f})",
    )
    axes.set_title(labels.title, fontsize=11)
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel(f"loss [nats per {labels.token}]")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    ln2 = math.log(2)
    bits = axes.secondary_yaxis(
        "right", functions=(lambda y: np.divide(y, ln2), lambda y: np.multiply(y, ln2))
    )
    bits.set_ylabel(f"bits per {labels.token}")
    replace_file(path, figure.savefig)


def _smoothed(losses: list[float]) -> list[float]:
    """Mean of the steps around each step, about a fiftieth of the run: no lag behind the raw."""
    window = np.ones(2 * (len(losses) // 100) + 1)
    sums = np.convolve(losses, window, mode="same")
    counts = np.convolve(np.ones(len(losses)), window, mode="same")
    smooth: list[float] = (sums / counts).tolist()
    return smooth
