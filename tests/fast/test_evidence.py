"""What was measured of memory, and which trials it refuses."""

from __future__ import annotations

import pytest

from orchestrator.config.trial_config import TrialConfig, halved_micro_batch
from orchestrator.planning import evidence
from orchestrator.planning.evidence import Observation, kind_of, observe, refusal
from orchestrator.results.records import PeakMemory, TrialStatus
from tests.made_up_sweep import made_up_trial

GIB = 2**30
CONFIG = TrialConfig(rank=64, micro_batch_size=4)


def seen(predicted_gib: float, measured_gib: float | None, config: TrialConfig = CONFIG) -> Observation:
    measured_bytes = None if measured_gib is None else int(measured_gib * GIB)
    return Observation("seen-0", kind_of(config), int(predicted_gib * GIB), measured_bytes)


def test_without_evidence_everything_may_run() -> None:
    assert refusal(CONFIG, 10 * GIB, 8 * GIB, []) is None


def test_what_needs_at_least_as_much_as_a_trial_that_ran_out_is_refused_with_that_trial() -> None:
    told = refusal(CONFIG, 6 * GIB, 8 * GIB, [seen(5, None)])
    assert told is not None
    assert "trial seen-0 ran out of memory here, estimated at 5.00 GiB" in told
    assert "lower micro_batch_size" in told


def test_what_needs_less_than_a_trial_that_ran_out_may_run() -> None:
    assert refusal(CONFIG, 4 * GIB, 8 * GIB, [seen(5, None)]) is None


def test_a_trial_of_another_kind_says_nothing() -> None:
    other = CONFIG.model_copy(update={"precision": "nf4"})
    assert refusal(CONFIG, 6 * GIB, 8 * GIB, [seen(5, None, other), seen(1, 4, other), seen(1, 4, other)]) is None


def test_what_all_of_its_kind_took_beyond_their_estimates_refuses_what_would_not_fit() -> None:
    told = refusal(CONFIG, 6 * GIB, 8 * GIB, [seen(4, 6.4), seen(5, 7.5)])
    assert told is not None
    assert "1.50 to 1.60 times their estimate" in told
    assert "at least 8.40 GiB" in told


def test_thousands_of_trials_that_fitted_are_looked_through_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked before each launch: what it works out for each of them took minutes of a sweep of thousands."""
    worked_out: list[TrialConfig] = []
    monkeypatch.setattr(evidence, "kind_of", lambda config: worked_out.append(config) or kind_of(config))
    assert refusal(CONFIG, 6 * GIB, 8 * GIB, [seen(5, 5)] * 1000) is None
    assert len(worked_out) == 1


def test_one_measurement_refuses_nothing() -> None:
    assert refusal(CONFIG, 6 * GIB, 8 * GIB, [seen(4, 6.4)]) is None


def test_a_constant_that_the_estimate_lacks_is_not_taken_for_a_ratio() -> None:
    # 1 GiB more than estimated, twice: by ratio the large trial would need 18 GiB, by difference 7.
    assert refusal(CONFIG, 6 * GIB, 8 * GIB, [seen(0.5, 1.5), seen(0.5, 1.5)]) is None


@pytest.mark.parametrize(
    ("status", "tells"),
    [
        (TrialStatus.COMPLETED, True),
        (TrialStatus.STOPPED, True),
        (TrialStatus.OUT_OF_MEMORY, True),
        (TrialStatus.FAILED, False),
        (TrialStatus.INFEASIBLE, False),
        (TrialStatus.PENDING, False),
    ],
)
def test_only_trials_that_ran_tell_of_memory(status: TrialStatus, tells: bool) -> None:
    record = made_up_trial({"rank": 8}, status=status, reason="because")
    memory = PeakMemory(predicted_bytes=2 * GIB, measured_bytes=3 * GIB, kind="cuda_allocated")
    found = observe(record.model_copy(update={"peak_memory": memory}), lambda _: 4 * GIB, 8 * GIB)
    assert (found is not None) is tells
    if found and status is not TrialStatus.OUT_OF_MEMORY:
        # Allocated was 1.5 times its estimate, so the device is scaled alike.
        assert found.measured_bytes == 6 * GIB


def test_what_ran_out_where_there_was_less_says_nothing_where_there_is_more() -> None:
    memory = PeakMemory(predicted_bytes=2 * GIB, available_bytes=2 * GIB, kind="resident")
    record = made_up_trial({"rank": 8}, status=TrialStatus.OUT_OF_MEMORY, reason="full")
    full = record.model_copy(update={"peak_memory": memory})
    assert observe(full, lambda _: 2 * GIB, 2 * GIB) is not None
    assert observe(full, lambda _: 2 * GIB, 24 * GIB) is None


def test_a_refused_trial_whose_micro_batch_was_never_chosen_is_not_asked_for_its_memory() -> None:
    def no_estimate(config: TrialConfig) -> int:
        raise AssertionError(config.micro_batch_size)

    record = made_up_trial({"rank": 8}, status=TrialStatus.INFEASIBLE, reason="no")
    assert observe(record, no_estimate, GIB) is None


@pytest.mark.parametrize(
    ("global_batch_size", "micro", "workers", "smaller"),
    [(16, 8, 1, 4), (16, 8, 2, 4), (12, 6, 1, 3), (12, 3, 1, 1), (18, 9, 1, 3), (4, 1, 1, None)],
)
def test_a_halved_micro_batch_still_divides_the_global_batch(
    global_batch_size: int, micro: int, workers: int, smaller: int | None
) -> None:
    config = TrialConfig(global_batch_size=global_batch_size, micro_batch_size=micro)
    halved = halved_micro_batch(config, workers)
    assert (halved.micro_batch_size if halved else None) == smaller
