import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from system_options import TINY

from seqkern.checkpoint import load_checkpoint
from seqkern.config import config_from_json
from seqkern.data import embedded_text
from seqkern.metrics import read_metrics
from seqkern.models import MODELS
from seqkern.optimizer import make_optimizer
from seqkern.run_folder import load_run, resume_run, start_run
from seqkern.speed import choose_threads, compare_backends


def test_run_folder_holds_what_it_promises(finished_run):
    assert {p.name for p in finished_run.iterdir()} == {
        "checkpoint",
        "config.json",
        "loss.png",
        "metrics.csv",
        "model.safetensors",
        "optimizer.safetensors",
        "step-00000012",
        "tokenizer.json",
    }
    rows = read_metrics(finished_run / "metrics.csv")
    assert [row.step for row in rows] == list(range(13))
    assert [row.step for row in rows if row.val_loss is not None] == [0, 4, 8, 12]
    assert rows[-1].tokens == 12 * 4 * 12
    config = json.loads((finished_run / "config.json").read_text())
    assert config["run"]["hidden"] == 12
    assert load_file(finished_run / "model.safetensors")["embedding.weight"].shape[1] == 12


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", ["seqkern", "torch"])
def test_training_learns(train, tmp_path, model, backend):
    code, _, _ = train(
        tmp_path / "run", "--model", model, "--backend", backend, "--steps", 80, "--lr", 0.02
    )
    assert code == 0
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert rows[-1].val_loss < 0.8 * rows[0].val_loss


@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
def test_every_tokenizer_trains_and_generates(train, cli_run, tmp_path, tokenizer):
    out = tmp_path / "run"
    assert train(out, "--tokenizer", tokenizer, "--vocab-size", 300)[0] == 0
    code, text, _ = cli_run("generate", out, "--prompt", "the cat", "--max-new-tokens", 9)
    assert code == 0
    assert text.startswith("the cat")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_train(train, tmp_path, dtype):
    assert train(tmp_path / "run", "--dtype", dtype, "--model", "gpt")[0] == 0
    parameter = next(iter(load_checkpoint(tmp_path / "run").model.values()))
    assert parameter.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    model, _ = load_run(tmp_path / "run")
    assert next(model.parameters()).dtype == parameter.dtype


@pytest.mark.parametrize("fraction", ["0", "0.1"])
def test_nothing_held_out_means_no_validation(train, tmp_path, fraction):
    assert train(tmp_path / "run", "--val-fraction", fraction)[0] == 0
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert any(row.val_loss is not None for row in rows) == (fraction != "0")


