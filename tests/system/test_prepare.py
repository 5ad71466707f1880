import json
import os
import subprocess
import sys

import pytest
from system_options import TINY
from test_cli_errors import one_line

from seqkern.data import TokenFile, load_tokenizer, train_tokenizer


@pytest.fixture
def tokens(cli_run, text_file, tmp_path):
    """A token file of words."""
    out = tmp_path / "tokens.bin"
    code, _, _ = cli_run("prepare", text_file, "--tokenizer", "word", "--out", out, "--quiet")
    assert code == 0
    return out


@pytest.fixture
def on_tokens(cli_run, tokens):
    """Trains on the token file."""

    def run(out, *options):
        return cli_run("train", "--data", tokens, *TINY, "--out", out, *options)

    return run


def test_tokens_are_those_of_the_whole_text(tokens, text_file):
    text = text_file.read_text()
    tokenizer = train_tokenizer("word", text)
    made = TokenFile(tokens)
    assert made.tokens.tolist() == tokenizer.encode(text)
    assert made.tokenizer.vocabulary() == tokenizer.vocabulary()


def test_progress_is_shown_in_bytes(cli_run, text_file, tmp_path):
    code, out, err = cli_run("prepare", text_file, "--out", tmp_path / "tokens.bin")
    assert code == 0
    assert "tokens of" in out
    assert "vocabulary: 100%" in err
    assert "encoding: 100%" in err


def test_training_on_tokens_resumes_bit_for_bit_and_generates(
    on_tokens, cli_run, losses, tokens, tmp_path
):
    assert on_tokens(tmp_path / "whole")[0] == 0
    assert on_tokens(tmp_path / "halves", "--stop-after", 5)[0] == 0
    assert (
        cli_run("train", "--resume", "--out", tmp_path / "halves", "--quiet", "--no-plot")[0] == 0
    )
    assert on_tokens(tmp_path / "named", "--vocab-size", 9)[1].splitlines()[1:3] == [
        "--heads is not used: lstm has none",
        "--vocab-size is not used: a token file has its own",
    ]
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    run = tmp_path / "whole"
    assert load_tokenizer(run / "tokenizer.json").kind == "word"
    assert json.loads((run / "config.json").read_text())["run"]["tokenizer"] == "word"
    code, out, _ = cli_run("generate", run, "--prompt", "the cat", "--max-new-tokens", 5)
    assert code == 0
    assert out.startswith("the cat")


def test_training_on_other_tokens_is_refused(on_tokens, cli_run, tokens, tmp_path):
    run = tmp_path / "run"
    one_line(on_tokens(run, "--tokenizer", "char"), "holds the tokens of a word tokenizer")
    one_line(on_tokens(run, "--context", "999999"), "the text is too short")
    assert not run.exists()
    assert on_tokens(run, "--stop-after", 5)[0] == 0
    other = tmp_path / "other.txt"
    other.write_text("the cat sat, the dog sat. " * 50)
    again = tmp_path / "other.bin"
    assert cli_run("prepare", other, "--tokenizer", "word", "--out", again, "--quiet")[0] == 0
    one_line(cli_run("train", "--resume", "--out", run, "--data", again), "is not the text")
    tokens.write_bytes(tokens.read_bytes()[100:])
    one_line(cli_run("train", "--resume", "--out", run), "tokens.bin is damaged")


def test_damaged_tokens_are_named_before_they_are_used(on_tokens, cli_run, tokens, tmp_path):
    run = tmp_path / "run"
    assert on_tokens(run, "--stop-after", 5)[0] == 0
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:200] + b"\xff\xfe" + whole[202:])
    outside = "tokens.bin is damaged: id 65279 at token 100 (byte 200) is outside its vocabulary"
    one_line(on_tokens(tmp_path / "other"), outside)
    assert not (tmp_path / "other").exists()
    one_line(cli_run("train", "--resume", "--out", run), outside)
    one_line(cli_run("evaluate", run, "--data", tokens, "--quiet"), outside)
    tokens.write_bytes(whole[2:4] + whole[2:])
    one_line(on_tokens(tmp_path / "other"), "its tokens are not those that were written")
    one_line(cli_run("evaluate", run, "--data", tokens), "not those that were written")
    tokens.write_bytes(whole[:-1])
    for result in (
        on_tokens(tmp_path / "other"),
        cli_run("evaluate", run, "--data", tokens),
        cli_run("prepare", tokens, "--out", tmp_path / "new.bin"),
    ):
        one_line(result, "tokens.bin: token file cut short")


