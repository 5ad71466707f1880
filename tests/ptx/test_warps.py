"""What instructions of a warp, memory and barriers mean to the emulator (ptx.h), and the
faults that it finds in kernels wrong on purpose (cases/)."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import numpy as np
import pytest
from harness import HEAD, HERE, Array, build, compile_kernels, launch, translate

WARP = """
.entry warp_{name}(.param .u64 in, .param .u64 out) {{
.reg .pred %p<4>; .reg .b32 %r<99>; .reg .b64 %rd<9>;
mov.u32 %r1, %tid.x;
ld.param.u64 %rd1, [in];
ld.param.u64 %rd2, [out];
mul.wide.u32 %rd3, %r1, 4;
add.s64 %rd4, %rd1, %rd3;
add.s64 %rd5, %rd2, %rd3;
ld.global.u32 %r2, [%rd4];
{body}
st.global.u32 [%rd5], %r3;
ret;
}}
"""
# mode, b, c: segments of all lanes, and of 8 or 4
SHUFFLES = [
    ("up", 3, 0),
    ("up", 1, 24 << 8),
    ("down", 5, 31),
    ("down", 2, 24 << 8 | 31),
    ("bfly", 16, 31),
    ("bfly", 1, 31),
    ("idx", 7, 31),
    ("idx", 2, 28 << 8 | 31),
]

REDUCTIONS = [("u32", "max"), ("s32", "max"), ("s32", "min"), ("u32", "add")]


def shuffled(mode: str, b: int, c: int) -> list[int]:
    """From which lane each takes, as the ISA's pseudo-code has it."""
    segment, clamp = c >> 8 & 31, c & 31
    found = []
    for lane in range(32):
        most, least = lane & segment | clamp & ~segment, lane & segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | b & ~segment}
        j = source[mode]
        inside = j >= most if mode == "up" else j <= most
        found.append(j if inside else lane)
    return found


def all_kernels() -> str:
    """Those of cases/, and one per shuffle and vote."""
    text = (HERE / "cases" / "faults.ptx").read_text()
    text += (HERE / "cases" / "counts.ptx").read_text().replace(HEAD, "")
    for order in ("release", "relaxed"):
        counting = (HERE / "cases" / "counting.ptx").read_text().replace("ORDER", order)
        text += counting.replace(HEAD, "")
    for kind in ("bf16", "f16"):
        matrix = (HERE / "cases" / "matrix.ptx").read_text().replace("TYPE", kind)
        text += matrix.replace(HEAD, "")
    for i, (mode, b, c) in enumerate(SHUFFLES):
        body = f"shfl.sync.{mode}.b32 %r3|%p1, %r2, {b}, {c}, -1;"
        text += WARP.format(name=f"shuffle{i}", body=body)
    below = "setp.lt.u32 %p1, %r2, 100;"
    text += WARP.format(name="ballot", body=f"{below} vote.sync.ballot.b32 %r3, %p1, -1;")
    for kind, operation in REDUCTIONS:
        body = f"redux.sync.{operation}.{kind} %r3, %r2, -1;"
        text += WARP.format(name=f"redux_{operation}_{kind}", body=body)
    any_ = f"{below} vote.sync.any.pred %p2, %p1, -1; selp.u32 %r3, 1, 0, %p2;"
    return text + WARP.format(name="any", body=any_)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(all_kernels(), tmp_path_factory.mktemp("warps"))


@pytest.mark.parametrize("i", range(len(SHUFFLES)), ids=[f"{m}-{b}-{c}" for m, b, c in SHUFFLES])
def test_shuffles(kernels: ctypes.CDLL, i: int) -> None:
    given, found = np.arange(100, 132, dtype=np.uint32), np.zeros(32, np.uint32)
    assert launch(kernels, f"warp_shuffle{i}", given, found, threads=32) is None
    assert found.tolist() == given[shuffled(*SHUFFLES[i])].tolist()


def test_votes(kernels: ctypes.CDLL) -> None:
    given, found = np.arange(90, 122, dtype=np.uint32), np.zeros(32, np.uint32)
    assert launch(kernels, "warp_ballot", given, found, threads=32) is None
    assert set(found.tolist()) == {2**10 - 1}
    assert launch(kernels, "warp_any", given, found, threads=32) is None
    assert set(found.tolist()) == {1}
    assert launch(kernels, "warp_any", given + np.uint32(100), found, threads=32) is None
    assert set(found.tolist()) == {0}


@pytest.mark.parametrize(("kind", "operation"), REDUCTIONS)
def test_reductions(kernels: ctypes.CDLL, kind: str, operation: str) -> None:
    given = np.arange(-16, 16, dtype=np.int32).view(np.uint32)
    found = np.zeros(32, np.uint32)
    assert launch(kernels, f"warp_redux_{operation}_{kind}", given, found, threads=32) is None
    numbers = given.view(np.int32 if kind == "s32" else np.uint32)
    reduced = {"max": np.max, "min": np.min, "add": np.add.reduce}[operation](numbers)
    assert set(found.tolist()) == {int(reduced) % 2**32}


