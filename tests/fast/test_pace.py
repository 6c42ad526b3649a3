"""What measured speed says of trials to come."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.hardware import Hardware, is_named, named_gpu
from orchestrator.planning.pace import Pace, left_s
from orchestrator.planning.step_time import UNMEASURED
from orchestrator.results.records import StartedFrom, Suggestion, TrialResult, TrialStatus
from orchestrator.results.storage import newest_sweeps
from tests.fast.cases import CPU
from tests.made_up_sweep import made_up_sweep, made_up_trial, write_made_up

A10G = named_gpu("A10G", 1)


def ran(settings: dict[str, Any], took_s: float, predicted_s: float = 1.0) -> TrialResult:
    trial = made_up_trial(settings, step_time_s=took_s)
    return trial.model_copy(update={"predicted_step_time_s": predicted_s})


def pace_of(*trials: TrialResult, hardware: Hardware = A10G, model: str = "made-up") -> Pace:
    return Pace.of([made_up_sweep(list(trials))], model, hardware)


def test_a_kind_that_was_measured_is_corrected_by_its_own_median() -> None:
    pace = pace_of(
        *(ran({"rank": 8 + i}, ratio) for i, ratio in enumerate((1.4, 1.5, 9.0))), ran({"precision": "nf4"}, 5)
    )
    correction = pace.correction(TrialConfig(rank=64))
    assert correction.expected == pytest.approx(1.5)
    assert correction.low < 1.4 < 1.6 < correction.high
    assert pace.correction(TrialConfig(precision="nf4")).expected == pytest.approx(5)


def test_another_kind_is_corrected_by_all_and_less_surely() -> None:
    pace = pace_of(ran({}, 2.0))
    alike, other = pace.correction(TrialConfig()), pace.correction(TrialConfig(precision="nf4"))
    assert other.expected == alike.expected == pytest.approx(2.0)
    assert other.low < alike.low
    assert alike.high < other.high < UNMEASURED.high * 2.0


def test_a_whole_gpu_is_another_kind_than_one_that_trials_share() -> None:
    shared = ran({}, 3.0).model_copy(update={"gpu_shared_by": 4})
    pace = pace_of(shared, ran({"rank": 16}, 1.5))
    assert pace.correction(TrialConfig()).expected == pytest.approx(1.5)
    assert pace.correction(TrialConfig(), gpu_shared_by=2).expected == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("took_s", "predicted_s"), [(5e-324, 1.0), (1e9, 5e-324), (0.0, 1.0), (1.0, -1.0), (1.0, math.inf), (1e9, 1e-30)]
)
def test_a_step_that_no_device_takes_says_nothing(took_s: float, predicted_s: float) -> None:
    assert pace_of(ran({}, took_s, predicted_s)).correction(TrialConfig()) == UNMEASURED


def test_what_ran_on_another_device_says_nothing() -> None:
    assert pace_of(ran({}, 2.0), hardware=CPU).correction(TrialConfig()) == UNMEASURED
    assert pace_of(ran({}, 2.0), hardware=named_gpu("A100", 1)).correction(TrialConfig()) == UNMEASURED


def test_what_is_no_step_is_learnt_of_the_same_model_only_and_goes_by_how_often_a_trial_evaluates() -> None:
    trial = ran({"max_steps": 100, "eval_every": 30}, 0.5)
    timing = trial.timing.model_copy(
        update={"evaluation_s": 30.0, "saving_s": 10.0, "total_s": trial.timing.total_s + 40}
    )
    trial = trial.model_copy(update={"timing": timing})
    own = pace_of(trial, model=made_up_sweep([trial]).model)
    besides_s = timing.total_s - timing.startup_s - timing.training_s
    assert own.once_s.low == own.once_s.high == pytest.approx(besides_s - 40.0)
    # Steps 30, 60, 90 and 100.
    assert own.evaluation_s == pytest.approx(10.0)
    assert own.evaluations_s(TrialConfig(max_steps=100, eval_every=10)) == pytest.approx(100.0)
    assert pace_of(trial, model="another").evaluations_s(trial.config) == 0.0


def test_a_member_of_a_population_made_the_evaluations_since_its_parents_checkpoint_only() -> None:
    trial = ran({"max_steps": 100, "eval_every": 20}, 0.5)
    timing = trial.timing.model_copy(update={"evaluation_s": 15.0, "saving_s": 5.0})
    last = {"timing": timing, "started_from": StartedFrom(trial_id="parent-0", step=60)}
    # Steps 80 and 100.
    assert pace_of(trial.model_copy(update=last), model="builtin:tiny-llama").evaluation_s == pytest.approx(10.0)


def test_a_trial_that_failed_or_has_no_prediction_is_left_out() -> None:
    unpredicted = made_up_trial({"rank": 4})
    failed = ran({"rank": 8}, 3.0).model_copy(update={"status": TrialStatus.FAILED, "reason": "boom"})
    assert pace_of(unpredicted, failed).steps == ()


@pytest.mark.parametrize(
    ("device", "gpu", "same"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100", True),
        ("NVIDIA A100-PCIE-40GB", "A100", False),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB", False),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB", True),
        ("NVIDIA H100 80GB HBM3", "H100", True),
        ("NVIDIA GeForce RTX 4090", "RTX-4090", True),
        ("NVIDIA GeForce RTX 5090", "RTX-4090", False),
        ("NVIDIA L40", "L4", False),
    ],
)
def test_a_drivers_name_is_told_from_others_like_it(device: str, gpu: str, same: bool) -> None:
    assert is_named(device, named_gpu(gpu, 1)) is same


def test_sweeps_that_are_kept_in_a_storage_are_found_newest_first(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_made_up(tmp_path / name, made_up_sweep([ran({}, 1.0)]).model_copy(update={"name": name}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{", encoding="utf-8")
    assert {sweep.name for sweep in newest_sweeps(tmp_path, 3)} == {"a", "b"}
    assert len(list(newest_sweeps(tmp_path, 1))) <= 1
    assert list(newest_sweeps(tmp_path / "nowhere", 3)) == []


def test_what_is_left_is_told_by_trials_of_the_same_kind() -> None:
    slow, fast = {"precision": "nf4"}, {"precision": "fp32"}
    trials = [
        made_up_trial({**slow, "rank": 1}),
        made_up_trial({**slow, "rank": 2}, status=TrialStatus.PENDING),
        made_up_trial({**fast, "rank": 1}),
        made_up_trial({**fast, "rank": 2}, status=TrialStatus.RUNNING),
    ]
    planned = dict(zip((trial.trial_id for trial in trials), (20.0, 20.0, 80.0, 80.0), strict=True))
    gone = {trials[3].trial_id: 30.0}
    # Both took 80 s, four times what was planned of the one, and as planned of the other.
    assert left_s(trials, planned, gone, slots=1) == pytest.approx(80 + 50)
    assert left_s(trials, planned, gone, slots=2) == pytest.approx(80)
    assert left_s([trials[0]], planned, {}, slots=1) is None


def proposed(rank: int, status: TrialStatus) -> TrialResult:
    suggestion = Suggestion(number=rank, settings={"rank": rank})
    return made_up_trial({"rank": rank}, status=status).model_copy(update={"suggestion": suggestion})


def test_what_a_search_has_not_proposed_yet_takes_what_its_trials_took() -> None:
    examples = {f"example-{place}": 40.0 for place in range(60)}
    ended, running = proposed(1, TrialStatus.COMPLETED), proposed(2, TrialStatus.RUNNING)
    refused = proposed(3, TrialStatus.INFEASIBLE)
    trials = [ended, running, refused]
    # It took 80 s: so do 58 more, and the one at work 30 s less.
    assert left_s(trials, examples, {running.trial_id: 30.0}, 1, launches=60) == pytest.approx(58 * 80 + 50)
    assert left_s(trials, examples, {running.trial_id: 30.0}, 1, launches=2) == pytest.approx(50)
    assert left_s([ended], examples, {}, 4, launches=60) == pytest.approx(59 * 80 / 4)


def test_until_a_trial_of_a_search_has_ended_nobody_knows_what_is_left() -> None:
    assert left_s([proposed(1, TrialStatus.RUNNING)], {"example": 40.0}, {}, 1, launches=60) is None


def test_no_more_of_a_population_run_at_a_time_than_it_has_members() -> None:
    members = {f"member-{place}": 40.0 for place in range(4)}
    trials = [proposed(rank, TrialStatus.COMPLETED) for rank in range(1, 5)]
    assert left_s(trials, members, {}, slots=16, launches=12) == pytest.approx(2 * 80)
