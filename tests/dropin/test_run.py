"""`seqkern run` is `python`, with our kernels under the script."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
PLAIN = [sys.executable]
OURS = [sys.executable, "-m", "seqkern", "run"]

TINY = {
    # Logits enough for our loss.
    "lstm_lm.py": "--steps 4 --batch-size 2 --context 8 --hidden 16 --layers 2 --vocab-size 4200",
    "transformer_lm.py": "--steps 4 --batch-size 11 --context 64 --width 16 --heads 2",
}


def run(
    argv: list[str], cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _our_path(), **variables}
    return subprocess.run(
        argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def _our_path() -> str:
    import seqkern

    return str(Path(seqkern.__file__).parent.parent)


@pytest.fixture
def both(tmp_path: Path) -> object:
    """Runs a script's text plainly and under ours: both results."""

    def call(text: str, *args: str) -> list[subprocess.CompletedProcess[str]]:
        script = tmp_path / "the script.py"
        script.write_text(text)
        return [run([*python, script.name, *args], tmp_path) for python in (PLAIN, OURS)]

    return call


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]


@pytest.mark.parametrize("script", TINY)
def test_training_scripts_make_the_same_losses(script: str) -> None:
    arguments = [str(SCRIPTS / script), *TINY[script].split()]
    plain = run([*PLAIN, *arguments])
    ours = run([*OURS, "--report", *arguments])
    assert plain.returncode == ours.returncode == 0, ours.stderr
    assert len(losses(plain.stdout)) == 4
    assert losses(ours.stdout) == pytest.approx(losses(plain.stdout), abs=2e-5)
    speed, *report = ours.stderr.strip().splitlines()
    assert speed.endswith("tokens/s")
    assert report[0] == "seqkern: calls of torch's functions"
    taken = {line.split()[0]: line.split()[1:] for line in report[1:]}
    layer = {
        "lstm_lm.py": {"torch.nn.LSTM": ["4", "calls", "seqkern"]},
        "transformer_lm.py": {
            "torch.nn.functional.scaled_dot_product_attention": ["8", "calls", "seqkern"]
        },
    }
    loss = {"torch.nn.functional.cross_entropy": ["4", "calls", "seqkern"]}
    assert taken == {**layer[script], **loss}


def test_sees_what_python_gives_a_script(both) -> None:
    plain, ours = both(
        "import sys, os\n"
        "print(sys.argv, __name__, __file__, __spec__, __package__, sys.path[0] == os.getcwd())\n"
        "print(sys.modules['__main__'].__dict__ is globals(), sys.stdout.errors)\n"
        "print(__builtins__, sorted(globals()))\n"
        "import pickle\n"
        "class Mine: pass\n"
        "print(pickle.loads(pickle.dumps(Mine())).__class__ is Mine)\n",
        *("--report", "-x", "a b", "--help", "--", "c"),
    )
    assert "'--report', '-x', 'a b', '--help', '--', 'c'" in plain.stdout
    assert ours.stdout == plain.stdout
    assert (ours.stderr, ours.returncode) == (plain.stderr, plain.returncode) == ("", 0)


ENDS = {
    "exception": "def f():\n    raise KeyError('x')\nf()",
    "user-error": "from seqkern.errors import UserError\nraise UserError('mine')",
    "syntax": "x = (1,\nprint(",
    "null-byte": "x = 1\ny = 2 \0 z\n",
    "null-byte-first": "x = 1\n\0",
    "exit-number": "import sys\nsys.exit(7)",
    "exit-text": "import sys\nsys.exit('that was it')",
    "interrupt": "raise KeyboardInterrupt",
    "broken-pipe": "raise BrokenPipeError(32, 'Broken pipe')",
    "own-hook": "import sys\nsys.excepthook = lambda *a: print(a[1], a[2].tb_lineno)\n1 / 0",
    "atexit": "import atexit\natexit.register(print, 'bye')\nprint('hello')",
}


@pytest.mark.parametrize("text", ENDS.values(), ids=ENDS)
def test_ends_as_under_python(both, text: str) -> None:
    plain, ours = both(text)
    assert ours.stderr == plain.stderr
    assert ours.stdout == plain.stdout
    assert ours.returncode == plain.returncode


def test_killed_by_a_signal_as_under_python(both) -> None:
    plain, ours = both("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")
    assert plain.returncode == ours.returncode == -signal.SIGTERM


def test_report_is_printed_after_an_error(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom torch.nn.functional import cross_entropy\n"
        "cross_entropy(torch.randn(2, 40000), torch.tensor([0, 1]))\n"
        "torch.func.vmap(cross_entropy)(torch.randn(2, 3), torch.tensor([0, 1]))\n1 / 0\n"
    )
    result = run([*OURS, "--report", str(script)])
    assert result.returncode == 1
    assert result.stderr.splitlines()[:3] == [
        "seqkern: calls of torch's functions",
        "  torch.nn.functional.cross_entropy          1 calls            seqkern",
        "  torch.nn.functional.cross_entropy          1 calls            "
        "torch: inside a torch.func transform",
    ]
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "cannot read missing.py: No such file or directory"),
        ([], "what to run is missing: SCRIPT or -m MODULE"),
        (["--report"], "what to run is missing: SCRIPT or -m MODULE"),
        (["-m"], "-m needs the name of a module"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    result = run([*OURS, *arguments])
    assert result.returncode == 2
    assert result.stderr.startswith(f"seqkern: error: {message}")
    assert result.stderr.count("\n") == 1


GIVES_BACK = """\
import re
import torch

def resident_mib():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmRSS:\\s*(\\d+) kB", file.read())[1]) >> 10

x = torch.ones(16 << 20)  # 64 MiB
before = resident_mib()
del x
print("gives back", before - resident_mib())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")
@pytest.mark.parametrize(
    ("python", "variables", "kept"),
    [
        (PLAIN, {}, False),
        (OURS, {}, True),
        (OURS, {"MALLOC_ARENA_MAX": "4"}, False),
        (OURS, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, False),
    ],
)
def test_freed_memory_stays_unless_the_environment_rules(
    tmp_path: Path, python: list[str], variables: dict[str, str], kept: bool
) -> None:
    script = tmp_path / "script.py"
    script.write_text(GIVES_BACK)
    result = run([*python, str(script)], tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    given_back = int(result.stdout.rsplit(maxsplit=1)[-1])
    assert (given_back < 4) if kept else (given_back > 60)
