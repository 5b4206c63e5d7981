"""Numbers of a JSON schema that the grammar library would round, as it reads more than 15 digits only approximately.

A bound is moved inwards to one that it reads exactly, so that what comes is still valid; any other such number is
refused.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

DIGITS = 15
MOST = 2**53
SMALLEST = Decimal("1e-22")  # beyond 10**22, powers of ten are no exact floats
BOUNDS: Mapping[str, str] = {
    "minimum": ROUND_CEILING, "exclusiveMinimum": ROUND_CEILING, "maximum": ROUND_FLOOR,
    "exclusiveMaximum": ROUND_FLOOR,
}  # fmt: skip


def make_exact(schema: dict[str, Any]) -> None:
    """Change the bounds of one schema in place, not those within it. Raises ValueError for what cannot be exact."""
    for name, rounding in BOUNDS.items():
        value = schema.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not _is_exact(value):
            schema[name] = _inwards(name, value, rounding)
    for name in ("const", "enum", "multipleOf"):
        odd = _first_odd(schema.get(name))
        if odd is not None:
            raise ValueError(f"{name} has the number {odd!r:.40}, which would be rounded: give {DIGITS} digits at most")


def _is_exact(number: float) -> bool:
    if isinstance(number, int):
        return abs(number) <= MOST
    if not math.isfinite(number):
        return True  # it is no number in JSON, so the library refuses it
    _, figures, exponent = Decimal(repr(number)).as_tuple()  # as it is written
    return len(figures) <= DIGITS and isinstance(exponent, int) and abs(exponent) <= 22


def _inwards(name: str, value: float, rounding: str) -> float:
    up = rounding == ROUND_CEILING
    if (value > MOST) if up else (value < -MOST):
        raise ValueError(f"{name} {value!r:.40} is beyond {MOST}, which is as far as numbers can be followed")
    if abs(value) > MOST:
        return -MOST if up else MOST
    if value == int(value):
        return int(value)
    exact = decimal.Context(prec=DIGITS, rounding=rounding).create_decimal(Decimal(repr(value)))
    if exact.adjusted() < -7 and exact.as_tuple().exponent < SMALLEST.as_tuple().exponent:  # type: ignore[operator]
        exact = exact.quantize(SMALLEST, rounding)
    return float(exact)


def _first_odd(value: Any) -> float | None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return next((odd for odd in map(_first_odd, value) if odd is not None), None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and not _is_exact(value) else None
