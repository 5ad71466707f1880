"""The PEP 517 backend: scikit-build-core, asking for torch only where none is installed."""

from __future__ import annotations

from find_torch import find_torch
from scikit_build_core import build as _build
from scikit_build_core.build import (  # noqa: F401  (the hooks a front end calls)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def _torch() -> list[str]:
    return [] if find_torch() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    return [*_build.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    return [*_build.get_requires_for_build_editable(config_settings), *_torch()]
