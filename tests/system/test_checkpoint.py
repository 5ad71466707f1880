import os
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import seqkern.checkpoint
from seqkern.checkpoint import Checkpoint, has_checkpoint, load_checkpoint, save_checkpoint
from seqkern.errors import UserError


def checkpoint(step, size=5):
    def filled():
        return {"x": torch.full((size,), float(step)), "y/z": torch.tensor(step)}

    return Checkpoint(step, model=filled(), optimizer=filled(), state=filled())


def steps_on_disk(run):
    """The step that every file of the set belongs to, by every name that leads to it."""
    loaded = load_checkpoint(run)
    steps = {loaded.step}
    for part in (loaded.model, loaded.optimizer, loaded.state):
        steps |= {int(part["y/z"]), *(int(x) for x in part["x"].unique())}
    for name in ("model.safetensors", "optimizer.safetensors"):
        steps.add(int(load_file(run / name)["y/z"]))
    return steps


def test_what_is_loaded_is_what_was_saved(tmp_path):
    saved = checkpoint(3)
    save_checkpoint(tmp_path, saved)
    loaded = load_checkpoint(tmp_path)
    assert loaded.step == 3
    for part in ("model", "optimizer", "state"):
        torch.testing.assert_close(getattr(loaded, part), getattr(saved, part))
    assert load_checkpoint(tmp_path, parts=["model"]).optimizer == {}


def test_only_the_last_set_is_kept(tmp_path):
    for step in (0, 5, 10):
        save_checkpoint(tmp_path, checkpoint(step))
    assert steps_on_disk(tmp_path) == {10}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint",
        "model.safetensors",
        "optimizer.safetensors",
        "step-00000010",
    ]


def test_folder_without_a_checkpoint_is_named(tmp_path):
    assert not has_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"there is no checkpoint in .*: no model.safetensors"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="there is no run folder"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: b"",
        lambda raw: raw + b"\0",
    ],
    ids=["cut", "one-bit", "empty", "longer"],
)
def test_damage_is_noticed_and_named(tmp_path, file, damage):
    save_checkpoint(tmp_path, checkpoint(4))
    path = tmp_path / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"the checkpoint is damaged: .*{file}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": 4}', "\xff", '{"step": 4, "sha'])
def test_damaged_scalars_are_noticed_and_named(tmp_path, text):
    save_checkpoint(tmp_path, checkpoint(4))
    (tmp_path / "checkpoint" / "state.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"the checkpoint is damaged: .*state.json"):
        load_checkpoint(tmp_path)


def test_sets_are_not_mixed(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for run, step in ((old, 1), (new, 2)):
        run.mkdir()
        save_checkpoint(run, checkpoint(step))
    (new / "optimizer.safetensors").write_bytes((old / "optimizer.safetensors").read_bytes())
    with pytest.raises(UserError, match="is not what was saved"):
        load_checkpoint(new)


def test_run_copied_with_its_links_followed_goes_on(tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    save_checkpoint(run, checkpoint(1))
    shutil.copytree(run, copy)
    assert not (copy / "model.safetensors").is_symlink()
    assert steps_on_disk(copy) == {1}
    save_checkpoint(copy, checkpoint(2))
    assert steps_on_disk(copy) == {2}
    assert steps_on_disk(run) == {1}


def test_full_disk_is_the_users_error_and_leaves_the_set_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(1))

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(seqkern.checkpoint, "write_durably", full)
    with pytest.raises(UserError, match=r"cannot save a checkpoint in .*No space left on device"):
        save_checkpoint(tmp_path, checkpoint(2))
    assert steps_on_disk(tmp_path) == {1}


class Killed(BaseException):
    """Stands for kill -9 at a chosen point."""


class Fuse:
    """Counts the operations on the disk and stops before the chosen one."""

    def __init__(self, monkeypatch, burns_at):
        self.left = burns_at
        for name in ("write_durably", "sync_folder", "replace_link"):
            self.wrap(monkeypatch, seqkern.checkpoint, name)
        self.wrap(monkeypatch, seqkern.checkpoint.Path, "rename")
        self.wrap(monkeypatch, seqkern.checkpoint.Path, "mkdir")
        self.wrap(monkeypatch, seqkern.checkpoint.shutil, "rmtree")

    def wrap(self, monkeypatch, owner, name):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            if self.left == 0:
                if name == "write_durably":  # half a file stays behind
                    args[0].write_bytes(args[1][: len(args[1]) // 2])
                raise Killed
            self.left -= 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)


# mkdir, four writes, two syncs around a rename, the switch, its sync, and removing the old set.
OPERATIONS = 11


@pytest.mark.parametrize("burns_at", range(OPERATIONS))
def test_killed_before_any_operation_leaves_one_whole_set(tmp_path, burns_at):
    save_checkpoint(tmp_path, checkpoint(1))
    with pytest.MonkeyPatch.context() as monkeypatch:
        Fuse(monkeypatch, burns_at)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, checkpoint(2))
    switched = burns_at > 8
    assert steps_on_disk(tmp_path) == {2 if switched else 1}
    save_checkpoint(tmp_path, checkpoint(3))
    assert steps_on_disk(tmp_path) == {3}
    assert len(list(tmp_path.iterdir())) == 4


def test_the_operations_counted_above_are_all(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(1))
    fuse = Fuse(monkeypatch, 1000)
    save_checkpoint(tmp_path, checkpoint(2))
    assert 1000 - fuse.left == OPERATIONS


@pytest.mark.parametrize("seed", range(8))
def test_killed_by_signal_while_saving_leaves_one_whole_set(tmp_path, seed):
    save_checkpoint(tmp_path, checkpoint(0))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # saves as fast as it can, and says when a set is complete
        step = 0
        while True:
            step += 1
            save_checkpoint(tmp_path, checkpoint(step, size=20_000))
            os.write(writer, step.to_bytes(4, "little"))
    os.read(reader, 4)
    time.sleep(random.Random(seed).uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        reported = pipe.read()
    complete = 1 + len(reported) // 4
    (step,) = steps_on_disk(tmp_path)
    assert complete <= step <= complete + 1
    save_checkpoint(tmp_path, checkpoint(step + 1))
    assert steps_on_disk(tmp_path) == {step + 1}
