"""Every algorithm under every scheduler: one life with conditions, refusals, failures and an interruption. No Ray."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.config.search_space import Trial
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.planning.planned_trial import PlannedTrial
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import Timing, TrialResult, TrialStatus
from tests.fast.cases import new_record, planned
from tests.fast.test_suggest import point

pytest.importorskip("ray")

from orchestrator.sweep import launch as launches
from orchestrator.sweep.opening import opening_records, start_words
from orchestrator.sweep.resume import Earlier
from orchestrator.sweep.run import cut_short_words
from orchestrator.sweep.scheduler import RuleScheduler
from orchestrator.sweep.suggestions import Suggestions

SCHEDULERS: dict[str, dict[str, Any]] = {
    "fifo": {"fifo": {}},
    "asha": {"asha": {"grace_steps": 10}},
    "hyperband": {"hyperband": {"grace_tokens": 10 * 64, "brackets": 2}},
    "median": {"median": {"grace_seconds": 10}},
    "extrapolation": {"extrapolation": {"grace_steps": 50}},
}
SWEEP: dict[str, Any] = {
    "name": "a",
    "model": "builtin:tiny-llama",
    "data": {"train": "builtin:python-docs"},
    "trial": {"max_steps": 90, "eval_every": 10, "micro_batch_size": 4},
    "space": {
        "rank": [8, 32, 128],
        "zero_stage": [1, 2, 3],
        "lora_dropout": {"choice": [0.0, 0.1], "when": {"zero_stage": [2, 3]}},
        "learning_rate": {"log_uniform": [1e-5, 1e-2]},
    },
    "exclude": [{"rank": 32, "zero_stage": 1}],
    "budget": {"trials": 7},
}


class Life:
    """A sweep of one trial at a time, with the real search, rules and records; only training is made up."""

    def __init__(
        self,
        folder: Path,
        algorithm: str,
        scheduler: str,
        before: dict[str, TrialResult],
        repeats: int = 1,
        **keys: Any,
    ) -> None:
        raw = {**SWEEP, "search": {"algorithm": algorithm, "repeats": repeats}, "scheduler": SCHEDULERS[scheduler]}
        raw |= keys
        if algorithm == "grid" and not keys:
            raw["space"] = {**SWEEP["space"], "learning_rate": [1e-4, 3e-3, 1e-3]}
            raw["budget"] = {"trials": 42}
        self.sweep, self.folder = SweepConfig.model_validate(raw), SweepFolder(folder)
        plan = SimpleNamespace(trials=[self.plan_trial(trial) for trial in self.sweep.trials()], worker_memory_bytes=1)
        shape = SimpleNamespace(gpus=1, workers=1)
        prepared: Any = SimpleNamespace(
            sweep=self.sweep, plan_trial=self.plan_trial, plan=plan, data_hash="", shape=shape
        )
        earlier = Earlier(self.sweep, None, before) if before else None
        self.records = opening_records(prepared, self.folder, earlier, new_record)
        recorder: Any = SimpleNamespace(records=self.records, save=self.save, trial_seconds=lambda: 0, started_at=0)
        self.prepared, self.recorder = prepared, recorder
        self.suggestions = Suggestions(prepared, self.folder, recorder, new_record)
        self.scheduler = RuleScheduler(self.sweep)
        self.scheduler.hear_again(self.folder, self.records.values())

    def launch(self, *, is_stopped: bool = False) -> None:
        prepared: Any = SimpleNamespace(**vars(self.prepared), board=None, groups=None)
        stopper: Any = SimpleNamespace(stop_all=lambda: is_stopped)
        launches.launch(prepared, self.folder, self.recorder, self.suggestions, self.scheduler, [], stopper, "warm")

    def plan_trial(self, trial: Trial) -> PlannedTrial:
        reasons = ("too much",) if trial.config.rank == 128 and trial.config.zero_stage == 1 else ()
        return planned(trial, *reasons)

    def save(self, record: TrialResult) -> None:
        self.records[record.trial_id] = record

    def live(self, most: int = 10**9) -> None:
        waiting = [i for i, record in self.records.items() if record.status is TrialStatus.PENDING]
        while most and (waiting := waiting or list(self.suggestions.more())):
            self.train(self.records[waiting.pop(0)])
            most -= 1

    def train(self, record: TrialResult) -> None:
        config, status = record.config, TrialStatus.COMPLETED
        place = math.log10(config.learning_rate)
        if config.rank == 128:
            status = TrialStatus.OUT_OF_MEMORY
        elif place > -2.5:
            status = TrialStatus.DIVERGED
        elif int(record.configuration_id, 16) % 9 == 0:
            status = TrialStatus.FAILED
        last, lines = None, []
        task = SimpleNamespace(trial_id=record.trial_id, config=config)
        trial = SimpleNamespace(config={"task": task, "configuration_id": record.configuration_id})
        for step in range(10, 100, 10) if status is TrialStatus.COMPLETED else ():
            last = point(step, 1 + abs(place + 3) + 5 * step**-0.7 + 0.1 * (config.rank == 8))
            lines.append(last.model_copy(update={"time_ms": 1000 * len(self.records) + step}).model_dump_json())
            answer = self.scheduler.on_trial_result(None, trial, {"progress": SimpleNamespace(last=last)})
            if answer == "STOP":
                status = TrialStatus.STOPPED
                break
        metrics = self.folder.trial(record.trial_id).metrics
        metrics.parent.mkdir(parents=True, exist_ok=True)
        metrics.write_text("".join(line + "\n" for line in lines))
        reason = self.scheduler.reasons.get(record.trial_id, "told") if status.needs_reason else None
        ended = {"status": status, "reason": reason, "last": last, "best": last, "steps": last.step if last else 0}
        self.save(record.model_copy(update=ended))


def test_a_search_goes_on_with_what_a_grid_has_left_open_in_its_folder(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"space": {"rank": [8, 32], "zero_stage": [1, 2]}, "exclude": [], "budget": {"trials": 9}}
    grid = Life(tmp_path, "grid", "fifo", {}, repeats=2, **keys)
    grid.live(2)
    cut_off = {"status": TrialStatus.CANCELLED, "reason": "interrupted", "timing": Timing(total_s=60)}
    before = {i: r if r.status.is_final else r.model_copy(update=cut_off) for i, r in grid.records.items()}
    ended = {i: r for i, r in before.items() if r.status.is_final}
    assert len(ended) == 2
    search = Life(tmp_path, "tpe", "fifo", before, repeats=2, **keys)
    search.live()
    assert {i: r for i, r in search.records.items() if i in ended} == ended
    tried = [r for r in search.records.values() if r.suggestion]
    assert sorted((r.suggestion.number, r.repeat) for r in tried if r.suggestion) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(r.status.is_final for r in tried)
    assert {r.timing.earlier_s for r in tried} == {60}
    configurations = {r.configuration_id for r in before.values()}
    assert {r.configuration_id for r in (*tried, *ended.values())} == configurations


class TuneBegins(Exception):
    pass


@pytest.fixture
def without_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: Any, **__: Any) -> None:
        raise TuneBegins

    monkeypatch.setattr(launches.tune, "with_parameters", begin)


@pytest.mark.usefixtures("without_tune")
@pytest.mark.parametrize("space", [SWEEP["space"], {"rank": [8, 32]}], ids=["budget", "space"])
def test_a_search_that_has_nothing_more_to_try_ends_without_tune(space: dict[str, Any], tmp_path: Path) -> None:
    search = Life(tmp_path, "tpe", "fifo", {}, space=space, exclude=[])
    search.live(1)
    with pytest.raises(TuneBegins):
        search.launch()
    search.live()
    again = Life(tmp_path, "tpe", "fifo", search.records, space=space, exclude=[])
    again.launch()
    assert again.records == search.records


@pytest.mark.usefixtures("without_tune")
def test_a_search_whose_budget_is_used_up_proposes_nothing_before_it_ends(tmp_path: Path) -> None:
    search = Life(tmp_path, "tpe", "fifo", {})
    search.launch(is_stopped=True)
    assert search.records == {}


def ended_by(reason: str | None, *, interrupted: bool = False) -> Any:
    """A stopper that has stopped so."""
    return SimpleNamespace(reason=reason, interrupted=interrupted)


def test_a_search_that_its_budget_ended_says_how_it_goes_on_and_what_was_not_used(tmp_path: Path) -> None:
    life = Life(tmp_path, "tpe", "fifo", {})
    life.live(3)
    out = ended_by("budget.hours is used up: raise it")
    told = "budget.hours is used up: raise it; not used: 4 of budget.trials 7"
    assert cut_short_words(life.sweep, out, life.suggestions, cut_off=0) == told
    assert cut_short_words(life.sweep, ended_by("SIGINT", interrupted=True), life.suggestions, cut_off=1) is None
    assert cut_short_words(life.sweep, ended_by(None), life.suggestions, cut_off=0) is None
    life.live()
    assert cut_short_words(life.sweep, out, life.suggestions, cut_off=0) is None


def test_a_grid_that_its_budget_ended_says_so_where_it_cut_trials_off(tmp_path: Path) -> None:
    life, out = Life(tmp_path, "grid", "fifo", {}), ended_by("budget.cost is used up: raise it")
    assert cut_short_words(life.sweep, out, life.suggestions, cut_off=2) == "budget.cost is used up: raise it"
    assert cut_short_words(life.sweep, out, life.suggestions, cut_off=0) is None


def test_a_search_to_which_a_grid_left_nothing_says_so_and_why_the_rest_was_not_run(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"space": {"rank": [8, 32], "zero_stage": [2, 3]}, "exclude": [], "budget": {"trials": 4}}
    grid = Life(tmp_path, "grid", "fifo", {}, repeats=2, **keys)
    grid.live()
    running = {"status": TrialStatus.RUNNING, "reason": None}
    before = {i: r.model_copy(update=running) if r.repeat else r for i, r in grid.records.items()}
    search = Life(tmp_path, "tpe", "fifo", before, repeats=2, **keys)
    told = start_words(search.records.values(), search.folder, 2, search.sweep)
    assert told == (
        "up to 4 configurations to try, 2 at a time; 0 refused; 4 done before; 4 cut off before and not asked for now"
    )
    search.live()
    assert search.suggestions.ended_because == (
        "the search ended by itself: its space holds nothing that was not tried in this folder; "
        "not used: 4 of budget.trials 4"
    )
    assert {r.reason for r in search.records.values() if r.status is TrialStatus.CANCELLED} == {
        "cut off, and not proposed by the search"
    }


def test_a_search_keeps_of_each_curve_its_evaluations(tmp_path: Path) -> None:
    """It looks at all that have ended before each proposal: all steps of thousands would take the driver's memory."""
    life = Life(tmp_path, "tpe", "fifo", {})
    life.live(1)
    (record,) = life.records.values()
    with life.folder.trial(record.trial_id).metrics.open("a") as metrics:
        metrics.write(point(91, 1.0).model_copy(update={"eval_loss": None}).model_dump_json() + "\n")
    life.live(1)
    (kept,) = life.suggestions._ended_curves.values()
    assert [one.step for one in kept] == list(range(10, 100, 10))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("algorithm", ["grid", "random", "tpe", "gp", "cma_es"])
