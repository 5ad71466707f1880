"""The emulator itself: right kernels run right under every order of threads, and each kind of wrong
kernel is caught (cases_*.cu)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "build" / "emulator"
SEEDS = range(4)

RIGHT = [
    "exchange",
    "rotate",
    "predicates",
    "histogram",
    "large_dynamic",
    "limit_is_kept",
    "after_a_fault",
    "shuffles",
    "votes",
    "reductions",
    "halves",
    "through_memory",
    "block_reduce",
    "same_bits",
    "grid_sync",
    "indices",
    "touches",
    "pairs",
    "hand_on",
    "hand_on_in_warp",
    "last_adds",
    "publish",
    "pass_on",
    "values",
    "flag",
    "flagged_rounds",
    "copied_rounds",
    "device",
    "mma_bfloat16",
    "mma_float16",
    "ldmatrix_x1",
    "ldmatrix_x2",
    "ldmatrix_x4",
    "ldmatrix_x1_transposed",
    "ldmatrix_x2_transposed",
    "ldmatrix_x4_transposed",
    "cp_async_4",
    "cp_async_8",
    "cp_async_16",
]
#: Cases without threads that could be reordered.
RIGHT_ONCE = [
    "ex2",
    "rcp",
    "conversions_float16",
    "conversions_bfloat16",
    "rows_float32",
    "rows_float64",
    "rows_float16",
    "rows_bfloat16",
]

#: What the message says of each fault; a tuple where it depends on which thread comes first.
FAULTS: dict[str, tuple[str, ...]] = {
    "exchange_without_barrier": ("nothing has written", "races with a write by thread"),
    "rotate_without_barrier": ("races with a write by thread", "races with a read by thread"),
    "read_unwritten": ("nothing has written",),
    "beyond": ("outside the block's shared memory",),
    "misaligned_shared": ("write of 4 bytes of shared memory at an address not aligned",),
    "return_before_barrier": ("95 wait in __syncthreads at cases_block.cu",),
    "barrier_in_branch": ("mismatched barriers: __syncthreads at cases_block.cu",),
    "barrier_against_warp": ("not all threads reach the same barrier",),
    "histogram_without_atomics": ("races with a read by thread", "races with a write by thread"),
    "too_large_dynamic": ("233472 bytes of shared memory failed",),
    "through_memory_without_syncwarp": ("nothing has written", "races with a write by thread"),
    "syncwarp_for_block": ("nothing has written", "races with a write by thread"),
    "shuffle_in_branch": ("__shfl_xor_sync at cases_warp.cu",),
    "lanes_disagree": ("lanes of a warp disagree",),
    "lane_outside_mask": ("__shfl_sync at cases_warp.cu",),
    "grid_sync_not_cooperative": ("in a launch that is not cooperative",),
    "cooperative_too_large": ("too many blocks in cooperative launch",),
    "cooperative_beyond_shared_memory": ("too many blocks in cooperative launch",),
    "cooperative_not_supported": ("operation not supported",),
    "not_built_for": ("seqkern's CUDA kernels were not built for this GPU",),
    "block_too_large": ("invalid configuration argument",),
    "ldmatrix_misaligned": ("not aligned to 16 bytes",),
    "cp_async_without_wait": ("nothing has written",),
    "cp_async_waits_too_few": ("nothing has written",),
    "cp_async_without_barrier": ("nothing has written", "races with a write by thread"),
    "reads_past_the_end": (
        "read of 4 bytes of global memory outside the op's tensors: offset 1024 of a tensor of",
    ),
    "reads_before_the_begin": ("read of 4 bytes of global memory outside the op's tensors",),
    "writes_past_the_end": ("write of 4 bytes of global memory outside the op's tensors",),
    "writes_input": ("write of 4 bytes of global memory that the op only reads",),
    "misaligned_pairs": ("read of 4 bytes of global memory at an address not aligned",),
    "hand_on_without_barrier": ("global memory races with a",),
    "hand_on_with_syncwarp": ("global memory races with a",),
    "same_place": ("write of global memory races with a write by thread 0 of block",),
    "last_adds_unfenced_before": ("read of global memory races with a write",),
    "last_adds_unfenced_after": ("read of global memory races with a write",),
    "last_adds_plain_reset": ("write of global memory races with a write by thread 0 of block",),
    "publish_without_barrier": ("global memory races with a",),
    "publish_without_syncwarp": ("read of global memory races with a write by thread",),
    "publish_without_acquire": ("read of global memory races with a write by thread",),
    "publish_written_again": ("global memory races with a",),
    "pass_on_with_a_gap": ("global memory races with a",),
    "values_not_relaxed": ("global memory races with a",),
    "without_grid_sync": ("global memory races with a",),
    "flagged_rounds_without_wait": ("global memory races with a",),
    "flagged_rounds_of_six": ("global memory races with a",),
    "copied_rounds_too_early": ("global memory races with a",),
}

#: Faults that show in the results too, whatever the order, when nothing checks the accesses.
WRONG_RESULTS = [
    "exchange_without_barrier",
    "rotate_without_barrier",
    "read_unwritten",
    "through_memory_without_syncwarp",
    "histogram_without_atomics",
    "cp_async_without_wait",
    "cp_async_waits_too_few",
    "cp_async_without_barrier",
    "without_grid_sync",
    "flagged_rounds_without_wait",
    "flagged_rounds_of_six",
    "copied_rounds_too_early",
]


def program() -> Path:
    """The case runner beside the library, or an error that says how to make it."""
    given = os.environ.get("SEQKERN_EMU_LIB")
    path = (Path(given).parent if given else BUILD) / "emulator_cases"
    if not path.exists():
        pytest.fail("emulator_cases is not built; run `make emulator`", pytrace=False)
    return path


def run(case: str, seed: int, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program()), case, str(seed), *flags], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels_run_right(case: str, seed: int) -> None:
    result = run(case, seed)
    assert (result.returncode, result.stdout, result.stderr) == (0, "right\n", "")


@pytest.mark.parametrize("case", RIGHT_ONCE)
def test_building_blocks(case: str) -> None:
    result = run(case, 0)
    assert (result.returncode, result.stdout, result.stderr) == (0, "right\n", "")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_caught(case: str, seed: int) -> None:
    result = run(case, seed)
    assert result.returncode == 3
    assert result.stdout == ""
    assert any(part in result.stderr for part in FAULTS[case]), result.stderr


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", WRONG_RESULTS)
def test_faults_show_in_results(case: str, seed: int) -> None:
    result = run(case, seed, "unchecked")
    assert (result.returncode, result.stdout) == (0, "wrong\n")


def test_every_case_is_tested() -> None:
    listed = subprocess.run(
        [str(program()), "list"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert sorted(listed) == sorted([*RIGHT, *RIGHT_ONCE, *FAULTS, "order"])


def test_faults_name_the_line() -> None:
    source = (Path(__file__).parent / "cases_block.cu").read_text().splitlines()
    message = run("read_unwritten", 0).stderr
    line = int(message.rsplit("cases_block.cu:", 1)[1])
    assert "out[t] = s.x[t]" in source[line - 1]


def test_the_seed_decides_the_order() -> None:
    orders = {seed: run("order", seed).stdout for seed in SEEDS}
    assert run("order", 0).stdout == orders[0]
    assert len(set(orders.values())) == len(orders)
