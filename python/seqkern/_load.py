"""Load the compiled libraries, so that `torch.ops.seqkern` exists.

`seqkern._C` registers the CPU ops on import. `libseqkern_cuda.so` adds the CUDA kernels and is
loaded only under a CUDA build of torch; a machine without a GPU never opens it.
"""

from __future__ import annotations

from pathlib import Path

import torch  # its libraries must be loaded before ours resolve against them

from seqkern import _C as _C

CUDA_LIBRARY = Path(_C.__file__).with_name("libseqkern_cuda.so")


def _load_cuda() -> str:
    """Load the CUDA kernels; the reason when they are not there, or an empty string."""
    if torch.version.cuda is None:
        return "torch is a CPU build"
    if not CUDA_LIBRARY.exists():
        return "seqkern was built without CUDA kernels: no nvcc, or a CPU build of torch, was there"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:  # another CUDA major version, most often
        return f"{CUDA_LIBRARY.name} did not load: {error}"
    return ""


#: Why there are no CUDA kernels in this process; empty when there are.
cuda_unavailable_reason = _load_cuda()