def test_a_sweep_keeps_its_budget_learns_from_every_end_and_goes_on_as_without_an_interruption(
    algorithm: str, scheduler: str, tmp_path: Path
) -> None:
    whole = Life(tmp_path / "whole", algorithm, scheduler, {})
    whole.live()
    records = whole.records.values()
    refused = [record for record in records if record.status is TrialStatus.INFEASIBLE]
    assert all(record.config.rank == 128 and record.config.zero_stage == 1 for record in refused)
    launched = len(whole.records) - len(refused)
    chosen_before = {"grid": 42, "random": 7}.get(algorithm)
    assert launched == (chosen_before - len(refused) if chosen_before else 7)
    assert not any(record.config.rank == 32 and record.config.zero_stage == 1 for record in records)
    assert all(record.config.lora_dropout == 0 for record in records if record.config.zero_stage == 1)
    stopped = [record for record in records if record.status is TrialStatus.STOPPED]
    assert all(f"stopped by {scheduler}" in (record.reason or "") for record in stopped)

    cut = Life(tmp_path / "cut", algorithm, scheduler, {})
    cut.live(most=4)
    read = {i: TrialResult.model_validate_json(r.model_dump_json()) for i, r in cut.records.items()}
    again = Life(tmp_path / "cut", algorithm, scheduler, read)
    again.live()
    assert {i: (r.status, r.suggestion, r.steps) for i, r in again.records.items()} == {
        i: (r.status, r.suggestion, r.steps) for i, r in whole.records.items()
    }


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_repeats_end_together_and_a_sweep_that_is_cut_between_two_goes_on_as_without_that(
    scheduler: str, tmp_path: Path
) -> None:
    whole = Life(tmp_path / "whole", "tpe", scheduler, {}, repeats=2)
    whole.live()
    ends: dict[str, set[tuple[TrialStatus, int]]] = {}
    for record in whole.records.values():
        ends.setdefault(record.configuration_id, set()).add((record.status, record.steps))
    assert {len(found) for found in ends.values()} == {1}
    cut = Life(tmp_path / "cut", "tpe", scheduler, {}, repeats=2)
    cut.live(most=5)
    read = {i: TrialResult.model_validate_json(r.model_dump_json()) for i, r in cut.records.items()}
    again = Life(tmp_path / "cut", "tpe", scheduler, read, repeats=2)
    again.live()
    assert {i: (r.status, r.suggestion, r.steps) for i, r in again.records.items()} == {
        i: (r.status, r.suggestion, r.steps) for i, r in whole.records.items()
    }


