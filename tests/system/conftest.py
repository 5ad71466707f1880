import random
import shutil

import pytest
import torch
from system_options import TINY

from seqkern import cli
from seqkern.metrics import read_metrics


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A text of some thousand characters with something to learn."""
    rng = random.Random(0)
    words = ["the", "cat", "dog", "sat", "on", "mat", "and", "saw", "a"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choice(words) for _ in range(1500)) + ".\n", encoding="utf-8")
    return path


@pytest.fixture
def cli_run(capsys):
    """Runs a command in this process: exit code, stdout, stderr."""

    def run(*argv):
        capsys.readouterr()
        code = cli.main([str(part) for part in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def train(cli_run, text_file):
    """Trains a tiny model in a folder; options override `TINY`."""

    def run(out, *options):
        return cli_run("train", "--data", text_file, *TINY, "--out", out, *options)

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, text_file):
    """A run folder that tests may read but not change."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main(["train", "--data", str(text_file), *TINY, "--plot", "--out", str(out)]) == 0
    return out


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A copy of the finished run that a test may damage."""
    return shutil.copytree(finished_run, tmp_path / "copy", symlinks=True)


@pytest.fixture
def losses():
    """The numbers of a run that must not depend on how it was interrupted."""

    def read(run):
        columns = ("step", "tokens", "train_loss", "val_loss", "learning_rate", "gradient_norm")
        return [
            tuple(repr(getattr(row, column)) for column in columns)
            for row in read_metrics(run / "metrics.csv")
        ]

    return read