def test_ids_of_large_files_are_checked_as_they_are_drawn(on_tokens, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("seqkern.run_folder.VERIFIED_SIZE", 100)
    whole = tokens.read_bytes()
    outside = "tokens.bin is damaged: id 65279 at token"
    N = len(TokenFile(tokens).tokens)
    for part in ("training", "validation"):
        cut = 2 * int(0.9 * N)
        start, end = (0, cut - 100) if part == "training" else (cut + 100, 2 * N)
        wrong = b"\xff\xfe" * ((end - start) // 2)
        tokens.write_bytes(whole[:start] + wrong + whole[start + len(wrong) :])
        code, _, err = on_tokens(tmp_path / part)
        assert code == 2
        assert err.count("\n") == 1
        assert outside in err


@pytest.mark.parametrize(
    ("content", "options", "fragment"),
    [
        (b"", [], "text.txt is empty"),
        (b"aaaa", [], "a vocabulary of 1 token (char): there is nothing to predict"),
        (b"once", ["--tokenizer", "word"], "a vocabulary of 1 token (word)"),
        (b"ab \xff", [], "is not UTF-8 text: byte 0xff at offset 3"),
        (b"ab, c", ["--tokenizer", "word", "--vocab-size", "2"], "vocab_size must be at least 3"),
        (b"ab c", ["--tokenizer", "bpe", "--vocab-size", "9"], "at least 256 for bpe, got 9"),
        (b"ab c", ["--out", "{folder}/no/tokens.bin"], "there is no folder"),
        (b"ab c", ["--out", "{folder}/text.txt"], "text.txt already exists"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(cli_run, tmp_path, content, options, fragment):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    options = [option.format(folder=tmp_path) for option in options]
    default = ["--out", tmp_path / "tokens.bin"]
    one_line(cli_run("prepare", text, *default, "--quiet", *options), fragment)
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.txt"]
    assert text.read_bytes() == content


def test_missing_text_is_named(cli_run, tmp_path):
    result = cli_run("prepare", tmp_path / "no.txt", "--out", tmp_path / "tokens.bin")
    one_line(result, "cannot read", "no.txt: No such file")


def test_training_on_a_vocabulary_of_one_is_refused(cli_run, tmp_path):
    (tmp_path / "text.txt").write_text("a" * 500)
    result = cli_run("train", "--data", tmp_path / "text.txt", *TINY, "--out", tmp_path / "run")
    one_line(result, "a vocabulary of 1 token (char): there is nothing to predict")
    assert not (tmp_path / "run").exists()


MEASURE = """
import resource, sys
from pathlib import Path
from seqkern.cli import main
small, large, out = sys.argv[1:]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
assert main(["prepare", small, "--out", out + ".small", "--quiet"]) == 0
before = peak()
assert main(["prepare", large, "--out", out, "--quiet"]) == 0
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_text(tmp_path):
    megabyte = "The curious cat jumped over the fence at midnight.\n" * 20_000
    (tmp_path / "small.txt").write_text(megabyte * 2)
    (tmp_path / "large.txt").write_text(megabyte * 20)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *(tmp_path / n for n in ("small.txt", "large.txt", "out"))],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    grown = int(done.stdout.splitlines()[-1])
    assert grown < 8 << 20 < len(megabyte) * 40
    made = TokenFile(tmp_path / "out")
    assert len(made.tokens) == len(megabyte) * 20
    assert made.tokenizer.decode(made.tokens[-10:].tolist()) == "midnight.\n"


def test_examples_prints_the_table(cli_run):
    code, out, _ = cli_run("examples", "The curious cat jumped over the fence", "--context", 3)
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["n", "input", "next", "word"],
        ["1", "The", "curious"],
        ["2", "The", "curious", "cat"],
        ["3", "The", "curious", "cat", "jumped"],
    ]


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["one"], "at least 2 words, got 1"),
        ([""], "at least 2 words, got 0"),
        (["one two", "--context", "0"], "--context must be at least 1, got 0"),
        (["one two", "--context", "2"], "--context 2 needs 3 words, got 2"),
    ],
)
def test_wrong_examples(cli_run, argv, fragment):
    one_line(cli_run("examples", *argv), fragment)
