"""Population-based training without Ray and training: who goes on from whom, through failures and interruptions."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from orchestrator.config.axes import axes_of
from orchestrator.config.search_space import Space, Trial, domains
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.sweep_file import load, to_yaml
from orchestrator.config.trial_config import CHANGEABLE
from orchestrator.errors import FolderError, SweepFileError
from orchestrator.planning.hardware import named_gpu
from orchestrator.planning.planned_trial import PlannedTrial
from orchestrator.reporting.lineage import lineage_words
from orchestrator.results.records import TrialResult, TrialStatus
from orchestrator.search.population import Member, explored, successors
from tests.fast.cases import A100, new_record, planned
from tests.fast.test_plan import plan
from tests.fast.test_suggest import point

pytest.importorskip("ray")

from orchestrator.sweep.generations import Generations, last_step
from orchestrator.sweep.suggestions import known_at_start

SPACE = {
    "rank": [8, 32],
    "lora_dropout": {"choice": [0.0, 0.1, 0.2], "when": {"rank": 32}},
    "learning_rate": {"log_uniform": [1e-5, 1e-1]},
}
SWEEP: dict[str, Any] = {
    "name": "a",
    "model": "builtin:tiny-llama",
    "data": {"train": "builtin:python-docs"},
    "trial": {"max_steps": 50, "eval_every": 10, "micro_batch_size": 4},
    "space": SPACE,
    "scheduler": {"pbt": {"population": 6, "interval_steps": 20, "quantile": 0.34}},
}
AXES = axes_of(domains(Space.model_validate(SPACE)))


class Population:
    """A sweep whose trials take turns and end as they like: the nearer a learning rate is to 1e-3 the more it gains."""

    def __init__(self, records: list[TrialResult] | None = None, seed: int = 0, breaks: bool = True) -> None:
        self.sweep = SweepConfig.model_validate({**SWEEP, "search": {"seed": seed}})
        self.records = {record.trial_id: record for record in records or []}
        self.forgotten: list[str] = []
        self.breaks = breaks
        plan = SimpleNamespace(launches=18)
        prepared: Any = SimpleNamespace(sweep=self.sweep, plan_trial=self.plan_trial, plan=plan)
        recorder: Any = SimpleNamespace(records=self.records, save=self.save)
        self.generations = Generations(prepared, recorder, new_record, self.forgotten.append)

    def plan_trial(self, trial: Trial) -> PlannedTrial:
        reasons = ("too much",) if self.breaks and trial.config.learning_rate > 5e-2 else ()
        return planned(trial, *reasons)

    def save(self, record: TrialResult) -> None:
        self.records[record.trial_id] = record

    def end(self, trial_id: str) -> None:
        record = self.records[trial_id]
        place = math.log10(record.config.learning_rate)
        step = last_step(self.sweep, record) or record.config.max_steps
        status = TrialStatus.COMPLETED if step == 50 else TrialStatus.STOPPED
        if self.breaks and int(record.configuration_id, 16) % 5 == 0:
            status = TrialStatus.DIVERGED
        last = point(step, self.loss_before(record) - 1 / (1 + abs(place + 3)))
        reason = "told" if status.needs_reason else None
        self.save(record.model_copy(update={"status": status, "reason": reason, "last": last, "steps": step}))

    def loss_before(self, record: TrialResult) -> float:
        if record.started_from is None:
            return 10.0
        last = self.records[record.started_from.trial_id].last
        assert last
        assert last.eval_loss
        return last.eval_loss

    def run(self, order: int, most: int = 10**9) -> list[str]:
        """Trials in the order of their launch, two at a time; ends come in any order; `most` ends, then a power cut."""
        rng, waiting, at_work, launched = random.Random(order), list[str](), list[str](), list[str]()
        waiting += [i for i, record in self.records.items() if record.status is TrialStatus.PENDING]
        while True:
            while len(at_work) < 2:
                more = waiting or self.generations.more()
                if not more:
                    break
                waiting = list(more)
                at_work.append(waiting.pop(0))
                launched.append(at_work[-1])
            if not at_work or not most:
                return launched
            self.end(at_work.pop(rng.randrange(len(at_work))))
            most -= 1


def family(records: dict[str, TrialResult]) -> dict[str, tuple[Any, ...]]:
    """Every trial with what was decided of it; not in the order of the launches, which no decision depends on."""
    return {
        trial_id: (record.config, record.started_from, one.generation, one.member, record.status)
        for trial_id, record in records.items()
        if (one := record.suggestion)
    }


@pytest.fixture(scope="module")
def whole() -> Population:
    found = Population()
    found.run(order=0)
    return found


def test_every_generation_has_as_many_members_and_the_last_one_trains_to_the_end(whole: Population) -> None:
    members = [
        r.suggestion.generation for r in whole.records.values() if r.suggestion and r.suggestion.member is not None
    ]
    assert Counter(members) == {0: 6, 1: 6, 2: 6}
    last = [r for r in whole.records.values() if r.suggestion and r.suggestion.generation == 2]
    assert {r.steps for r in last} == {50}
    assert {r.steps_trained for r in last} == {10}
    assert all(r.started_from and r.started_from.step == 40 for r in last)


def test_what_was_not_searched_for_the_middle_of_training_is_the_parents(whole: Population) -> None:
    for record in whole.records.values():
        if record.started_from:
            parent, own = (
                one.model_dump() for one in (whole.records[record.started_from.trial_id].config, record.config)
            )
            assert {name for name in own if own[name] != parent[name]} <= set(CHANGEABLE)


def test_members_that_diverged_are_replaced_and_nobody_goes_on_from_them(whole: Population) -> None:
    assert any(record.status is TrialStatus.DIVERGED for record in whole.records.values())
    parents = {r.started_from.trial_id for r in whole.records.values() if r.started_from}
    assert {whole.records[parent].status for parent in parents} == {TrialStatus.STOPPED}


def test_a_first_member_that_is_refused_costs_no_place(whole: Population) -> None:
    refused = [r for r in whole.records.values() if r.status is TrialStatus.INFEASIBLE and not r.started_from]
    assert refused
    assert all(r.suggestion and r.suggestion.member is None for r in refused)


@pytest.mark.parametrize("order", range(1, 6))
def test_in_whatever_order_its_trials_end_it_decides_the_same(whole: Population, order: int) -> None:
    other = Population()
    other.run(order)
    assert family(other.records) == family(whole.records)


@pytest.mark.parametrize("ends", range(0, 18, 2))
def test_after_an_interruption_it_goes_on_as_without_one(whole: Population, ends: int) -> None:
    cut = Population()
    cut.run(order=7, most=ends)
    read = [TrialResult.model_validate_json(record.model_dump_json()) for record in cut.records.values()]
    # As the recorder leaves what had not ended, and the next run finds it.
    again = Population(read)
    again.run(order=8)
    assert family(again.records) == family(whole.records)


def test_a_founder_whose_record_is_lost_is_replaced_in_its_own_place() -> None:
    cut = Population(breaks=False)
    cut.run(order=0, most=2)
    founders = [record for record in cut.records.values() if record.suggestion and record.suggestion.generation == 0]
    lost = next(record for record in founders if record.status is TrialStatus.STOPPED)
    again = Population([record for record in cut.records.values() if record is not lost], breaks=False)
    again.run(order=0)
    members = [one.member for r in again.records.values() if (one := r.suggestion) and one.generation == 0]
    assert sorted(members) == list(range(6))


def test_a_child_whose_parents_record_is_lost_is_told_of_and_not_guessed_at(whole: Population) -> None:
    child = next(record for record in whole.records.values() if record.started_from)
    assert child.started_from
    left = {i: record for i, record in whole.records.items() if i != child.started_from.trial_id}
    prepared: Any = SimpleNamespace(sweep=whole.sweep, plan_trial=whole.plan_trial)
    with pytest.raises(FolderError, match=f"trial {child.started_from.trial_id} has left no record"):
        list(known_at_start(prepared, left))


def test_another_seed_has_another_population(whole: Population) -> None:
    other = Population(seed=1)
    other.run(order=0)
    assert not family(other.records).keys() & family(whole.records).keys()


def test_checkpoints_go_when_the_next_generation_has_ended_and_not_before() -> None:
    population = Population(breaks=False)
    population.run(order=0, most=11)
    assert population.forgotten == []
    rest = Population(list(population.records.values()), breaks=False)
    rest.run(order=0)
    assert set(rest.forgotten) == {i for i, r in rest.records.items() if r.suggestion and r.suggestion.generation < 2}


def test_it_gets_better_than_the_best_of_its_members_alone() -> None:
    population = Population(breaks=False)
    population.run(order=0)
    gains = [
        1 / (1 + abs(math.log10(r.config.learning_rate) + 3)) for r in population.records.values() if not r.started_from
    ]
    ends = [r.last.eval_loss for r in population.records.values() if r.status is TrialStatus.COMPLETED and r.last]
    assert min(end for end in ends if end) <= 10 - 3 * max(gains)


def members(*losses: float | None, ended: int | None = None) -> list[Member]:
    """In the order of their places; None: it failed; of those past `ended` nothing is known yet."""
    known = len(losses) if ended is None else ended
    return [
        Member(
            number,
            f"t{number}",
            {"rank": 8, "learning_rate": 1e-3},
            number < known,
            (0.0, loss) if loss is not None and number < known else None,
        )
        for number, loss in enumerate(losses)
    ]


def decided(found: list[Member], quantile: float = 0.25) -> dict[int, str]:
    return {one.number: one.parent.trial_id for one in successors(AXES, {}, [], found, quantile, 0, 0)}


def test_the_worst_quarter_goes_on_from_the_best_quarter_and_the_rest_from_themselves() -> None:
    found = decided(members(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0))
    assert {number: parent for number, parent in found.items() if number < 6} == {n: f"t{n}" for n in range(6)}
    assert {found[6], found[7]} <= {"t0", "t1"}


def test_a_member_goes_on_as_soon_as_enough_are_known_to_be_worse() -> None:
    assert decided(members(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, ended=3)) == {0: "t0"}


def test_a_population_that_is_cut_off_knows_how_many_of_its_trials_have_not_begun() -> None:
    population = Population(breaks=False)
    population.run(order=0, most=3)
    begun = len(population.records)
    assert population.generations.unused() == f"not used: {18 - begun} of the population's 18 trials"
    assert not population.generations.is_over
    population.run(order=0)
    assert population.generations.is_over


def test_where_nobody_left_a_checkpoint_nobody_goes_on() -> None:
    assert decided(members(None, None)) == {}
    assert decided(members(None, None, 3.0)) == {0: "t2", 1: "t2", 2: "t2"}


def test_a_member_that_breaks_a_constraint_comes_after_all_that_keep_them() -> None:
    found = [Member(0, "t0", {"learning_rate": 1e-3, "rank": 8}, True, (0.5, 1.0)), *members(9.0, 5.0, 5.0)[1:]]
    assert decided(found)[0] != "t0"


def test_exploring_changes_a_little_stays_on_the_axes_and_keeps_to_what_is_excluded() -> None:
    settings = {"rank": 32, "lora_dropout": 0.1, "learning_rate": 9e-2}
    found = [explored(AXES, {}, [], settings, random.Random(seed)) for seed in range(200)]
    assert all(one["rank"] == 32 and 1e-5 <= one["learning_rate"] <= 1e-1 for one in found)
    factors = Counter(round(one["learning_rate"] / 9e-2, 3) for one in found)
    assert factors[0.8] > 50
    assert factors[round(1 / 0.9, 3)] > 50, "a fifth more is cut off at the axis' end"
    assert {one["lora_dropout"] for one in found} == {0.0, 0.1, 0.2}
    assert explored(AXES, {}, [{"rank": 32}], settings, random.Random(0)) == settings


def problems(tmp_path: Path, **keys: Any) -> str:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({**SWEEP, **keys}))
    with pytest.raises(SweepFileError) as caught:
        load(file)
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"scheduler": {}, "search": {"algorithm": "pbt"}},
            "write scheduler: {pbt: {population: 8, interval_steps: 40}}",
        ),
        ({"search": {"algorithm": "tpe"}}, "tpe and scheduler.pbt exclude each other"),
        ({"search": {"repeats": 2}}, "a member is one trial"),
        ({"budget": {"trials": 6}}, "as many as scheduler.pbt.population"),
        ({"space": {"rank": [8, 32]}}, "search one of learning_rate"),
        (
            {"space": {**SPACE, "eval_every": [10, 20]}, "trial": {"max_steps": 50}},
            "space.eval_every: is shared by all members",
        ),
        (
            {
                "space": {
                    **SPACE,
                    "rank": {"choice": [8, 32], "when": {"learning_rate": 1e-3}},
                    "lora_dropout": [0, 0.1],
                }
            },
            "depends on learning_rate, which pbt changes",
        ),
        ({"trial": {"max_steps": 50, "eval_every": 15}}, "no multiple of trial.eval_every (15)"),
        ({"trial": {"max_steps": 20, "eval_every": 10}}, "leaves one generation"),
        ({"objective": [{"metric": "eval_loss"}, {"metric": "step_time_s"}]}, "by one objective"),
        ({"scheduler": {"pbt": None}}, "pbt needs its population"),
        ({"scheduler": {"pbt": {"population": 6}}}, "interval_steps: is missing"),
        (
            {"scheduler": {"pbt": {"population": 6, "interval_steps": 20}, "extrapolation": {"grace_steps": 9}}},
            "leave extrapolation out",
        ),
        (
            {"scheduler": {"pbt": {"population": 6, "interval_steps": 20}, "asha": {"grace_steps": 9}}},
            "name one scheduler, not asha and pbt",
        ),
    ],
    ids=str,
)
def test_a_population_that_cannot_be_meant_is_refused_with_the_mend(
    tmp_path: Path, keys: dict[str, Any], told: str
) -> None:
    assert told in problems(tmp_path, **keys)


def test_the_scheduler_alone_says_all(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(SWEEP))
    sweep = load(file)
    assert sweep.search.algorithm == "pbt"
    file.write_text(to_yaml(sweep))
    assert load(file) == sweep


def test_the_plan_knows_how_many_members_train_and_that_each_generation_starts_anew() -> None:
    keys = {"space": {"learning_rate": {"log_uniform": [1e-5, 1e-2]}}, "trial": {"max_steps": 80, "eval_every": 10}}
    plain = plan(A100, **keys, search={"algorithm": "random"}, budget={"trials": 8})
    found = plan(A100, **keys, scheduler={"pbt": {"population": 8, "interval_steps": 10}})
    assert len(found.trials) == 8
    assert found.launches == 8 * 8
    assert found.makespan_s[1] > plain.makespan_s[1]
    # Members of one generation at a time, however many GPUs there are.
    gpus = [
        plan(named_gpu("A100", n), **keys, scheduler={"pbt": {"population": 8, "interval_steps": 10}}) for n in (8, 64)
    ]
    assert gpus[0].makespan_s == gpus[1].makespan_s


def test_the_answer_names_every_setting_on_the_way(whole: Population) -> None:
    trial = next(r for r in whole.records.values() if r.status is TrialStatus.COMPLETED)
    sweep: Any = SimpleNamespace(trials=tuple(whole.records.values()), searched=("rank", "learning_rate"))
    words = lineage_words(sweep, trial)
    assert words
    assert words.count("learning_rate=") == 3
    assert "from step 40 on learning_rate=" in words
    assert "rank" not in words
    founder = next(r for r in whole.records.values() if not r.started_from)
    assert lineage_words(sweep, founder) is None
