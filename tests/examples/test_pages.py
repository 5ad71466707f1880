"""The Python blocks of each page run, pasted one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "large_data.md",
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What a page's commands have left before its first block.
BEFORE = {"character_lm.md": ["train", "--hidden", "8", "--steps", "1", "--out", "runs/chars"]}


def blocks(page):
    """The page's blocks as one program, whose lines have the numbers that they have in the page."""
    text = page.read_text(encoding="utf-8")
    program = [""] * (text.count("\n") + 1)
    for found in BLOCK.finditer(text):
        first = text.count("\n", 0, found.start(1))
        lines = found[1].splitlines()
        program[first : first + len(lines)] = lines
    return "\n".join(program)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page).strip()], ids=lambda page: page.stem
)
def test_blocks_run_in_order(page, tmp_path):
    program = tmp_path / page.with_suffix(".py").name
    program.write_text(blocks(page), encoding="utf-8")
    commands = [[program]]
    if page.name in BEFORE:
        commands.insert(0, ["-m", "seqkern", *BEFORE[page.name]])
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr


def test_most_pages_have_blocks():
    assert sum(bool(blocks(page).strip()) for page in PAGES) >= 7
