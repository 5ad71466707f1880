"""Print pyproject.toml's own build requirements, for an install without build isolation."""

from __future__ import annotations

from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
tools = pyproject["tool"]["scikit-build"]
requires = pyproject["build-system"]["requires"]
print(*requires, f"cmake{tools['cmake']['version']}", f"ninja{tools['ninja']['version']}", sep="\n")
