"""Quantities as a person reads them: inside the project they are bytes, seconds and plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator.errors import apart

UNKNOWN = "–"
MINUS = "\u2212"
NOTHING = 5e-7
"""What six decimals do not show."""


def memory(size_bytes: float | None, bounds_bytes: Sequence[float] = ()) -> str:
    """`1.24 GiB`, or `812 MiB` below one GiB; with more digits where it would read like a bound that it is not at."""
    if size_bytes is None:
        return UNKNOWN
    if size_bytes >= 2**30:
        return f"{apart(size_bytes, bounds_bytes, 2**30, 2)} GiB"
    return f"{apart(size_bytes, bounds_bytes, 2**20, 0)} MiB"


def duration(seconds: float | None) -> str:
    """`0.8 s`, `42 s`, `3 min 20 s`, `1 h 04 min`, `2 d 07 h`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02} h"


def step_time(seconds: float | None) -> str:
    """Seconds a step: `84 ms`, `1.32 s`, `1234 s`."""
    if seconds is None:
        return UNKNOWN
    # From here on three digits round to 1,000, which would have an exponent.
    if seconds >= 999.5:
        return f"{seconds:.0f} s"
    return f"{seconds * 1000:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def rate(tokens_per_s: float | None) -> str:
    """Tokens a second: `8.4`, `1 312`, with thin spaces."""
    if tokens_per_s is None:
        return UNKNOWN
    return f"{tokens_per_s:,.0f}".replace(",", "\u202f") if tokens_per_s >= 100 else f"{tokens_per_s:.3g}"


def number(value: float | None) -> str:
    """Four significant digits, whole above 10,000; `0` for what six decimals do not show."""
    if value is None:
        return UNKNOWN
    if abs(value) < NOTHING:
        return "0"
    # From 9,999.5 on four digits round to 10,000, which would have an exponent; a whole number needs no point.
    told = f"{value:.0f}" if abs(value) >= 9_999.5 else f"{value:#.4g}".removesuffix(".")
    return told.replace("-", MINUS)


def plus_minus(mean: float, half_width: float | None) -> str:
    """`2.413 ± 0.012`: two significant digits of the half-width decide how many the mean gets."""
    if half_width is None or not math.isfinite(half_width):
        return number(mean)
    if max(abs(mean), half_width) < NOTHING:
        return "0"
    decimals = decimals_for(half_width)
    # Of a mean that rounds to nothing no sign is left.
    shown = round(mean, decimals) + 0.0
    return f"{shown:.{decimals}f} ± {half_width:.{decimals}f}".replace("-", MINUS)


def decimals_for(half_width: float) -> int:
    """Decimals that show two significant digits of a half-width, between 0 and 6."""
    # Losses that are equal to the last bit but a few would otherwise read 0.000000 ± 0.000000.
    if half_width < NOTHING:
        return 4
    return min(6, max(0, 1 - math.floor(math.log10(half_width))))


def ratio(mean: float, half_width: float | None) -> str:
    """`1.40 ± 0.05 ×`."""
    return f"{mean:.2f} ×" if half_width is None else f"{mean:.2f} ± {half_width:.2f} ×"


def outlay(value: float | None, unit: str) -> str:
    """What a plan or a sweep came to, in `s`, `gpu_hours`, `trials`, `cost` or as a `ratio`."""
    if value is None:
        return UNKNOWN
    if unit == "s":
        return duration(value)
    return {"trials": f"{value:.0f}", "ratio": ratio(value, None), "cost": f"{value:.2f}"}.get(unit, f"{value:.2f} h")


def share(fraction: float | None) -> str:
    """`31 %`."""
    return UNKNOWN if fraction is None else f"{fraction * 100:.0f} %"


def some(labels: Sequence[str]) -> str:
    """The first five, and how many more there are: `rank=8, rank=16`."""
    return ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
