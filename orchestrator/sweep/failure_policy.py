"""What follows a failure: try again after a while, or end, and how. Reads no clock, file or cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.results.records import TrialStatus
from orchestrator.training.task import START_LIMIT_S

MAX_ATTEMPTS = {TrialStatus.PREEMPTED: 3, TrialStatus.FAILED: 2}
"""Of one trial that end so; of failures only those that may pass are tried again."""
FAILURES_ON_A_NODE = 2
"""So many attempts of a trial that failed on one node, and the next is made on another."""
LONGEST_PAUSE_S = 60.0
STOP_LIMIT_S = 10.0
"""So long a trial may take to end once it is told to."""
SILENCE_LIMIT_S = 600.0
SILENCES = 10.0
"""So many times the longest silence that was seen, and at least SILENCE_LIMIT_S, is a hang."""

UPLOAD_BYTES_PER_S = 10 * 10**6
"""So fast a file goes at least through MLflow's server to its store; the server answers once it is there."""
MOST_DOUBLINGS = 5


@dataclass(frozen=True, slots=True)
class Retry:
    """Start the trial again."""

    after_s: float
    why: str


def after_end(status: TrialStatus, reason: str | None, may_pass: bool, ended_so: int) -> Retry | None:
    """Whether an attempt that ended with this status is followed by another; None: it is the trial's end.

    ended_so: how many attempts of the trial have, this one included.

    A trial that ran out of memory, diverged or raised would do the same again: only what came from outside may pass.
    """
    limit = MAX_ATTEMPTS.get(status, 1)
    if ended_so >= limit or not (may_pass or status is TrialStatus.PREEMPTED):
        return None
    return Retry(pause_s(ended_so), f"started again ({ended_so} of {limit - 1}): {reason or status.value}")


def avoided_nodes(failed_on: Sequence[str]) -> frozenset[str]:
    """The nodes that a trial's next attempt keeps away from, by those that its attempts failed on.

    Of one trial, not of the sweep: two workers that fall together on a healthy node say nothing against it. A slot that
    moved stays away, so a node on which everything fails loses one slot after the other.
    """
    return frozenset(node for node, failures in Counter(failed_on).items() if failures >= FAILURES_ON_A_NODE)


def pause_s(failures: int) -> float:
    """How long to wait after so many failures in a row: 2, 4, 8 s and so on, a minute at most."""
    return float(min(LONGEST_PAUSE_S, 2.0 ** min(failures, 10)))


def silence_limit_s(longest_s: float | None) -> float:
    """After how long without a sign of life a trial hangs.

    longest_s: the longest time without one so far; None before the first step.
    """
    return START_LIMIT_S if longest_s is None else max(SILENCE_LIMIT_S, SILENCES * longest_s)


def upload_limit_s(answer_limit_s: float, size_bytes: int, late: int) -> float:
    """How long to wait for an answer to a file; `late` is how often there was none before."""
    return (answer_limit_s + size_bytes / UPLOAD_BYTES_PER_S) * 2.0 ** min(late, MOST_DOUBLINGS)


TrackingFailure = Literal["away", "gone", "refused"]


def tracking_failure(error_code: str | None) -> TrackingFailure:
    """What MLflow's error code means.

    away: the server does not answer, and is asked again. gone: the run was deleted, and another is made. refused: it
    will never take this, which is on disk all the same.
    """
    if error_code == "RESOURCE_DOES_NOT_EXIST":
        return "gone"
    refusals = (
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "INVALID_STATE",
        "RESOURCE_ALREADY_EXISTS",
        "NOT_IMPLEMENTED",
        "PERMISSION_DENIED",
    )
    return "refused" if error_code in refusals else "away"
