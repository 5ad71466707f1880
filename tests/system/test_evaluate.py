import math
import re

import pytest
import torch
from system_options import TINY

from seqkern import cli
from seqkern.data import read_text, split_text
from seqkern.errors import UserError
from seqkern.evaluate import evaluate, summarize
from seqkern.metrics import read_metrics
from seqkern.run_folder import load_run


@pytest.fixture
def held_out(text_file, tmp_path):
    """What `finished_run` was validated on, as a file."""
    path = tmp_path / "held_out.txt"
    path.write_text(split_text(read_text(text_file), 0.1)[1], encoding="utf-8")
    return path


def numbers(out):
    """Value and standard error of each printed line."""
    pattern = r"^(loss|perplexity|bits) +(\S+) \+- (\S+) "
    return {name: (float(a), float(b)) for name, a, b in re.findall(pattern, out, re.M)}


def test_evaluation_is_the_validation_of_training(cli_run, finished_run, held_out):
    code, out, err = cli_run("evaluate", finished_run, "--data", held_out, "--quiet")
    assert (code, err) == (0, "")
    printed = numbers(out)
    expected = read_metrics(finished_run / "metrics.csv")[-1].val_loss
    loss, error = printed["loss"]
    assert loss == pytest.approx(expected, abs=1e-4)
    assert 0 < error < 0.1
    assert printed["perplexity"] == pytest.approx(
        (math.exp(expected), math.exp(expected) * error), rel=1e-3, abs=1e-3
    )
    assert printed["bits"] == pytest.approx(
        (expected / math.log(2), error / math.log(2)), rel=1e-3, abs=1e-3
    )


def test_the_mean_is_that_of_log_prob(finished_run, held_out):
    model, tokenizer = load_run(finished_run)
    tokens = torch.tensor(tokenizer.encode(read_text(held_out)))[:26]
    result = evaluate(model, tokens, context=12, batch_size=1)
    blocks = [tokens[0:13], tokens[12:25], tokens[24:26]]
    expected = -sum(model.log_prob(block[None]).item() for block in blocks) / 25
    assert (result.tokens, result.blocks) == (25, 3)
    assert result.loss == pytest.approx(expected, rel=1e-6)


def test_standard_error_covers_the_mean_of_dependent_losses():
    """Blocks of equal tokens: an error from the tokens' spread would be far too small."""
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(300):
        block_means = torch.randn(20, generator=generator, dtype=torch.float64)
        counts = torch.randint(5, 15, (20,), generator=generator)
        result = summarize(block_means * counts, counts)
        means.append(result.loss)
        errors.append(result.loss_error)
    actual = torch.tensor(means).std().item()
    assert torch.tensor(errors).mean().item() == pytest.approx(actual, rel=0.15)


def test_one_block_has_no_error():
    result = summarize(torch.tensor([6.0]), torch.tensor([3]))
    assert (result.loss, result.loss_error, result.perplexity_error) == (2.0, None, None)
    assert result.bits_per_character(0.5) == (pytest.approx(1 / math.log(2)), None)


@pytest.mark.parametrize("tokenizer", ["word", "bpe"])
def test_bits_are_per_character_of_the_text(cli_run, text_file, tmp_path, tokenizer):
    run = tmp_path / "run"
    options = ["--tokenizer", tokenizer, "--vocab-size", 300, "--out", run]
    code = cli.main([str(x) for x in ("train", "--data", text_file, *TINY, *options)])
    assert code == 0
    text = "the cat sat on a mat and saw the zebra. " * 3
    data = tmp_path / "some.txt"
    data.write_text(text)
    code, out, _ = cli_run("evaluate", run, "--data", data)
    assert code == 0
    tokens = len(load_run(run)[1].encode(text))
    printed = numbers(out)
    expected = printed["loss"][0] * tokens / len(text) / math.log(2)
    assert printed["bits"][0] == pytest.approx(expected, abs=1e-3)
    assert ("3 of the tokens are <unk>" in out) == (tokenizer == "word")


def test_a_token_file_is_evaluated_as_its_text(cli_run, text_file, tmp_path):
    tokens = tmp_path / "tokens.bin"
    options = ("--tokenizer", "char", "--out", tokens, "--quiet")
    assert cli_run("prepare", text_file, *options)[0] == 0
    run = tmp_path / "run"
    assert cli_run("train", "--data", tokens, *TINY, "--out", run)[0] == 0
    outputs = [cli_run("evaluate", run, "--data", data)[1] for data in (text_file, tokens)]
    assert outputs[0] == outputs[1]
    assert numbers(outputs[0]).keys() == {"loss", "perplexity", "bits"}
    other = tmp_path / "other.bin"
    options = ("--tokenizer", "word", "--out", other, "--quiet")
    assert cli_run("prepare", text_file, *options)[0] == 0
    code, out, err = cli_run("evaluate", run, "--data", other)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "holds the tokens of another tokenizer than the run's" in err


@pytest.mark.parametrize(
    ("content", "options", "fragment"),
    [
        ("", [], "at least 2 tokens to predict one, got 0"),
        ("t", [], "at least 2 tokens to predict one, got 1"),
        ("the \u2603", [], "unknown character '\u2603' (U+2603) at position 4"),
        ("the cat", ["--context", "0"], "context must be at least 1, got 0"),
        ("the cat", ["--batch-size", "0"], "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_text_or_option_is_one_line(
    cli_run, finished_run, tmp_path, content, options, fragment
):
    data = tmp_path / "data.txt"
    data.write_text(content, encoding="utf-8")
    code, out, err = cli_run("evaluate", finished_run, "--data", data, *options)
    assert (code, out) == (2, "")
    assert err.startswith("seqkern: error: ")
    assert err.count("\n") == 1
    assert fragment in err


def test_missing_run_or_text_is_one_line(cli_run, finished_run, tmp_path):
    for run, data in ((tmp_path / "no", tmp_path), (finished_run, tmp_path / "no.txt")):
        code, out, err = cli_run("evaluate", run, "--data", data)
        assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_context_past_the_models_is_refused():
    from seqkern.models import build_model

    model = build_model("gpt", {"vocab_size": 5, "context": 8, "hidden": 8, "heads": 2})
    with pytest.raises(UserError, match="context must be at most the model's, 8, got 9"):
        evaluate(model, torch.arange(5), context=9)
