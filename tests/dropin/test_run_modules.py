"""`seqkern run` of modules, folders and archives is `python`'s."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from test_run import OURS, PLAIN, run

MAIN = """\
import sys
from {package}other import value
print(value, __name__, __package__, __spec__ and __spec__.name, __file__, sys.argv, sys.path[0])
print(__builtins__, __loader__.__class__, sorted(globals()))
def f():
    1 / 0
if "fail" in sys.argv:
    f()
sys.exit(len(sys.argv))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A package, a program in a folder, the same in an archive, and a module that is broken."""
    (tmp_path / "package" / "inner").mkdir(parents=True)
    (tmp_path / "program").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("import sys\nprint('made', sys.argv)\n")
    for place, package in (("package", "."), ("package/inner", "."), ("program", "")):
        (tmp_path / place / "__main__.py").write_text(MAIN.format(package=package))
        (tmp_path / place / "other.py").write_text("value = 3\n")
    (tmp_path / "package" / "broken.py").write_text("x = (1,\nprint(\n")
    (tmp_path / "single.py").write_text("import sys\nprint(sys.argv, __spec__.name)\n")
    with zipfile.ZipFile(tmp_path / "program.pyz", "w") as archive:
        for file in (tmp_path / "program").glob("*.py"):
            archive.write(file, file.name)
    return tmp_path


CASES = {
    "package": ["-m", "package", "-x", "--report", "--", "-m"],
    "inner": ["-m", "package.inner", "a b"],
    "single": ["-m", "single", "-h"],
    "one-word": ["-msingle", "a"],
    "fails": ["-m", "package", "fail"],
    "broken": ["-m", "package.broken"],
    "missing": ["-m", "package.nothing"],
    "missing-at-all": ["-m", "nothing_of_this_name"],
    "not-a-name": ["-m", "single.py"],
    "folder": ["program", "-m", "x"],
    "folder-fails": ["program", "fail"],
    "folder-without-main": ["empty"],
    "archive": ["program.pyz", "--help"],
    "archive-fails": ["program.pyz", "fail"],
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_is_as_under_python(folder: Path, arguments: list[str]) -> None:
    plain = run([*PLAIN, *arguments], folder)
    ours = run([*OURS, *arguments], folder)
    assert ours.stdout == plain.stdout
    assert ours.stderr == plain.stderr
    assert ours.returncode == plain.returncode


def test_a_module_is_accelerated(folder: Path) -> None:
    (folder / "loss.py").write_text(
        "import torch\nfrom torch.nn.functional import cross_entropy\n"
        "cross_entropy(torch.randn(2, 40000), torch.tensor([0, 1]))\n"
    )
    result = run([*OURS, "--report", "-m", "loss"], folder)
    assert result.stderr.splitlines()[1].split()[1:] == ["1", "calls", "seqkern"]
