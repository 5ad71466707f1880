import io
import sys

import pytest
import torch

from seqkern.cli.generate import _TextStream
from seqkern.data import train_tokenizer
from seqkern.run_folder import load_run

LINE = ("--prompt", "the", "--max-new-tokens", 40, "--seed", 3)


def test_text_is_shown_as_it_comes(cli_run, finished_run, monkeypatch):
    pieces = []

    class Terminal(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return len(text)

    _, text, _ = cli_run("generate", finished_run, *LINE)
    monkeypatch.setattr(sys, "stdout", Terminal())
    cli_run("generate", finished_run, *LINE)
    written = [piece for piece in pieces if piece]
    assert "".join(written) == text
    assert written[0] == "the"
    assert len(written) > 40


def test_the_text_is_that_of_generate(cli_run, finished_run):
    _, text, _ = cli_run("generate", finished_run, *LINE, "--top-k", 3, "--presence-penalty", 1)
    model, tokenizer = load_run(finished_run)
    prompt = torch.tensor([tokenizer.encode("the")])
    tokens = model.generate(prompt, 40, seed=3, top_k=3, presence_penalty=1.0)
    assert text == tokenizer.decode(tokens[0].tolist()) + "\n"


def test_half_a_character_waits_for_the_rest(capsys):
    tokenizer = train_tokenizer("bpe", "abc", 256)
    stream = _TextStream(tokenizer)
    shown = []
    for token in tokenizer.encode("a\u00e9\u20ac"):
        stream.show([token])
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "\u00e9", "", "", "\u20ac"]
    stream.show(tokenizer.encode("\u20ac")[:1])
    stream.show([], last=True)
    assert capsys.readouterr().out == "\ufffd"


def test_a_draft_leaves_the_text_as_it_is(cli_run, finished_run, train, tmp_path):
    train(tmp_path / "small", "--hidden", 8, "--seed", 5)
    line = (*LINE, "--temperature", 0)
    plain = cli_run("generate", finished_run, *line)
    assert cli_run("generate", finished_run, *line, "--draft", tmp_path / "small") == plain


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("--tokenizer", "word"), "--draft must have the tokenizer of"),
        (("--model", "gpt", "--context", 2, "--heads", 1), "at most the context of 2"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(
    cli_run, finished_run, train, tmp_path, options, fragment
):
    assert train(tmp_path / "other", *options)[0] == 0
    code, out, error = cli_run("generate", finished_run, *LINE, "--draft", tmp_path / "other")
    assert (code, out) == (2, "")
    assert fragment in error
    assert error.count("\n") == 1
