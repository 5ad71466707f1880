"""Print lists of pyproject.toml, for an install without build isolation: `requires.py LIST...`.

A list is `build` (build-system.requires, cmake and ninja), `run` (dependencies) or an extra's name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def requirements(pyproject: dict[str, Any], name: str) -> Iterator[str]:
    project, tools = pyproject["project"], pyproject["tool"]["scikit-build"]
    if name == "build":
        yield from pyproject["build-system"]["requires"]
        yield f"cmake{tools['cmake']['version']}"
        yield f"ninja{tools['ninja']['version']}"
    elif name == "run":
        yield from project["dependencies"]
    else:
        for item in project["optional-dependencies"][name]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", item)  # an extra that includes others
            for extra in own[1].split(",") if own else ():
                yield from requirements(pyproject, extra.strip())
            if not own:
                yield item


if __name__ == "__main__":
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    for name in sys.argv[1:]:
        print(*requirements(tomllib.loads(text), name), sep="\n")
