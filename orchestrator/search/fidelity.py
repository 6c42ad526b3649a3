"""At which step configurations are compared that were trained differently far."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.search.observation import Observation, Standing


def common_step(known: Sequence[Observation], dimensions: int) -> int:
    """The highest step that enough configurations have reached for a model: two more than it has dimensions.

    Where so many never did, the highest that all have. Source: Falkner et al. 2018, BOHB: its model is that of the
    largest budget with enough observations.
    """
    reached = sorted((o.steps for o in known if o.standing in (Standing.WHOLE, Standing.PARTIAL)), reverse=True)
    return reached[min(len(reached), dimensions + 2) - 1]
