"""How tests say what a wrong call has to answer: one line, of a certain type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """`call` raises exactly `error`, in one line that begins as the regex `message` says."""
    with pytest.raises(error, match=rf"\A{message}") as raised:
        call()
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is None
