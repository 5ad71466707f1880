"""Ctrl-C at moments that a signal hits by chance: where imports and the making of a run stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli_errors import one_line

import seqkern
from seqkern import run_folder

OURS = Path(seqkern.__file__).parent.parent
QUIET = "seqkern: interrupted\n"


@pytest.fixture
def interrupted(tmp_path):
    """Runs Python where the import of a module is interrupted."""

    def run(module, *argv):
        (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt\n")
        path = os.pathsep.join((str(tmp_path), str(OURS)))
        return subprocess.run(
            [sys.executable, *argv],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )

    return run


@pytest.mark.parametrize("module", ["torch", "tqdm"])
@pytest.mark.parametrize("script", [False, True], ids=["module", "script"])
def test_while_the_command_imports(interrupted, tmp_path, module, script):
    command = ["-m", "seqkern"]
    if script:  # as pip makes it
        (tmp_path / "bin").mkdir()
        command = [str(tmp_path / "bin" / "seqkern")]
        Path(command[0]).write_text("import sys\nfrom seqkern.cli import main\nsys.exit(main())\n")
    done = interrupted(module, *command, "doctor")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", QUIET)


def test_while_somebody_elses_program_imports_us(interrupted):
    done = interrupted("torch", "-c", "import seqkern")
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("KeyboardInterrupt\n")
    assert QUIET not in done.stderr


def test_between_the_folder_and_the_first_step(train, cli_run, tmp_path, monkeypatch):
    """The folder holds no checkpoint: the message says how to go on, and that way works."""

    def interrupt(*_):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "Trainer", interrupt)
        assert train(out) == (
            130,
            "",
            "seqkern: interrupted before the first step: nothing is lost, the same command starts "
            "again\n",
        )
    assert (out / "config.json").exists()
    result = cli_run("train", "--resume", "--out", out)
    one_line(result, "stopped before its first: the same command without --resume starts again")
    assert train(out)[0] == 0