def test_same_seed_same_losses_and_another_seed_others(train, tmp_path, losses):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train(tmp_path / name, "--seed", seed)[0] == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_backends_train_alike(train, tmp_path):
    finals = []
    for backend in ("seqkern", "torch"):
        out = tmp_path / backend
        assert train(out, "--backend", backend, "--dtype", "float64", "--dropout", 0)[0] == 0
        finals.append([row.train_loss for row in read_metrics(out / "metrics.csv")[1:]])
    assert finals[0] == pytest.approx(finals[1], rel=1e-10)


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, kept = make_optimizer(model, 0.1, 0.5).param_groups
    assert [p.dim() for p in decayed["params"]] == [2]
    assert [p.dim() for p in kept["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stop", [1, 5, 7, 11])
def test_stopped_and_resumed_run_is_the_uninterrupted_one(train, tmp_path, losses, model, stop):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, "--model", model)[0] == 0
    code, out, _ = train(parts, "--model", model, "--stop-after", stop)
    assert code == 0
    assert f"stopped and saved at step {stop} of 12" in out
    assert train(parts, "--model", model, "--resume")[0] == 0
    assert losses(parts) == losses(whole)
    a, b = load_checkpoint(whole), load_checkpoint(parts)
    assert a.step == b.step == 12
    for part in ("model", "optimizer", "state"):
        ours, theirs = getattr(a, part), getattr(b, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_resume_needs_no_other_option_than_the_folder(train, cli_run, tmp_path, losses):
    assert train(tmp_path / "a", "--stop-after", 6)[0] == 0
    assert cli_run("train", "--resume", "--out", tmp_path / "a", "--quiet")[0] == 0
    assert train(tmp_path / "b")[0] == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_resuming_a_finished_run_changes_nothing(run_copy, cli_run, losses):
    before = losses(run_copy)
    code, out, _ = cli_run("train", "--resume", "--out", run_copy, "--quiet")
    assert (code, losses(run_copy)) == (0, before)
    assert "at step 12 of 12" in out


LONG = ["--steps", "600", "--save-every", "20", "--eval-every", "500"]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, text_file):
    from seqkern.cli import main

    out = tmp_path_factory.mktemp("long") / "run"
    assert main(["train", "--data", str(text_file), *TINY, *LONG, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=["ctrl-c", "terminate", "kill"],
)
def test_process_stopped_by_a_signal_resumes_to_the_same_losses(
    long_run, cli_run, text_file, tmp_path, losses, number, code
):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "seqkern", "train", "--data", text_file, *TINY, *LONG]
    process = subprocess.Popen(
        [*command, "--out", out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    link = out / "checkpoint"
    while not link.exists() or os.readlink(link) < "step-00000040":
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    stopped_at = load_checkpoint(out).step
    assert 40 <= stopped_at < 600
    if number != signal.SIGKILL:
        assert f"seqkern train --resume --out {out}" in output
        assert read_metrics(out / "metrics.csv")[-1].step == stopped_at
    assert cli_run("train", "--resume", "--out", out, "--threads", 1, "--quiet")[0] == 0
    assert losses(out) == losses(long_run)


@pytest.mark.slow
def test_compiled_model_trains(train, tmp_path):
    code, _, _ = train(tmp_path / "run", "--model", "gpt", "--compile", "--steps", 3)
    assert code == 0
    assert load_checkpoint(tmp_path / "run").step == 3


def test_tensorboard_writes_its_events(train, tmp_path):
    assert train(tmp_path / "run", "--tensorboard")[0] == 0
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert events.stat().st_size > 500


def test_default_folder_is_a_new_one_each_time(cli_run, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        code, out, _ = cli_run("train", "--data", text_file, *TINY)
        assert code == 0
        assert out.startswith(f"runs/lstm-char-words-{number}: lstm")


def test_time_limit_validates_saves_and_can_be_resumed(finished_run, tmp_path, losses):
    copy = shutil.copytree(finished_run, tmp_path / "copy", symlinks=True)
    shutil.rmtree(copy / "step-00000012")
    for name in ("checkpoint", "model.safetensors", "optimizer.safetensors"):
        (copy / name).unlink()
    config = config_from_json(json.loads((copy / "config.json").read_text())["run"])
    trainer = start_run(config, copy)
    outcome = trainer.fit(progress=False, max_seconds=0)
    assert (outcome.step, outcome.signal) == (1, None)
    assert load_checkpoint(copy).step == 1
    assert read_metrics(copy / "metrics.csv")[-1].val_loss is not None
    assert resume_run(copy, {}).fit(progress=False).step == 12
    train_losses = [row[2] for row in losses(copy)]
    assert train_losses == [row[2] for row in losses(finished_run)]


@pytest.mark.parametrize(("seconds", "threads"), [({1: 0.02, 2: 0.0}, 2), ({1: 0.0, 2: 0.02}, 1)])
def test_the_faster_number_of_threads_is_chosen(seconds, threads):
    before = torch.get_num_threads()
    choice = choose_threads(lambda: time.sleep(seconds[torch.get_num_threads()]), 2)
    assert choice.threads == threads
    assert choice.seconds.keys() == {1, 2}
    torch.set_num_threads(before)


def test_comparison_past_its_time_still_times_each_backend_once():
    tokens = torch.arange(200) % 7
    result = compare_backends(
        "rnn",
        {"vocab_size": 7, "hidden": 4},
        tokens,
        context=4,
        batch_size=2,
        rounds=50,
        steps_per_round=2,
        lr=0.01,
        clip=1.0,
        seed=0,
        device=torch.device("cpu"),
        max_seconds=0,
    )
    assert result.steps == 4
    assert all(speed > 0 for speed in result.tokens_per_second.values())
    assert result.largest_loss_difference < 1e-5


def test_demo_trains_samples_and_compares(cli_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("seqkern.run_folder.embedded_text", lambda: embedded_text()[:20_000])
    sizes = ["--hidden", 8, "--context", 16, "--batch-size", 4, "--sample-characters", 20]
    steps = ["--steps", 6, "--compare-rounds", 1, "--device", "cpu"]
    for number in (1, 2):
        code, out, _ = cli_run("demo", *sizes, *steps)
        assert code == 0
        for promised in ("unigram entropy", "nats per token", "bits per character", "tokens/s"):
            assert promised in out
        assert "--backend seqkern" in out
        assert "--backend torch" in out
        assert (tmp_path / "runs" / f"demo-{number}" / "loss.png").exists()


@pytest.mark.parametrize(
    ("model", "options", "lines"),
    [
        ("lstm", ["--no-tied"], ["--heads is not used: lstm has none", "--tied is not used: lstm"]),
        ("gpt", ["--tied"], []),
        ("gpt", ["--vocab-size", "50"], ["--vocab-size is not used: characters have no limit"]),
        ("gpt", ["--vocab-size", "50", "--tokenizer", "word"], []),
    ],
)
def test_options_that_change_nothing_are_named(train, tmp_path, model, options, lines):
    code, out, _ = train(tmp_path / "run", "--model", model, "--steps", 1, *options)
    assert code == 0
    said = [line for line in out.splitlines() if "is not used" in line]
    assert len(said) == len(lines)
    assert all(one.startswith(start) for one, start in zip(said, lines, strict=True))
