"""Progress bars on stderr."""

import sys
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]


def progress_bar(enabled: bool, **options: Any) -> Any:
    """A bar of tqdm's: wide, with units scaled, and seldom redrawn where it goes to a file."""
    return tqdm(
        disable=not enabled,
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        **options,
    )