def half(x: Array, kind: str) -> tuple[Array, Array]:
    """Bits of the 16-bit type, and the floats they stand for."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16), x.astype(np.float16).astype(np.float64)
    cut = x.astype(np.float32).view(np.uint32) >> 16
    return cut.astype(np.uint16), (cut << 16).astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_products_of_matrices(kernels: ctypes.CDLL, kind: str) -> None:
    """ldmatrix and mma.sync with the layout of their fragments, and cp.async."""
    random = np.random.default_rng(0)
    (a, exact_a), (b, exact_b) = (
        half(random.normal(size=(16, 16)), kind),
        half(random.normal(size=(16, 8)), kind),
    )
    c, d = random.normal(size=(16, 8)).astype(np.float32), np.zeros((16, 8), np.float32)
    assert launch(kernels, f"matrix_{kind}", a, b, c, d, threads=32) is None
    exact = exact_a @ exact_b + c
    assert np.abs(d - exact).max() < 16 * 2.0**-23 * np.abs(exact).max()
    assert not np.array_equal(d, exact.astype(np.float32))


def test_tensor_cores_cut_off(kernels: ctypes.CDLL) -> None:
    """What lies more than a bit below the last of the largest summand's float is lost; the sum is
    not rounded up."""
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.ones((16, 8), np.float32)
    b[:, :] = 1
    a[0, 0] = (
        2.0**-24 * 1.5
    )  # a bit of a half of the last place of 1 stays, and is cut off in the end
    a[1, :8] = 2.0**-24  # eight of these are four last places
    a[2, :8] = 2.0**-25  # and these are nothing
    a[3, 0] = -(2.0**-25)
    d = np.zeros((16, 8), np.float32)
    assert (
        launch(kernels, "matrix_bf16", half(a, "bf16")[0], half(b, "bf16")[0], c, d, threads=32)
        is None
    )
    assert d[:5, 0].tolist() == [1, 1 + 2.0**-21, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mma_apart", "mma.sync: the lanes of a warp are at different instructions"),
        ("misaligned", "read of 8 bytes of global memory at an address not aligned to them"),
        ("racing", "of shared memory at offset"),
        ("trapping", "trap"),
    ],
)
def test_faults(kernels: ctypes.CDLL, name: str, message: str) -> None:
    said = launch(kernels, name, np.zeros(64, np.uint32), threads=64 if name == "racing" else 32)
    assert said is not None
    assert message in said
    if name == "trapping":
        assert "thread (3, 0, 0)" in said


def test_no_fault(kernels: ctypes.CDLL) -> None:
    out = np.zeros(64, np.uint32)
    assert launch(kernels, "ordered", out, threads=64) is None
    assert out.tolist() == [i ^ 32 for i in range(64)]
    assert launch(kernels, "in_local", out, threads=64) is None
    assert out.tolist() == list(range(64))


def test_blocks_wait_for_each_other(kernels: ctypes.CDLL) -> None:
    out = np.zeros(5, np.uint32)
    assert launch(kernels, "counting_release", out, threads=1, blocks=2) is None
    assert out.tolist() == [2, 7, 8, 8, 7]
    said = launch(kernels, "counting_relaxed", np.zeros(5, np.uint32), threads=1, blocks=2)
    assert said is not None
    assert "read of global memory races with a write" in said


def test_counts(kernels: ctypes.CDLL) -> None:
    kernels.seqkern_ptx_counts.restype = ctypes.c_char_p
    kernels.seqkern_ptx_count(1)
    try:
        memory = np.zeros(32 * 16, np.uint32)
        assert launch(kernels, "counted", memory, memory, threads=32) is None
        (counts,) = json.loads(kernels.seqkern_ptx_counts())
    finally:
        kernels.seqkern_ptx_count(0)
    assert (counts["kernel"], counts["launches"]) == ("counted", 1)
    assert counts["blocks"] == [32, 96, 32]  # by threads: before the loop, in it, after it
    assert (counts["sectors_read"], counts["sectors_written"]) == (32, 0)
    shared, read = sorted(counts["sites"], key=lambda s: -s["shared"])
    assert (shared["write"], shared["warps"], shared["lanes"]) == (1, 3, 96)
    assert (shared["passes"], shared["least"]) == (3 * 32, 3)
    assert (read["write"], read["passes"], read["least"]) == (0, 3 * 32, 3 * 4)


def unknown(folder: Path, text: str) -> Path:
    path = folder / "unknown.ptx"
    kernel = f".entry unknown() {{\n.reg .b32 %r<9>; .reg .b64 %rd<9>;\n{text}\nret;\n}}\n"
    path.write_text(HEAD + kernel)
    return path


MMA = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r1}, {%r1}, {%r1};"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MMA, "cannot translate mma"),
        ("mov.u32 %r1, %smid;", "cannot translate register %smid"),
        ("mov.u64 %rd1, elsewhere;", "cannot translate operand elsewhere"),
    ],
)
def test_the_translator_refuses_what_it_does_not_know(
    tmp_path: Path, text: str, message: str
) -> None:
    made = translate(unknown(tmp_path, text))
    assert made.returncode == 2
    assert message in made.stderr


def test_the_compiler_refuses_what_has_no_meaning(tmp_path: Path) -> None:
    assert translate(unknown(tmp_path, "vabsdiff.u32 %r1, 1, 2;")).returncode == 0
    compiled = compile_kernels("-fsyntax-only", tmp_path / "unknown.1.cpp")
    assert compiled.returncode != 0
    assert "vabsdiff" in compiled.stderr
