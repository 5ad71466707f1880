"""Checkpoints: safetensors and JSON, switched as a set, nothing pickled.

A run folder holds

    checkpoint -> step-00000500          the one name that is switched
    step-00000500/                       model, optimizer and state.safetensors, state.json
    model.safetensors -> checkpoint/model.safetensors
    optimizer.safetensors -> checkpoint/optimizer.safetensors

Saving writes a whole new step folder, waits until it is on the disk, and then replaces the link
`checkpoint` by rename(2), which is atomic. At every moment each name in the run folder leads to
the same complete step: the one before, or the new one. state.json, written with the set, holds
the SHA-256 of its other files, so that damage is noticed when a checkpoint is read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import torch as safetensors
from torch import Tensor

from seqkern.errors import UserError, require
from seqkern.files import replace_link, sync_folder, write_durably

CURRENT = "checkpoint"
PARTS = ("model", "optimizer", "state")
_TOP_LEVEL = ("model.safetensors", "optimizer.safetensors")
_UNFINISHED = ".saving"


@dataclass(frozen=True)
class Checkpoint:
    """All that training needs to continue from a step."""

    step: int
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)  # random-number generators


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Make `checkpoint` the run's current one, and remove the one before.

    A step that is already the current one is left as it is: the same run at the same step has the
    same state.

    Raises:
        UserError: the disk refused; the checkpoint before is still the current one.
    """
    name = f"step-{checkpoint.step:08d}"
    link = run / CURRENT
    if link.is_symlink() and os.readlink(link) == name:
        return
    try:
        _write_set(run, name, checkpoint)
        for file in _TOP_LEVEL:
            if not (run / file).is_symlink():
                replace_link(run / file, f"{CURRENT}/{file}")
        if link.is_dir() and not link.is_symlink():
            # The run was copied with its links followed; rename(2) cannot replace a folder.
            link.rename(run / f"{_UNFINISHED}-copied")
        replace_link(link, name)
        sync_folder(run)
        for old in (*run.glob("step-*"), *run.glob(f"{_UNFINISHED}*")):
            if old.name != name:
                shutil.rmtree(old)
    except OSError as error:
        raise UserError(f"cannot save a checkpoint in {run}: {error.strerror}") from error


def _write_set(run: Path, name: str, checkpoint: Checkpoint) -> None:
    unfinished = run / f"{_UNFINISHED}-{name}"
    for leftover in (unfinished, run / name):  # of a run that was killed while saving
        if leftover.exists():
            shutil.rmtree(leftover)
    unfinished.mkdir()
    digests = {}
    for part in PARTS:
        content = safetensors.save(
            {key: tensor.detach().cpu() for key, tensor in getattr(checkpoint, part).items()},
            metadata={"step": str(checkpoint.step)},
        )
        digests[part] = hashlib.sha256(content).hexdigest()
        write_durably(unfinished / f"{part}.safetensors", content)
    scalars = {"format": 1, "step": checkpoint.step, "sha256": digests}
    write_durably(unfinished / "state.json", json.dumps(scalars, indent=1).encode())
    sync_folder(unfinished)
    unfinished.rename(run / name)
    sync_folder(run)


def has_checkpoint(run: Path) -> bool:
    """Whether a folder holds a run with at least one checkpoint."""
    return (run / CURRENT).exists()


def load_checkpoint(run: Path, parts: Collection[str] = PARTS) -> Checkpoint:
    """Read the current checkpoint, or only some of its parts.

    Raises:
        UserError: there is none, or a file of it is missing or damaged.
    """
    model = run / "model.safetensors"
    require(run.is_dir(), f"there is no run folder {run}")
    require(model.exists(), f"there is no checkpoint in {run}: no model.safetensors")
    # Resolved once: a run that saves meanwhile switches the links, and all files must be of a set.
    model = model.resolve()
    folder = model.parent if model.parent != run.resolve() else run / CURRENT
    try:
        scalars = json.loads(_read(folder / "state.json"))
        step, digests = int(scalars["step"]), {part: scalars["sha256"][part] for part in PARTS}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint is damaged: {folder / 'state.json'}") from error
    tensors = {}
    for part in parts:
        path = model if part == "model" else folder / f"{part}.safetensors"
        content = _read(path)
        require(
            hashlib.sha256(content).hexdigest() == digests[part],
            f"the checkpoint is damaged: {path} is not what was saved",
        )
        tensors[part] = safetensors.load(content)
    return Checkpoint(step=step, **tensors)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the checkpoint is damaged: cannot read {path}: {error.strerror}"
        ) from error
