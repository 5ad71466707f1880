import os
import subprocess
import sys

import pytest
import torch
from system_options import TINY

from seqkern import cli
from seqkern.models import LSTMLanguageModel


def one_line(result, *fragments):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("seqkern: error: ")
    assert err.count("\n") == 1
    assert all(fragment in err for fragment in fragments), err


@pytest.fixture
def files(tmp_path):
    """Texts a user might give by mistake."""
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 50)
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--nonsense"], "--nonsense"),
        (["train", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["train", "--model", "mlp"], "argument --model: invalid choice: 'mlp'"),
        (["train", "--resume"], "--resume needs --out DIR"),
        (["generate"], "required: DIR, --prompt"),
    ],
)
def test_wrong_command_line(cli_run, argv, fragment):
    one_line(cli_run(*argv), fragment)


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        (
            "short.txt",
            ["short.txt: the text is too short", "3 training tokens", "context + 1 = 13"],
        ),
        ("empty.txt", ["empty.txt: the text is too short", "0 training tokens"]),
        ("latin1.txt", ["latin1.txt is not UTF-8", "0xe9 at offset 3"]),
        ("folder", ["cannot read", "Is a directory"]),
        ("missing.txt", ["cannot read", "missing.txt", "No such file"]),
    ],
)
def test_wrong_text(cli_run, files, name, fragments):
    out = files / "run"
    one_line(cli_run("train", *TINY, "--data", files / name, "--out", out), *fragments)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--context", "-3"], "context must be at least 1, got -3"),
        (["--batch-size", "0"], "batch_size"),
        (["--hidden", "0"], "hidden must be at least 1, got 0"),
        (["--layers", "0"], "layers"),
        (["--model", "gpt", "--hidden", "10", "--heads", "4"], "multiple of heads = 4, got 10"),
        (["--dropout", "1"], "dropout must be in [0, 1), got 1.0"),
        (["--lr", "0"], "lr must be above 0"),
        (["--lr", "nan"], "lr must be above 0 and finite, got nan"),
        (["--warmup", "99"], "warmup must be from 0 to the number of steps, 12, got 99"),
        (["--clip", "0"], "clip"),
        (["--weight-decay", "-1"], "weight_decay"),
        (["--min-lr-ratio", "2"], "min_lr_ratio"),
        (["--val-fraction", "1"], "val_fraction must be in [0, 1), got 1.0"),
        (["--eval-every", "0"], "eval_every"),
        (["--save-every", "0"], "save_every"),
        (["--eval-tokens", "-1"], "eval_tokens"),
        (["--seed", "-1"], "seed"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--threads", "100000"], "--threads must be at most"),
        (["--threads", "9" * 30], "--threads must be at most"),
        (["--hidden", "99999999999"], "of memory, more than"),
        (["--hidden", "1" + "0" * 20], "make far too many parameters, which need far too many"),
        (["--layers", "100000000"], "take a smaller hidden or fewer layers"),
        (["--model", "gpt", "--layers", "100000000"], "take a smaller hidden or fewer layers"),
        (["--model", "rnn", "--hidden", "10000000"], "take a smaller hidden or fewer layers"),
        (
            ["--batch-size", "1000000000000"],
            "batch_size 1000000000000 and context 12 need at least",
        ),
        (["--batch-size", "9" * 30], "far too many bytes of memory, more than the"),
        (["--stop-after", "0"], "--stop-after must be at least 1"),
        (["--device", "tpu9"], "device must be auto, cpu, cuda or cuda:N, got 'tpu9'"),
        (["--device", "cuda:99"], "device cuda:99 is not there"),
        (["--tokenizer", "bpe", "--vocab-size", "10"], "at least 256 for bpe, got 10"),
        (["--tokenizer", "word", "--vocab-size", "2"], "vocab_size must be at least"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_value(train, tmp_path, options, fragment):
    one_line(train(tmp_path / "run", *options), fragment)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--compare-rounds", "0"], "compare_rounds must be at least 1, got 0"),
        (["--threads", "-1"], "threads must be at least 0, got -1"),
        (["--threads", "100000"], "threads must be at most"),
        (["--context", "9999999"], "the text is too short"),
    ],
)
def test_wrong_demo_value(cli_run, tmp_path, monkeypatch, options, fragment):
    monkeypatch.chdir(tmp_path)
    one_line(cli_run("demo", *options), fragment)
    assert not list(tmp_path.iterdir())


def test_sizes_that_fill_the_memory_later_are_a_line_as_well(cli_run, finished_run, monkeypatch):
    def fill(*_, **__):
        torch.empty(1 << 60)

    monkeypatch.setattr(LSTMLanguageModel, "generate", fill)
    code, _, err = cli_run("generate", finished_run, "--prompt", "the")
    assert code == 2
    assert err == (
        "seqkern: error: there is not enough memory for these sizes: take smaller ones\n"
    )


def test_diverged_training_keeps_its_last_checkpoint(train, cli_run, tmp_path):
    code, _, err = train(tmp_path / "run", "--lr", "1e30", "--warmup", 0, "--clip", "inf")
    assert code == 2
    assert err.count("\n") == 1
    assert "training diverged, try a lower lr" in err
    assert cli_run("generate", tmp_path / "run", "--prompt", "the")[0] == 0


def test_folder_that_holds_a_run_is_not_overwritten(train, run_copy, losses):
    before = losses(run_copy)
    one_line(train(run_copy), "already holds a run: use --resume, or another --out")
    assert losses(run_copy) == before


