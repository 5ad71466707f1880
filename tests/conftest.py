"""The `backend` fixture: every op test runs on the CPU kernels, on the CUDA kernels in the host
emulator, and on CUDA where there is a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from seqkern import _C
from seqkern.ops import _registry

# Chosen at its first use, and for good: before a test sets the variable that forces another.
_C.cpu_isa()

# torch then fills what it has not written with NaN, outputs of ours among it (`make poison`).
if os.environ.get("SEQKERN_TEST_FILL"):
    torch.use_deterministic_algorithms(True, warn_only=True)

EMULATOR = Path(__file__).parent.parent / "build" / "emulator"


@dataclass(frozen=True)
class Backend:
    """Where an op test runs. `tiny` says that threads are emulated, so shapes must be small."""

    name: str
    device: str
    namespace: str
    tiny: bool = False

    @property
    def ops(self) -> object:
        """The raw ops, for opcheck."""
        return getattr(torch.ops, self.namespace)


@pytest.fixture(scope="session")
def emulator_library() -> Path:
    """The emulator's library, loaded, with fakes and gradients on its ops."""
    given = os.environ.get("SEQKERN_EMU_LIB")
    path = Path(given) if given else EMULATOR / "libseqkern_emu.so"
    if not path.exists():
        pytest.fail(f"{path} is not built; run `make emulator`", pytrace=False)
    torch.ops.load_library(str(path))
    _registry.register_all("seqkern_emu")
    return path


@pytest.fixture(params=["cpu", "emu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Runs the test once per library of kernels."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        # TF32, torch's default in its recurrent layers, would let ours err by a thousandth as well.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield Backend("cuda", "cuda", "seqkern")
    elif request.param == "emu":
        request.getfixturevalue("emulator_library")
        with _registry.use_namespace("seqkern_emu"):
            yield Backend("emu", "cpu", "seqkern_emu", tiny=True)
    else:
        yield Backend("cpu", "cpu", "seqkern")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
