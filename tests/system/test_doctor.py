"""The lines of the report that no machine of ours without a GPU prints by itself."""

from __future__ import annotations

import pytest

from seqkern import doctor


@pytest.mark.parametrize(
    ("kernel", "line"),
    [
        (
            {
                "name": "k",
                "architecture": 90,
                "registers": 40,
                "shared_bytes": 128,
                "local_bytes": 0,
                "max_threads": 1024,
            },
            "sm_90, 40 registers, 128 B shared, 0 B local, up to 1024 threads",
        ),
        ({"name": "k", "error": "no CUDA-capable device"}, "no CUDA-capable device"),
    ],
)
def test_line_of_a_cuda_kernel(kernel: dict[str, str | int], line: str) -> None:
    assert doctor._resource_line(kernel) == line
