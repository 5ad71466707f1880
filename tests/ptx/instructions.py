"""Instructions of one thread, each with its meaning: tables for test_ptx.py."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NUMPY = {
    **{
        f"{k}{bits}": np.dtype(f"{n}{bits // 8}")
        for k, n in (("s", "i"), ("u", "u"))
        for bits in (16, 32, 64)
    },
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
}


def registers(kind: str) -> str:
    return {"16": "%rs", "32": "%r", "64": "%rd"}[kind[1:]]


INTEGERS = [0, 1, -1, 2, 3, 7, 31, 32, 33, 63, 64, 100, -128, 32767, 65535]
INTEGERS += [-(2**31), 2**31 - 1, 2**32 - 1, 2**62, -(2**63)]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 3.1, 1e-45, 1e-40, 3e9, -3e9, 1e30]
FLOATS += [np.inf, -np.inf, np.nan, 2.0**63, 65504.0, 1e-5]


def values(kind: str) -> Array:
    if kind[0] == "f":
        return np.array(FLOATS, np.float64).astype(NUMPY[kind])
    bits = int(kind[1:])
    unsigned = np.array([x % 2**bits for x in INTEGERS], np.uint64).astype(f"u{bits // 8}")
    return unsigned.view(NUMPY[kind])


def bits(x: int, kind: str) -> int:
    """As many of x as the type has, as a number of the type."""
    width = int(kind[1:])
    x %= 2**width
    return x - 2**width if kind[0] == "s" and x >= 2 ** (width - 1) else x


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def bfind_shiftamt(x: int) -> int:
    x = ~x if x < 0 else x
    return 32 - x.bit_length() if x else 2**32 - 1


def prmt(a: int, b: int, which: int) -> int:
    source = (a % 2**32).to_bytes(4, "little") + (b % 2**32).to_bytes(4, "little")
    out = []
    for i in range(4):
        selector = which >> 4 * i & 15
        byte = source[selector & 7]
        out.append((0xFF if byte & 0x80 else 0) if selector & 8 else byte)
    return int.from_bytes(bytes(out), "little")


# instruction, types of its operands and of its result, its meaning on Python's integers
INTEGER_CASES: list[tuple[str, str, str, Callable[..., int]]] = [
    *[(f"add.{t}", f"{t} {t}", t, lambda a, b: a + b) for t in ("s32", "s64", "u16")],
    *[(f"sub.{t}", f"{t} {t}", t, lambda a, b: a - b) for t in ("s32", "s64")],
    *[(f"mul.lo.{t}", f"{t} {t}", t, lambda a, b: a * b) for t in ("s32", "s64", "u16")],
    *[(f"mul.hi.{t}", f"{t} {t}", t, lambda a, b: a * b >> 32) for t in ("s32", "u32")],
    ("mul.hi.u64", "u64 u64", "u64", lambda a, b: a * b >> 64),
    ("mul.wide.s32", "s32 s32", "s64", lambda a, b: a * b),
    ("mul.wide.u32", "u32 u32", "u64", lambda a, b: a * b),
    ("mul.wide.u16", "u16 u16", "u32", lambda a, b: a * b),
    ("mad.lo.s32", "s32 s32 s32", "s32", lambda a, b, c: a * b + c),
    ("mad.wide.u32", "u32 u32 u64", "u64", lambda a, b, c: a * b + c),
    *[(f"div.{t}", f"{t} {t}", t, truncated) for t in ("s32", "u32", "s64")],
    *[(f"rem.{t}", f"{t} {t}", t, lambda a, b: a - b * truncated(a, b)) for t in ("s32", "u32")],
    *[(f"min.{t}", f"{t} {t}", t, min) for t in ("s32", "u32")],
    *[(f"max.{t}", f"{t} {t}", t, max) for t in ("s64", "u64")],
    ("shl.b32", "u32 u32", "u32", lambda a, b: a << b if b < 32 else 0),
    ("shl.b64", "u64 u32", "u64", lambda a, b: a << b if b < 64 else 0),
    ("shr.u32", "u32 u32", "u32", lambda a, b: a >> b),
    ("shr.s32", "s32 u32", "s32", lambda a, b: a >> b),
    ("shr.s64", "s64 u32", "s64", lambda a, b: a >> b),
    ("shf.l.wrap.b32", "u32 u32 u32", "u32", lambda a, b, c: (b << 32 | a) << c % 32 >> 32),
    ("shf.r.wrap.b32", "u32 u32 u32", "u32", lambda a, b, c: (b << 32 | a) >> c % 32),
    ("and.b32", "u32 u32", "u32", lambda a, b: a & b),
    ("or.b64", "u64 u64", "u64", lambda a, b: a | b),
    ("xor.b32", "u32 u32", "u32", lambda a, b: a ^ b),
    ("not.b32", "u32", "u32", lambda a: ~a),
    ("neg.s32", "s32", "s32", lambda a: -a),
    ("abs.s32", "s32", "s32", abs),
    ("popc.b32", "u32", "u32", lambda a: a.bit_count()),
    ("clz.b32", "u32", "u32", lambda a: 32 - a.bit_length()),
    ("brev.b32", "u32", "u32", lambda a: int(f"{a:032b}"[::-1], 2)),
    ("bfind.shiftamt.u32", "u32", "u32", bfind_shiftamt),
    ("bfind.shiftamt.s32", "s32", "u32", bfind_shiftamt),
    ("prmt.b32", "u32 u32 u32", "u32", prmt),
    ("cvt.s64.s32", "s32", "s64", lambda a: a),
    ("cvt.u64.u32", "u32", "u64", lambda a: a),
    ("cvt.u32.u64", "u64", "u32", lambda a: a),
    ("cvt.u16.u32", "u32", "u16", lambda a: a),
    ("cvt.s32.s8", "u32", "s32", lambda a: bits(a, "s8")),
]  # fmt: skip


def nearest(x: float, kind: str) -> int:
    """Of the integers of a type; NaN is 0."""
    if np.isnan(x):
        return 0
    least, most = np.iinfo(NUMPY[kind]).min, np.iinfo(NUMPY[kind]).max
    return int(least if x <= least else most if x >= most else x)


def f32(x: float) -> Any:
    return np.float32(x)


def smaller(a: Any, b: Any) -> Any:
    if np.isnan(a) or np.isnan(b):
        return b if np.isnan(a) else a
    return min(a, b, key=lambda x: (x, not np.signbit(x)))


def unordered(a: Any, b: Any) -> bool:
    return bool(np.isnan(a) or np.isnan(b))


def fused(a: Any, b: Any, c: Any, *, down: bool = False) -> Any:
    """a b + c, rounded once: to nearest, or down."""
    about = np.float64(a) * np.float64(b) + np.float64(c)
    y = np.float32(about)
    if not np.isfinite(y):
        return np.finfo(np.float32).max if down and np.isfinite(about) and about > 0 else about
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = [y, np.nextafter(y, f32(np.inf)), np.nextafter(y, f32(-np.inf))]
    if down:
        if exact == 0:  # of numbers that cancel, -0
            same = np.signbit(np.float64(a) * np.float64(b)) == np.signbit(c)
            return y if same else f32(-0.0)
        return max(x for x in near if Fraction(float(x)) <= exact)
    even = [int(x.view(np.uint32)) % 2 for x in near]
    distances = [abs(Fraction(float(x)) - exact) for x in near]
    return min(zip(distances, even, near, strict=True))[2]


def fused_down(a: Any, b: Any, c: Any) -> Any:
    return fused(a, b, c, down=True)


FLOAT_CASES: list[tuple[str, str, str, Callable[..., Any]]] = [
    *[(f"add.{t}", f"{t} {t}", t, lambda a, b: a + b) for t in ("f32", "f64")],
    ("add.rn.f32", "f32 f32", "f32", lambda a, b: a + b),
    ("sub.f32", "f32 f32", "f32", lambda a, b: a - b),
    ("mul.rn.f64", "f64 f64", "f64", lambda a, b: a * b),
    ("div.rn.f32", "f32 f32", "f32", lambda a, b: a / b),
    ("rcp.rn.f64", "f64", "f64", lambda a: 1 / a),
    ("sqrt.rn.f64", "f64", "f64", np.sqrt),
    ("fma.rn.f32", "f32 f32 f32", "f32", fused),
    ("fma.rm.f32", "f32 f32 f32", "f32", fused_down),
    ("neg.f32", "f32", "f32", lambda a: -a),
    ("abs.f64", "f64", "f64", abs),
    ("min.f32", "f32 f32", "f32", smaller),
    ("max.f64", "f64 f64", "f64", lambda a, b: -smaller(-a, -b)),
    ("max.NaN.f32", "f32 f32", "f32",
     lambda a, b: np.nan if unordered(a, b) else -smaller(-a, -b)),
    ("copysign.f32", "f32 f32", "f32", lambda sign, x: np.copysign(x, sign)),
    ("cvt.rni.s32.f32", "f32", "s32", lambda a: nearest(np.rint(a), "s32")),
    ("cvt.rni.u32.f32", "f32", "u32", lambda a: nearest(np.rint(a), "u32")),
    ("cvt.rni.s64.f32", "f32", "s64", lambda a: nearest(np.rint(a), "s64")),
    ("cvt.rzi.s32.f64", "f64", "s32", lambda a: nearest(np.trunc(a), "s32")),
    ("cvt.rzi.u64.f64", "f64", "u64", lambda a: nearest(np.trunc(a), "u64")),
    ("cvt.rmi.f32.f32", "f32", "f32", np.floor),
    ("cvt.rni.f32.f32", "f32", "f32", np.rint),
    ("cvt.sat.f32.f32", "f32", "f32", lambda a: 0 if np.isnan(a) else np.clip(a, 0, 1) + f32(0)),
    ("cvt.rn.f32.f64", "f64", "f32", lambda a: a),
    ("cvt.f64.f32", "f32", "f64", lambda a: a),
    ("cvt.rn.f32.s32", "s32", "f32", lambda a: a),
    ("cvt.rn.f64.u64", "u64", "f64", lambda a: a),
    ("cvt.rn.f16.f32", "f32", "u16", lambda a: np.float16(a).view(np.uint16)),
    # The first operand goes to the high half.
    ("cvt.rn.f16x2.f32", "f32 f32", "u32",
     lambda a, b: int(np.float16(a).view(np.uint16)) << 16 | int(np.float16(b).view(np.uint16))),
]  # fmt: skip

COMPARISONS: list[tuple[str, str, Callable[..., bool]]] = [
    ("eq", "f32", lambda a, b: a == b),
    ("ne", "f32", lambda a, b: not unordered(a, b) and a != b),
    ("neu", "f32", lambda a, b: a != b),
    ("lt", "f64", lambda a, b: a < b),
    ("geu", "f64", lambda a, b: not a < b),
    ("gtu", "f32", lambda a, b: not a <= b),
    ("num", "f32", lambda a, b: not unordered(a, b)),
    ("nan", "f64", unordered),
    ("lt", "s32", lambda a, b: a < b),
    ("lt", "u32", lambda a, b: a < b),
    ("ge", "s64", lambda a, b: a >= b),
    ("ne", "s16", lambda a, b: a != b),
]


def per_thread(
    name: str, instruction: str, operands: list[str], result: str, *, predicate: bool = False
) -> str:
    """A kernel: of each thread's operands at `%rd9` on, its result."""
    lines = [
        f".entry {name}(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 out) {{",
        ".reg .pred %p<4>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<99>;",
        "mov.u32 %r90, %tid.x;",
    ]  # fmt: skip
    names = []
    for i, kind in enumerate(operands):
        register = f"{registers(kind)}{i}"
        names.append(register)
        lines += [
            f"ld.param.u64 %rd{90 + i}, [{'abc'[i]}];",
            f"mul.wide.u32 %rd95, %r90, {int(kind[1:]) // 8};",
            f"add.s64 %rd96, %rd{90 + i}, %rd95;",
            f"ld.global.{kind} {register}, [%rd96];",
        ]
    into = f"{registers(result)}8"
    if predicate:
        lines += [f"{instruction} %p1, {', '.join(names)};", f"selp.u32 {into}, 1, 0, %p1;"]
    else:
        lines.append(f"{instruction} {into}, {', '.join(names)};")
    lines += [
        "ld.param.u64 %rd94, [out];",
        f"mul.wide.u32 %rd95, %r90, {int(result[1:]) // 8};",
        "add.s64 %rd96, %rd94, %rd95;",
        f"st.global.{result} [%rd96], {into};",
        "ret;",
        "\n}",
    ]
    return "\n".join(lines) + "\n"


def case_name(instruction: str) -> str:
    return "case_" + instruction.replace(".", "_")


APPROXIMATIONS = {
    "ex2.approx.ftz.f32": ["f32"],
    "lg2.approx.f32": ["f32"],
    "rcp.approx.ftz.f32": ["f32"],
    "div.approx.f32": ["f32", "f32"],
}


def all_kernels() -> str:
    """One per instruction."""
    text = ""
    for instruction, operands, result, _ in (*INTEGER_CASES, *FLOAT_CASES):
        text += per_thread(case_name(instruction), instruction, operands.split(), result)
    for comparison, kind, _ in COMPARISONS:
        name = f"setp.{comparison}.{kind}"
        text += per_thread(case_name(name), name, [kind, kind], "u32", predicate=True)
    for name, operands in APPROXIMATIONS.items():
        text += per_thread(case_name(name), name, operands, "f32")
    return text