@pytest.mark.parametrize("left", [None, TrialStatus.RUNNING, TrialStatus.CANCELLED])
def test_of_a_configuration_that_was_cut_off_between_its_repeats_the_others_run_before_anything_new(
    left: TrialStatus | None, tmp_path: Path
) -> None:
    cut = Life(tmp_path, "tpe", "fifo", {}, repeats=3)
    cut.live(most=4)
    ended = {i: r for i, r in cut.records.items() if r.status.is_final}
    rest = {} if left is None else {i: cut.records[i] for i in cut.records.keys() - ended.keys()}
    rest = {i: r.model_copy(update={"status": left, "reason": "interrupted"}) for i, r in rest.items()}
    again = Life(tmp_path, "tpe", "fifo", ended | rest, repeats=3)
    waiting = {i for i, r in again.records.items() if r.status is TrialStatus.PENDING}
    assert waiting == {i for i, r in cut.records.items() if r.status is TrialStatus.PENDING} != set()
    again.live(most=len(waiting))
    assert {i: r.status for i, r in again.records.items() if not r.status.is_final} == {}
    assert again.records.keys() == cut.records.keys()


RANKS = {"rank": [2, 4, 8, 16, 32, 64]}
RANKS_ALONE: dict[str, Any] = {"space": RANKS, "trial": {**SWEEP["trial"], "learning_rate": 3e-4}, "exclude": []}
RATES_TOO: dict[str, Any] = {"space": {**RANKS, "learning_rate": {"log_uniform": [5e-5, 2e-3]}}, "exclude": []}


