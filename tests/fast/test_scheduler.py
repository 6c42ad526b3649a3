"""Our rules as Ray Tune hears them, and their memory out of a sweep's folder. Imports ray, starts nothing."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

from orchestrator.config.sweep_config import SchedulerConfig, SweepConfig
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import MetricPoint, TrialStatus
from orchestrator.sweep.scheduler import RuleScheduler
from tests.fast.test_suggest import point, record

SWEEP = SweepConfig.model_validate(
    {
        "name": "a",
        "model": "builtin:tiny-llama",
        "data": {"train": "builtin:python-docs"},
        "scheduler": {"asha": {"grace_steps": 10, "reduction_factor": 2}},
    }
)


def told(scheduler: RuleScheduler, number: int, step: int, loss: float | None, **more: Any) -> str:
    """What Tune is answered to an evaluation with this loss."""
    return answer(scheduler, number, point(step, 1.0).model_copy(update={"eval_loss": loss}), **more)


def answer(scheduler: RuleScheduler, number: int, last: MetricPoint, **more: Any) -> str:
    """What Tune is answered to a point of trial `number`, of which the last step is 20."""
    config = record(number, {}, TrialStatus.RUNNING).config
    task = SimpleNamespace(trial_id=str(number), config=config)
    trial = SimpleNamespace(config={"task": task, "configuration_id": str(number)})
    return scheduler.on_trial_result(None, trial, {"progress": SimpleNamespace(last=last), **more})


def test_a_trial_that_a_rule_gives_up_is_stopped_with_the_rules_reason() -> None:
    scheduler = RuleScheduler(SWEEP)
    assert told(scheduler, 0, 10, 1.0) == "CONTINUE"
    assert told(scheduler, 1, 10, 2.0) == "STOP"
    assert scheduler.reasons == {
        "1": "stopped by asha (10 steps of grace) at step 10: 1 of 2 configurations were better at 10 steps"
    }


def test_a_trial_at_its_last_step_is_done_and_not_stopped() -> None:
    scheduler = RuleScheduler(SWEEP)
    told(scheduler, 0, 20, 1.0)
    assert told(scheduler, 1, 20, 2.0) == "CONTINUE"


def test_a_trial_at_its_last_step_has_ended_whatever_its_grace_is_counted_in() -> None:
    config = record(0, {}, TrialStatus.RUNNING).config
    for number in range(1, 1000):
        last = point(config.max_steps, 1.0).model_copy(update={"seconds": number / 7})
        heard = RuleScheduler(SWEEP)._heard("0", "0", config, last, "seconds")
        assert heard.at >= heard.end


def test_tune_forgets_trials_that_have_ended_and_left_their_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TuneController, "__init__", lambda self: None)
    tune: Any = TuneController()
    completed, failed, leaving, at_work = trials = [Trial("sweep", stub=True) for _ in range(4)]
    for trial, status in zip(trials, ("TERMINATED", "ERROR", "TERMINATED", "RUNNING"), strict=True):
        trial.set_status(status)
    tune._trials = list(trials)
    tune._stopped_trials, tune._failed_trials = {completed, leaving}, {failed}
    tune._trials_to_cache = set(trials)
    tune._trial_to_actor = {leaving: "a slot", at_work: "another"}
    RuleScheduler(SWEEP).on_trial_complete(tune, at_work, {})
    assert tune.get_trials() == [leaving, at_work]
    assert tune._trials_to_cache == {leaving, at_work}
    assert (tune._stopped_trials, tune._failed_trials) == ({leaving}, set())


def test_what_is_no_evaluation_is_not_judged() -> None:
    scheduler = RuleScheduler(SWEEP)
    told(scheduler, 0, 10, 1.0)
    assert told(scheduler, 1, 11, None) == "CONTINUE"
    assert told(scheduler, 1, 10, 2.0, done=True) == "CONTINUE"


@pytest.mark.parametrize("metric", ["tokens_per_s", "step_time_s", "grad_norm"])
@pytest.mark.parametrize("rule", ["asha", "hyperband", "median", "extrapolation"])
def test_a_trial_whose_objective_is_not_known_yet_goes_on_and_one_that_is_no_number_is_stopped(
    rule: str, metric: str
) -> None:
    """A speed is not known in the warm-up's steps, nor the norm of gradients that overflowed."""
    raw = {"objective": {"metric": metric}, "scheduler": {rule: {"grace_steps": 10}}}
    scheduler = RuleScheduler(SweepConfig.model_validate({**SWEEP.model_dump(exclude_unset=True), **raw}))
    unknown = point(2, 1.0).model_copy(update={metric: None})
    assert answer(scheduler, 0, unknown) == "CONTINUE"
    assert answer(scheduler, 0, unknown.model_copy(update={metric: math.nan})) == "STOP"


def test_a_new_scheduler_knows_what_the_curves_on_disk_say(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    ended = [record(number, {}, TrialStatus.COMPLETED) for number in range(2)]
    for one, loss in zip(ended, (1.0, 1.5), strict=True):
        metrics = folder.trial(one.trial_id).metrics
        metrics.parent.mkdir(parents=True)
        metrics.write_text("".join(point(step, loss).model_dump_json() + "\n" for step in (10, 20)))
    scheduler = RuleScheduler(SWEEP)
    scheduler.hear_again(folder, ended)
    assert told(scheduler, 2, 10, 2.0) == "STOP"
    assert told(scheduler, 3, 10, 0.5) == "CONTINUE"


@pytest.mark.parametrize("rule", ["asha", "hyperband"])
def test_a_repeat_follows_the_one_that_was_stopped_before_an_interruption_whatever_the_workers_clocks_say(
    rule: str, tmp_path: Path
) -> None:
    """Of two that evaluated in the same moment the later one was heard first, and so the other one was stopped."""
    sweep = SWEEP.model_copy(update={"scheduler": SchedulerConfig.model_validate({rule: {"grace_steps": 10}})})
    before, folder = RuleScheduler(sweep), SweepFolder(tmp_path)
    assert told(before, 0, 10, 1.0) == "CONTINUE"
    assert told(before, 1, 10, 2.0) == "STOP"
    records = []
    for number, status, loss, ms in ((0, "cancelled", 1.0, 2000), (1, "stopped", 2.0, 1000)):
        # The stopped one had trained on, and been evaluated, until its stop came.
        points = [point(step, loss).model_copy(update={"time_ms": ms + step}) for step in (10, 11)]
        update = {"status": TrialStatus(status), "reason": before.reasons.get(str(number), "a signal"), "steps": 11}
        records.append(record(number, {}, TrialStatus.RUNNING).model_copy(update=update))
        folder.trial(records[-1].trial_id).root.mkdir(parents=True)
        folder.trial(records[-1].trial_id).metrics.write_text("".join(p.model_dump_json() + "\n" for p in points))
    again = RuleScheduler(sweep)
    again.hear_again(folder, records)
    last = point(10, 3.0)
    reason = again._hear("1-again", records[1].configuration_id, records[1].config, last)
    assert reason == before.reasons["1"]
