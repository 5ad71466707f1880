"""tools/kernel_table.py reads ptxas's reports and fails on spills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "kernel_table.py"
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90a'
ptxas info    : Function properties for _Z1fPf
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 71 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compiling entry function '_Z1gPf' for 'sm_80'
ptxas info    : Function properties for _Z1gPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 9 registers, used 0 barriers
"""


def show(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "show", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True)


def write(folder: Path, stack: int, stores: int, loads: int) -> None:
    report = REPORT.format(stack=stack, stores=stores, loads=loads)
    (folder / "a.cu.o.ptxas").write_text(report)


def test_table(tmp_path: Path) -> None:
    write(tmp_path, 0, 0, 0)
    result = show(tmp_path)
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [row[1:] for row in rows] == [["90a", "71", "512", "0", "0"], ["80", "9", "0", "0", "0"]]
    assert result.returncode == 0


@pytest.mark.parametrize(("stores", "loads"), [(4, 0), (0, 4)])
def test_spills_fail(tmp_path: Path, stores: int, loads: int) -> None:
    write(tmp_path, 8, stores, loads)
    result = show(tmp_path)
    assert result.returncode == 1
    assert "spills on sm_90a" in result.stderr
    assert show(tmp_path, "--may-spill", "^(_Z1|)f").returncode == 0


def test_nothing_compiled_fails(tmp_path: Path) -> None:
    result = show(tmp_path)
    assert result.returncode == 1
    assert "no reports" in result.stderr


def test_launcher_keeps_the_report_and_passes_the_rest(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler.py"
    compiler.write_text(
        "import sys\n"
        "sys.stderr.write('ptxas info    : Used 9 registers\\nwarning: careful\\n')\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    target = tmp_path / "a.o"
    command = [sys.executable, str(TOOL), "compile", sys.executable, str(compiler)]
    result = subprocess.run([*command, "0", "-o", str(target)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "warning: careful\n")
    assert (tmp_path / "a.o.ptxas").read_text() == "ptxas info    : Used 9 registers\n"
    assert subprocess.run([*command, "3", "-o", str(target)], capture_output=True).returncode == 3
