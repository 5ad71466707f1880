"""Training of a `SeriesForecaster` on windows, with the best step kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqkern.data.series import WindowBatch, WindowSampler, gather_windows
from seqkern.errors import check_tensor, require
from seqkern.models import SeriesForecaster
from seqkern.optimizer import make_optimizer
from seqkern.progress import progress_bar
from seqkern.schedule import learning_rate

_VALIDATIONS = 20  # in a training


@dataclass(frozen=True)
class Fit:
    """How a training went; losses are the head's."""

    step: int  # whose parameters the model has now
    train_loss: float  # mean over the last tenth of the steps
    validation_loss: float | None  # of that step


def train_forecaster(
    model: SeriesForecaster,
    training: Sequence[Tensor],
    *,
    validation: Sequence[tuple[int, int]] = (),
    cuts: Sequence[int] | None = None,
    steps: int = 600,
    batch_size: int = 32,
    lr: float = 3e-3,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> Fit:
    """Train a model in place; it ends with the parameters of the step that validated best.

    Args:
        model: on its device.
        training: [T_s, D] of each series, normalised.
        validation: the windows (s, t) to validate on, see `gather_windows`; none: the last step
            is kept.
        cuts: per series the steps to draw training windows from, before those of `validation`;
            None: all.
        steps: updates, with linear warm-up over a tenth and half a cosine down to a tenth.
        batch_size: windows per step.
        lr: peak learning rate of AdamW.
        weight_decay: its decay, on matrices.
        clip: largest gradient norm.
        seed: of the windows.
        progress: show a bar on stderr.

    Raises:
        UserError: too short series, a value out of range, or a loss that is no longer finite.
    """
    require(steps >= 1, f"steps must be at least 1, got {steps}")
    require(0 < lr < math.inf, f"lr must be above 0 and finite, got {lr}")
    config, device = model.config, model.step.device
    for s, one in enumerate(training):
        check_tensor(f"training[{s}]", one)
        require(
            one.dim() == 2 and one.shape[1] == config.columns,
            f"training[{s}] must be [T, {config.columns}], got {list(one.shape)}",
        )
    stops = [len(x) for x in training] if cuts is None else cuts
    before = [x[:stop].float() for x, stop in zip(training, stops, strict=True)]
    sampler = WindowSampler(before, config.context, config.horizon, batch_size, seed)
    held = None
    if validation:
        values = [x.float() for x in training]
        held = _on(gather_windows(values, validation, config.context, config.horizon), device)
    model.fit_step([x for x in before if len(x) > 1])
    optimizer = make_optimizer(model, lr, weight_decay)
    every = max(1, steps // _VALIDATIONS)
    losses: list[float] = []
    best: tuple[float, int, dict[str, Tensor]] | None = None
    bar = progress_bar(progress, iterable=range(1, steps + 1), desc="training", unit="step")
    for step in bar:
        warmup = min(100, steps // 10)
        rate = learning_rate(step, steps=steps, peak=lr, warmup=warmup, floor=0.1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        loss = model.loss(_on(sampler.draw(), device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
        require(
            math.isfinite(losses[-1]) and math.isfinite(float(norm)),
            f"loss {losses[-1]} at step {step}: training diverged, try a lower lr",
        )
        if held is not None and (step % every == 0 or step == steps):
            model.eval()
            with torch.no_grad():
                now = float(model.loss(held, future_only=True))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", validation=f"{now:.3f}", refresh=False)
            if best is None or now < best[0]:
                best = (now, step, {k: v.clone() for k, v in model.state_dict().items()})
    if best is not None:
        model.load_state_dict(best[2])
    model.eval()
    last = losses[-max(1, steps // 10) :]
    kept = (steps, None) if best is None else (best[1], best[0])
    return Fit(kept[0], sum(last) / len(last), kept[1])


def _on(batch: WindowBatch, device: torch.device) -> WindowBatch:
    return WindowBatch(batch.values.to(device), batch.lengths.to(device), batch.horizon)