def begun(folder: Path, keys: dict[str, Any]) -> Life:
    """A search that has ended three trials and proposed a fourth one."""
    life = Life(folder, "tpe", "fifo", {}, **keys, budget={"trials": 4})
    life.live(most=3)
    life.suggestions.more()
    return life


def gone_on(life: Life, keys: dict[str, Any]) -> Life:
    """The same folder with another sweep file."""
    read = {i: TrialResult.model_validate_json(r.model_dump_json()) for i, r in life.records.items()}
    return Life(life.folder.root, "tpe", "fifo", read, **keys, budget={"trials": 8})


def test_where_more_is_searched_than_before_a_search_goes_on_with_what_its_trials_ran_with(tmp_path: Path) -> None:
    first = begun(tmp_path, RANKS_ALONE)
    again = gone_on(first, RATES_TOO)
    assert {i: (r.status, r.config) for i, r in again.records.items()} == {
        i: (r.status, r.config) for i, r in first.records.items()
    }
    again.live()
    assert len(again.records) == 8, "nothing ran twice"
    assert [one.settings for one in again.suggestions._known()] == [
        {"rank": record.config.rank, "learning_rate": record.config.learning_rate} for record in again.records.values()
    ]
    assert [record.config.learning_rate for record in again.records.values()][:4] == [3e-4] * 4


def test_where_less_is_searched_than_before_what_had_another_value_stays_and_teaches_nothing(tmp_path: Path) -> None:
    first = begun(tmp_path, RATES_TOO)
    again = gone_on(first, RANKS_ALONE)
    assert again.records.keys() == first.records.keys()
    assert [r.reason for r in again.records.values() if r.status is TrialStatus.CANCELLED] == [
        "the sweep file no longer asks for it"
    ]
    assert again.suggestions._known() == ()
    again.live()
    assert len(again.records) == 8, "they count as trials of the budget"
    new = [record for i, record in again.records.items() if i not in first.records]
    assert {record.config.learning_rate for record in new} == {3e-4}
    assert len(again.suggestions._known()) == len(new)
