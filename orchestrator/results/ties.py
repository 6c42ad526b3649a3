"""When two objectives are the same but for rounding: one rule for schedulers and for reports."""

from __future__ import annotations

SAME_OBJECTIVE = 1e-4
"""ZeRO stages at one seed differ in the last bits alone, every time in the same direction: significant, and nothing."""


def as_good_as(value: float) -> float:
    """The highest objective that is still as good as this one, where lower is better."""
    return value + SAME_OBJECTIVE * abs(value)