def test_folder_that_holds_something_else_is_left_alone(train, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    one_line(train(tmp_path), "already holds other files (notes.txt)")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_folder_that_cannot_be_made(train, files):
    one_line(train(files / "short.txt" / "run"), "Not a directory")
    one_line(train(files / "short.txt"), "is not a folder")


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--hidden", "16"], "--hidden was 12, got 16"),
        (["--model", "gpt"], "--model was lstm, got gpt"),
        (["--lr", "0.5"], "--lr was 0.002, got 0.5"),
        (["--steps", "50"], "--steps was 12, got 50"),
        (["--seed", "3"], "--seed was 0, got 3"),
        (["--tokenizer", "word"], "--tokenizer was char, got word"),
    ],
)
def test_resuming_with_another_configuration(cli_run, run_copy, options, fragment):
    result = cli_run("train", "--resume", "--out", run_copy, *options)
    one_line(result, "cannot resume with another configuration", fragment)


def test_resuming_with_another_text(cli_run, run_copy, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("the cat " * 100)
    result = cli_run("train", "--resume", "--out", run_copy, "--data", other)
    one_line(result, "cannot resume", "is not the text")


def test_resuming_nothing(cli_run, tmp_path):
    one_line(cli_run("train", "--resume", "--out", tmp_path / "no"), "there is no run folder")
    one_line(cli_run("train", "--resume", "--out", tmp_path), "is not a run folder")


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 8
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", flip),
        ("model.safetensors", os.unlink),
        ("checkpoint/model.safetensors", os.unlink),
        ("checkpoint/state.json", cut),
        ("checkpoint/state.json", os.unlink),
        ("config.json", cut),
        ("config.json", os.unlink),
        ("tokenizer.json", cut),
        ("tokenizer.json", flip),
        ("tokenizer.json", os.unlink),
    ],
)
def test_damaged_run(cli_run, run_copy, file, damage):
    damage(run_copy / file)
    one_line(cli_run("generate", run_copy, "--prompt", "the"), str(run_copy))
    one_line(cli_run("train", "--resume", "--out", run_copy), str(run_copy))


@pytest.mark.parametrize("damage", [cut, flip, os.unlink], ids=["cut", "flipped", "removed"])
@pytest.mark.parametrize("file", ["optimizer.safetensors", "checkpoint/state.safetensors"])
def test_damaged_training_state_stops_only_training(cli_run, run_copy, file, damage):
    damage((run_copy / file).resolve())
    one_line(cli_run("train", "--resume", "--out", run_copy), "the checkpoint is damaged")
    assert cli_run("generate", run_copy, "--prompt", "the")[0] == 0


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--prompt", "the \u2603"], ["--prompt", "'\u2603' (U+2603) at position 4"]),
        (["--prompt", ""], ["--prompt must hold at least one character"]),
        (["--prompt", "a", "--temperature", "-1"], ["temperature", "got -1.0"]),
        (["--prompt", "a", "--temperature", "nan"], ["temperature", "got nan"]),
        (["--prompt", "a", "--top-k", "-1"], ["top_k", "got -1"]),
        (["--prompt", "a", "--top-p", "0"], ["top_p", "got 0.0"]),
        (["--prompt", "a", "--min-p", "1.5"], ["min_p", "got 1.5"]),
        (["--prompt", "a", "--max-new-tokens", "-5"], ["max_new_tokens", "got -5"]),
        (["--prompt", "a", "--max-new-tokens", "9" * 20], ["max_new_tokens", "of memory, more"]),
        (["--prompt", "a", "--max-new-tokens", "1" + "0" * 12], ["10 TiB of memory, more than"]),
        (["--prompt", "a", "--top-k", "9" * 23], ["top_k must be at least 0", "below 2**63"]),
        (["--prompt", "a", "--top-k", "9" * 400], ["top_k must be at least 0", "below 2**63"]),
        (["--prompt", "a", "--repetition-penalty", "inf"], ["above 0 and finite, got inf"]),
        (["--prompt", "a", "--seed", "-1"], ["seed", "got -1"]),
        (["--prompt", "a", "--device", "cuda:99"], ["device cuda:99 is not there"]),
    ],
)
def test_wrong_generation(cli_run, finished_run, options, fragments):
    one_line(cli_run("generate", finished_run, *options), *fragments)


def test_prompt_longer_than_the_context_of_a_transformer(train, cli_run, tmp_path):
    assert train(tmp_path / "run", "--model", "gpt")[0] == 0
    result = cli_run("generate", tmp_path / "run", "--prompt", "the cat sat on a mat")
    one_line(result, "at most the context of 12 long, got 20")


def test_generation_from_nowhere(cli_run, tmp_path):
    one_line(cli_run("generate", tmp_path / "no", "--prompt", "a"), "there is no run folder")


def test_same_seed_generates_the_same_text(cli_run, finished_run):
    def text(seed):
        code, out, _ = cli_run(
            "generate", finished_run, "--prompt", "the", "--max-new-tokens", 40, "--seed", seed
        )
        assert code == 0
        assert len(out) == 3 + 40 + 1
        return out

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize(
    "command",
    [
        "",
        *[
            "prepare",
            "train",
            "generate",
            "evaluate",
            "examples",
            "forecast",
            "run",
            "demo",
            "doctor",
        ],
    ],
)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split(), "--help"])
    assert stopped.value.code == 0
    assert "usage: seqkern" in capsys.readouterr().out


def test_doctor_says_what_runs_where(cli_run):
    from seqkern import _C

    code, out, err = cli_run("doctor")
    assert (code, err) == (0, "")
    assert torch.__version__ in out
    assert f"seqkern's, {_C.cpu_isa()}" in out
    assert "ops.cross_entropy" in out


def test_process_exits_with_one_line_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "seqkern", "generate", tmp_path, "--prompt", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("seqkern: error: ")
    assert done.stderr.count("\n") == 1
