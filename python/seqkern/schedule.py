"""The learning rate over the steps of a run."""

import math


def learning_rate(step: int, *, steps: int, peak: float, warmup: int, floor: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `floor * peak` at the last step.

    Args:
        step: the update, 1 to `steps`.
        steps: updates in all.
        peak: the highest rate, reached at step `warmup`.
        warmup: steps of the linear part.
        floor: the last rate as a fraction of the peak.

    Example:
        >>> [learning_rate(s, steps=4, peak=1.0, warmup=2, floor=0.5) for s in (1, 2, 3, 4)]
        [0.5, 1.0, 0.75, 0.5]
    """
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
