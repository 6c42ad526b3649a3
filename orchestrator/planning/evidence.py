"""Memory as data: what trials have taken here, and what follows for those that have not run yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.hardware import GIB
from orchestrator.results.records import TrialResult, TrialStatus

KIND = ("precision", "engine", "zero_stage", "offload", "attention", "gradient_checkpointing", "optimizer")
"""Within one value of all these, an estimate that is larger is a need that is larger."""
ENOUGH = 2
"""So many trials of a kind must have been measured before their ratio refuses another."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One trial that ran: what it took, or that it needs more than there is."""

    trial_id: str
    kind: tuple[object, ...]
    predicted_bytes: int
    measured_bytes: int | None
    """None: it ran out, a censored observation."""


def observe(
    record: TrialResult, predicted_bytes: Callable[[TrialConfig], int], available_bytes: int
) -> Observation | None:
    """What a trial tells where a worker may take `available_bytes`; None: nothing.

    `predicted_bytes` is what a worker's device must have: a GPU trial is measured by what torch allocated, and its
    need is scaled alike. One that ran out where there was less than now says nothing.
    """
    memory = record.peak_memory
    if memory is None:
        return None
    if record.status is TrialStatus.OUT_OF_MEMORY:
        if available_bytes > (memory.available_bytes or available_bytes):
            return None
        return Observation(record.trial_id, kind_of(record.config), predicted_bytes(record.config), None)
    ran = record.status in (TrialStatus.COMPLETED, TrialStatus.STOPPED)
    if not ran or not memory.measured_bytes or not memory.predicted_bytes:
        return None
    expected_bytes = predicted_bytes(record.config)
    measured_bytes = int(expected_bytes * memory.measured_bytes / memory.predicted_bytes)
    return Observation(record.trial_id, kind_of(record.config), expected_bytes, measured_bytes)


def kind_of(config: TrialConfig) -> tuple[object, ...]:
    """The settings that trials must share to be compared by their estimates."""
    return tuple(getattr(config, name) for name in KIND)


def refusal(config: TrialConfig, predicted_bytes: int, available_bytes: int, seen: Iterable[Observation]) -> str | None:
    """Why a trial must not be launched after what was seen; None: it may.

    Two kinds of evidence: a trial of its kind with an estimate no larger ran out; or every trial of its kind took so
    much more than its estimate that this one would not fit by any of them, neither by ratio nor by difference.
    """
    kind = kind_of(config)
    alike = [observation for observation in seen if observation.kind == kind]
    full = [o for o in alike if o.measured_bytes is None and o.predicted_bytes <= predicted_bytes]
    if full:
        least = min(full, key=lambda observation: observation.predicted_bytes)
        return (
            f"trial {least.trial_id} ran out of memory here, estimated at {least.predicted_bytes / GIB:.2f} GiB a "
            f"worker, and this one needs at least as much ({predicted_bytes / GIB:.2f} GiB): lower micro_batch_size or "
            "sequence_length, or set gradient_checkpointing: true"
        )
    measured = [(o.predicted_bytes, o.measured_bytes) for o in alike if o.measured_bytes is not None]

    def needed_bytes(estimated: int, took: int) -> float:
        return min(predicted_bytes * took / estimated, predicted_bytes + took - estimated)

    # In a sweep of thousands the first of them says so: this is asked before each launch.
    if len(measured) < ENOUGH or any(needed_bytes(*one) <= available_bytes for one in measured):
        return None
    least_bytes = min(needed_bytes(*one) for one in measured)
    ratios = sorted(took / estimated for estimated, took in measured)
    return (
        f"{len(measured)} trials of its kind took {ratios[0]:.2f} to {ratios[-1]:.2f} times their estimate here, by "
        f"which this one needs at least {least_bytes / GIB:.2f} GiB a worker and {available_bytes / GIB:.2f} GiB are "
        "there: lower micro_batch_size or sequence_length, or set gradient_checkpointing: true"
    )
