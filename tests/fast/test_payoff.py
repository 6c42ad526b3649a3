"""A search that ends when more will not pay, and rules that count money. No Ray, no training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from orchestrator.config.axes import axes_of
from orchestrator.config.search_space import Space, Trial, domains
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.sweep_file import load
from orchestrator.errors import InputError, SweepFileError
from orchestrator.planning.planned_trial import PlannedTrial
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import Timing, TrialResult, TrialStatus
from orchestrator.search.observation import Observation, Standing
from orchestrator.search.payoff import expected_gain
from orchestrator.search.suggest import MIN_KNOWN
from tests.fast.cases import A100, CPU, new_record, planned
from tests.fast.test_plan import plan
from tests.fast.test_suggest import point

pytest.importorskip("ray")

from orchestrator.sweep.scheduler import RuleScheduler
from orchestrator.sweep.suggestions import Suggestions
from orchestrator.sweep.worker import GroupShape
from tests.fast.test_scheduler import told

SPACE = {"learning_rate": {"log_uniform": [1e-5, 1e-1]}}
AXES = axes_of(domains(Space.model_validate(SPACE)))
SWEEP: dict[str, Any] = {
    "name": "a",
    "model": "builtin:tiny-llama",
    "data": {"train": "builtin:python-docs"},
    "space": SPACE,
    "search": {"algorithm": "tpe"},
    "budget": {"trials": 40, "gpu_hours": 100, "price_per_gpu_hour": 2},
}


def loss_at(place: float) -> float:
    """Best at a rate of 1e-3."""
    return 2 + (place + 3) ** 2


def observed(*places: float) -> list[Observation]:
    return [
        Observation(n, {"learning_rate": 10**place}, Standing.WHOLE, (((20, loss_at(place)),),))
        for n, place in enumerate(places)
    ]


def test_little_is_expected_once_the_best_is_found_and_much_while_all_lie_on_one_side() -> None:
    far = expected_gain(AXES, observed(-5, -4.9, -4.8, -4.6, -4.5, -4.4), 0)
    found = expected_gain(AXES, observed(-5, -4, -3.5, -3.2, -3.01, -2.8, -2.5, -2, -1.2), 0)
    assert far is not None
    assert found is not None
    assert far > 0.05
    assert found < 0.005


def test_what_breaks_a_constraint_is_no_result_to_be_bettered() -> None:
    found = observed(-5, -4, -3.5, -3.2, -3.01, -2.8, -2.5, -2, -1.2)
    broken = [replace(one, constraints=(("tokens_per_s >= 9", 1.0),)) for one in found]
    assert expected_gain(AXES, broken, 0) is None, "nothing keeps the constraint: the search goes on"
    # The one that keeps it is far from what could be had.
    gain = expected_gain(AXES, [*broken[1:], found[0]], 0)
    assert gain is not None
    assert gain > 0.5


def test_of_few_configurations_nothing_is_expected() -> None:
    assert expected_gain(AXES, [], 0) is None
    assert expected_gain(AXES, observed(-5, -4), 0) is None


class Search:
    """The real suggestions over made-up trials of half an hour on one GPU."""

    def __init__(self, folder: Path, records: list[TrialResult] | None = None, **search: Any) -> None:
        self.sweep = SweepConfig.model_validate({**SWEEP, "search": {**SWEEP["search"], **search}})
        self.folder, self.records = SweepFolder(folder), {record.trial_id: record for record in records or []}
        shape = GroupShape(workers=1, gpus_per_worker=1.0, cpus_per_worker=1.0)
        prepared: Any = SimpleNamespace(sweep=self.sweep, plan_trial=self.plan_trial, shape=shape, data_hash="")
        recorder: Any = SimpleNamespace(records=self.records, save=self.save, trial_seconds=self.seconds, started_at=0)
        self.suggestions = Suggestions(prepared, self.folder, recorder, new_record)

    def seconds(self) -> float:
        return sum(record.timing.total_s for record in self.records.values())

    def plan_trial(self, trial: Trial) -> PlannedTrial:
        return planned(trial)

    def save(self, record: TrialResult) -> None:
        self.records[record.trial_id] = record

    def run(self, most: int = 40) -> int:
        for _ in range(most):
            for trial_id in (waiting := self.suggestions.more()):
                record = self.records[trial_id]
                last = point(20, loss_at(math.log10(record.config.learning_rate)))
                metrics = self.folder.trial(trial_id).metrics
                metrics.parent.mkdir(parents=True, exist_ok=True)
                metrics.write_text(last.model_dump_json() + "\n")
                ended = {"status": TrialStatus.COMPLETED, "timing": Timing(total_s=1800), "best": last}
                self.save(record.model_copy(update=ended))
            if not waiting:
                break
        return len(self.records)


def test_it_ends_when_more_will_not_pay_and_says_what_is_left(tmp_path: Path) -> None:
    search = Search(tmp_path, min_gain_per_hour=0.01)
    tried = search.run()
    assert MIN_KNOWN <= tried < 40
    why = search.suggestions.ended_because or ""
    assert "another configuration is expected to better eval_loss by" in why
    assert "less than search.min_gain_per_hour (0.01) asks for" in why
    assert f"not used: {40 - tried} of budget.trials 40, {100 - tried / 2:.3g} of budget.gpu_hours 100" in why


def test_after_an_interruption_it_ends_at_the_same_trial(tmp_path: Path) -> None:
    tried = Search(tmp_path / "whole", min_gain_per_hour=0.01).run()
    cut = Search(tmp_path / "cut", min_gain_per_hour=0.01)
    cut.run(most=4)
    again = Search(tmp_path / "cut", list(cut.records.values()), min_gain_per_hour=0.01)
    assert again.run() == tried


def test_money_is_asked_for_by_its_own_key(tmp_path: Path) -> None:
    # Half an hour costs 1: a gain per hour is half of one per money here.
    by_money = Search(tmp_path / "money", min_gain_per_cost=0.005).run()
    assert by_money == Search(tmp_path / "hours", min_gain_per_hour=0.01).run()


def test_unasked_it_goes_on_to_its_budget(tmp_path: Path) -> None:
    search = Search(tmp_path)
    assert search.run(most=25) == 25
    assert search.suggestions.ended_because is None


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"scheduler": {"asha": {"grace_cost": 1}}, "budget": {"trials": 9}},
            "name budget.price_per_gpu_hour, or use grace",
        ),
        ({"scheduler": {"asha": {"grace_cost": 1, "grace_steps": 1}}}, "needs one of grace_steps"),
        ({"search": {"algorithm": "tpe", "min_gain_per_cost": 1}, "budget": {"trials": 9}}, "or use min_gain_per_hour"),
        ({"search": {"algorithm": "random", "min_gain_per_hour": 1}}, "random does not: use tpe, gp or cma_es"),
        (
            {
                "search": {"algorithm": "gp", "min_gain_per_hour": 1},
                "objective": [{"metric": "eval_loss"}, {"metric": "tokens_per_s"}],
                "budget": {"trials": 9},
            },
            "judges the first objective alone, and the front of all may still grow: leave it out, or name one",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_counted_is_refused_with_the_mend(tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(SWEEP | keys))
    with pytest.raises(SweepFileError) as caught:
        load(file)
    assert told in str(caught.value)


def test_grace_in_money_is_seconds_of_all_a_trials_gpus_at_their_price() -> None:
    keys = {"scheduler": {"asha": {"grace_cost": 0.01, "reduction_factor": 2}}, "budget": {"price_per_gpu_hour": 1.8}}
    # 4 GPUs at 1.8 an hour cost 0.002 a second: the grace is 5 s, and step n is reached after n seconds.
    scheduler = RuleScheduler(SweepConfig.model_validate({**SWEEP, **keys}), gpus=4)
    assert told(scheduler, 0, 4, 1.0) == told(scheduler, 1, 4, 2.0) == "CONTINUE"
    assert told(scheduler, 0, 5, 1.0) == "CONTINUE"
    assert told(scheduler, 1, 5, 2.0) == "STOP"
    assert scheduler.reasons["1"].endswith("1 of 2 configurations were better at 0.01 cost")


def test_the_plan_counts_grace_in_money_and_refuses_it_where_nothing_is_paid_for() -> None:
    keys: dict[str, Any] = {"space": {"rank": [8, 16, 32]}, "budget": {"price_per_gpu_hour": 2.0}}
    cheap, dear = (plan(A100, **keys, scheduler={"asha": {"grace_cost": cost}}) for cost in (1e-4, 1e4))
    assert cheap.gpu_hours[1] < dear.gpu_hours[1]
    with pytest.raises(InputError, match="use grace_seconds"):
        plan(CPU, **keys, scheduler={"asha": {"grace_cost": 1}})
    priced: dict[str, Any] = {"objective": [{"metric": "eval_loss"}, {"metric": "cost"}]}
    assert plan(A100, **keys, **priced).runs == 3
    for asked in (priced, {"constraints": ["cost <= 3"]}):
        with pytest.raises(InputError, match=r"cost.* counts GPU-hours, and no trial holds a GPU here"):
            plan(CPU, **keys, **asked)
