"""The training loop: updates, validation, metrics, checkpoints, and a clean stop.

A step is one update. The state after step s depends on the configuration and the seed alone, so
that a run which was stopped anywhere and resumed makes the same numbers as one which was not.
"""

import math
import signal
import sys
import threading
import time
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from seqkern.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from seqkern.config import RunConfig, resolve_device
from seqkern.data import Corpus, validation_batches
from seqkern.data.corpus import make_sampler
from seqkern.errors import UserError, require
from seqkern.metrics import MetricsLog, NoLog, Row
from seqkern.models import LanguageModel
from seqkern.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from seqkern.parallel import Parallel, as_shares, whole
from seqkern.schedule import learning_rate


class Interrupts:
    """Within the block the first Ctrl-C or SIGTERM is only noted; a second one interrupts."""

    def __init__(self) -> None:
        """Nothing received yet."""
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def __enter__(self) -> "Interrupts":
        """Take over the signals; other threads than the main one cannot."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Outcome:
    """How `Trainer.fit` ended."""

    step: int
    signal: int | None  # the signal that stopped it


class Trainer:
    """Trains a model in a run folder.

    Args:
        run: the folder; it exists.
        config: the options.
        model: on the CPU; the trainer moves it.
        corpus: what to train and validate on.
        parallel: the processes that train; this one alone by default.
    """

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        model: LanguageModel,
        corpus: Corpus,
        parallel: Parallel | None = None,
    ) -> None:
        """See the class."""
        self.run, self.config, self.corpus = run, config, corpus
        self.parallel = Parallel() if parallel is None else parallel
        self.device = self.parallel.device(resolve_device(config.device))
        dtype = torch.float64 if config.dtype == "float64" else torch.float32
        self.model = model.to(self.device, dtype)
        self._forward: nn.Module = self.parallel.wrap(self.model, config.parallel)
        if self.parallel.rank:  # other dropout in each process
            torch.manual_seed(self.parallel.seed(config.seed))
        self.optimizer = make_optimizer(self.model, config.lr, config.weight_decay)
        self.sampler = make_sampler(corpus, config.context, config.batch_size, config.seed)
        self.step = 0
        self._validated = False  # whether the ids held out were looked at
        if config.compile:
            self._forward = torch.compile(self._forward)  # type: ignore[assignment]
        # Reading a loss from a GPU waits for it: there only every tenth step.
        self._rows_at_once = 1 if self.device.type == "cpu" else 10
        self._pending: list[tuple[int, float, Tensor, Tensor]] = []

    # ------------------------------------------------------------------ state

    def save(self) -> None:
        """Write a checkpoint of the current step: the first process does, for all."""
        state = self.parallel.gathered("torch", torch.get_rng_state())
        if self.device.type == "cuda":
            state |= self.parallel.gathered("cuda", torch.cuda.get_rng_state(self.device))
        checkpoint = Checkpoint(
            step=self.step,
            model=whole(self.model.state_dict()),
            optimizer=whole(optimizer_tensors(self.model, self.optimizer)),
            state={"sampler": self.sampler.state(), **state},
        )

        def write() -> str:
            save_checkpoint(self.run, checkpoint)
            return ""

        self.parallel.first(write)

    def restore(self) -> None:
        """Continue from the run's checkpoint, the generators of dropout and batches included."""
        checkpoint = load_checkpoint(self.run)
        self.step = checkpoint.step
        load_parameters(self.model, as_shares(checkpoint.model, self.model.state_dict()))
        restore_optimizer(self.model, self.optimizer, checkpoint.optimizer)
        self.sampler.restore(checkpoint.state["sampler"])
        torch.manual_seed(self.parallel.seed(self.config.seed + self.step))  # a process that is new
        state = self.parallel.own("torch", checkpoint.state)
        if state is not None:
            torch.set_rng_state(state)
        state = self.parallel.own("cuda", checkpoint.state)
        if self.device.type == "cuda" and state is not None:
            torch.cuda.set_rng_state(state, self.device)

    # ------------------------------------------------------------------ training

    def fit(
        self,
        stop_after: int | None = None,
        progress: bool = True,
        max_seconds: float = math.inf,
    ) -> Outcome:
        """Train up to the configured number of steps.

        Args:
            stop_after: save and stop at this step, as an interrupt would.
            progress: show a bar on stderr.
            max_seconds: validate, save and stop at the first step that ends after this time.

        Raises:
            UserError: the loss is no longer finite; the last checkpoint is untouched.
        """
        config = self.config
        began = time.perf_counter()
        last = config.steps if stop_after is None else min(stop_after, config.steps)
        fresh = self.step == 0
        metrics = self._metrics(-1 if fresh else self.step)
        val_loss = None
        bar = _progress_bar(self, enabled=progress and self.parallel.rank == 0)
        with Interrupts() as interrupts, bar, closing(metrics):
            if fresh:
                self.save()
                val_loss = self.validate()
                metrics.append(Row(0, 0, None, val_loss, None, None, None))
            started = time.perf_counter()
            stopping, received = self.step >= last, 0
            while not stopping:
                self._update()
                # Read once per step: a signal that comes later waits for the next step's end.
                late, received = self.parallel.largest(
                    time.perf_counter() - began > max_seconds, interrupts.received or 0
                )
                stopping = self.step == last or bool(late) or received > 0
                ends = late or self.step == config.steps
                validates = ends or self.step % config.eval_every == 0
                saves = self.step % config.save_every == 0 or stopping
                if validates or saves or len(self._pending) >= self._rows_at_once:
                    rows = self._rows(started)
                    bar.update(len(rows) * self.tokens_per_step)
                    if validates:
                        val_loss = self.validate()
                        rows[-1] = replace(rows[-1], val_loss=val_loss)
                    for row in rows:
                        metrics.append(row)
                    bar.set_postfix(_postfix(rows[-1], val_loss), refresh=False)
                    if saves:
                        metrics.sync()
                        self.save()
                    started = time.perf_counter()
        return Outcome(self.step, received or None)

    def _metrics(self, after_step: int) -> MetricsLog | NoLog:
        """metrics.csv, which the first process writes."""
        if self.parallel.rank:
            return NoLog()
        board = self.run / "tensorboard" if self.config.tensorboard else None
        return MetricsLog(self.run / "metrics.csv", after_step, board)

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.context

    def _update(self) -> None:
        """One step: a batch, its gradient, clipped, and AdamW."""
        config = self.config
        self.step += 1
        lr = learning_rate(
            self.step,
            steps=config.steps,
            peak=config.lr,
            warmup=config.warmup_steps,
            floor=config.min_lr_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        parts = self.parallel.parts(*self.sampler.draw(), config.accumulate)
        for number, part in enumerate(parts, 1):
            inputs, targets = (x.to(self.device, non_blocking=True) for x in part)
            with self.parallel.accumulating(self._forward, number == config.accumulate):
                with self._autocast():
                    _, loss = self._forward(inputs, targets)
                loss = loss / config.accumulate  # parts are of one size: the mean of their means
                loss.backward()
            total = total + loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self._pending.append((self.step, lr, total, whole({"": norm})[""]))

    def _rows(self, started: float) -> list[Row]:
        """The metrics of the steps since `started`, read from the device."""
        stacked = torch.stack([loss for _, _, loss, _ in self._pending])
        losses = self.parallel.mean(stacked).tolist()  # waits
        seconds = time.perf_counter() - started
        speed = round(len(losses) * self.tokens_per_step / seconds, 1)
        rows = []
        for (step, lr, _, norm), loss in zip(self._pending, losses, strict=True):
            gradient_norm = float(norm)
            # Before anything is saved: an infinite gradient has spoiled the parameters already.
            require(
                math.isfinite(loss) and math.isfinite(gradient_norm),
                f"loss {loss} and gradient norm {gradient_norm} at step {step}: training diverged, "
                "try a lower lr or clip",
            )
            tokens = step * self.tokens_per_step
            rows.append(Row(step, tokens, loss, None, lr, gradient_norm, speed))
        self._pending.clear()
        return rows

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean loss over the held-out tokens (the first `eval_tokens`), None where there are none.

        Draws nothing at random: validating more or less often changes no other number.
        """
        config = self.config
        tokens = self.corpus.validation
        if config.eval_tokens:
            tokens = tokens[: config.eval_tokens + 1]
        if len(tokens) < 2:
            return None
        if self.corpus.file is not None and not self._validated:
            for start in range(0, len(tokens), 1 << 20):
                self.corpus.file.check_ids(tokens[start : start + (1 << 20)].long())
        self._validated = True
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._autocast():
            for inputs, targets in validation_batches(tokens, config.context, config.batch_size):
                _, loss = self.model(inputs.to(self.device), targets.to(self.device))
                total += loss.double() * targets.numel()
        return float(total) / (len(tokens) - 1)

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


def load_parameters(model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Copy a checkpoint's parameters into a model; `UserError` where they are of another."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint is damaged or of another model: {reason}") from error


def _progress_bar(trainer: Trainer, enabled: bool) -> Any:
    """A bar in tokens: done and to do, time left, tokens/s, loss."""
    per_step = trainer.tokens_per_step
    return tqdm(
        total=trainer.config.steps * per_step,
        initial=trainer.step * per_step,
        desc="training",
        unit="tok",
        unit_scale=True,
        disable=not enabled,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
    )


def _postfix(row: Row, val_loss: float | None) -> dict[str, str]:
    shown = {"step": str(row.step), "loss": f"{row.train_loss:.3f}"}
    return shown if val_loss is None else {**shown, "val": f"{val_loss:.3f}"}
