"""What a configuration must keep to beside its objective, as a person writes it: `peak_memory_bytes <= 24GiB`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pydantic import ByteSize, TypeAdapter, ValidationError

from orchestrator.errors import cut

CONSTRAINED = ("eval_loss", "loss", "tokens_per_s", "step_time_s", "peak_memory_bytes", "cost")
"""The logged metrics that are positive and can be bounded."""
_FORM = re.compile(r"\s*(\w+)\s*(<=|>=)\s*(\S+)\s*")


@dataclass(frozen=True, slots=True)
class Constraint:
    """A bound of one metric."""

    metric: str
    is_upper: bool
    bound: float

    def excess(self, value: float) -> float:
        """The logarithm of value over bound, or of bound over value: above 0 where the constraint is broken."""
        if value <= 0:
            return -1.0 if self.is_upper else 1.0
        # Not of the quotient, which may be too small for a number.
        ratio = math.log(value) - math.log(self.bound)
        return ratio if self.is_upper else -ratio


def parse(text: str) -> Constraint:
    """Read one.

    Raises:
        ValueError: with the form that it should have.
    """
    found = _FORM.fullmatch(text)
    if not found or found[1] not in CONSTRAINED:
        raise ValueError(
            f"takes a metric ({', '.join(CONSTRAINED)}), <= or >=, and a number, as `peak_memory_bytes <= 24GiB`"
        )
    metric, sign, written = found.groups()
    try:
        bound = float(TypeAdapter(ByteSize).validate_python(written)) if metric.endswith("_bytes") else float(written)
    except (ValidationError, ValueError) as error:
        raise ValueError(f"{cut(written)} is no number: write it as 24GiB or 1000") from error
    if not 0 < bound < math.inf:
        raise ValueError(f"{cut(written)} can bound nothing: name a positive number")
    return Constraint(metric, sign == "<=", bound)
