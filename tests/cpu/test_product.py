"""Matrix products, per instruction set (programs built by `make emulator`)."""

from __future__ import annotations

import pytest
from cpu_programs import ISAS, run_program

#: In multiples of 2^-24 of the sum of the products' magnitudes. A sum of K roundings may be off by
#: K of them, and those of K = 257 random numbers by far less; one in tiles is no worse.
WORST = 8.0


@pytest.mark.parametrize("isa", ISAS)
def test_products(isa: str) -> None:
    worst = run_program("product", isa)
    names = {"float", "half", "bf16"}
    if isa in ("avx512_bf16", "amx", "tiles"):
        names |= {"bf16_tiles"}
    if isa in ("amx", "tiles"):
        names |= {"half_tiles"}
    assert worst.keys() == names | {f"{name}_infinity_wrong" for name in names}
    assert {n: v for n, v in worst.items() if v > (WORST if n in names else 0)} == {}


@pytest.mark.parametrize("isa", ISAS)
def test_panel_products(isa: str) -> None:
    """Of floats, or of bf16 numbers, at the edges of panels and with any strides."""
    worst = run_program("panel_product", isa)
    assert worst["error"] <= WORST
    assert worst["beside"] == 0


@pytest.mark.parametrize("isa", ["amx", "tiles"])
def test_linear_steps(isa: str) -> None:
    """Of bf16 weights in the matrix unit, at the edges of tiles."""
    worst = run_program("linear_step", isa)
    assert worst["error"] <= WORST
    assert worst["together"] == worst["infinite"] == 0
