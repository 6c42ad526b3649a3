"""Several objectives and constraints: as a person writes them, as a search learns them, as the report tells of them."""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.config.constraint import parse
from orchestrator.config.search_space import Choice, Space, domains
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.reporting import report
from orchestrator.reporting.objectives import costs_of, evidence, front_of, hypervolume
from orchestrator.reporting.recommendation import recommend, trial_to_take
from orchestrator.reporting.statistics import front, summaries
from orchestrator.results.constraints import worst_excess
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus
from orchestrator.search.observation import Goal, Observation, Standing, constraints_of, observe
from orchestrator.search.suggest import next_settings
from orchestrator.search.warm_start import best_settings
from orchestrator.sweep.launch import _task
from orchestrator.sweep.suggestions import limits
from tests.fast.test_suggest import point, record
from tests.made_up_sweep import made_up_point, made_up_sweep, made_up_trial, write_made_up

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "value", "is_broken"),
    [
        ("peak_memory_bytes <= 24GiB", 25 * GIB, True),
        ("peak_memory_bytes<=24GiB", 24 * GIB, False),
        ("tokens_per_s >= 1000", 999, True),
        ("tokens_per_s >= 1000", 2000, False),
    ],
)
def test_a_constraint_is_broken_past_its_bound(text: str, value: float, is_broken: bool) -> None:
    assert (parse(text).excess(value) > 0) is is_broken


@pytest.mark.parametrize("text", ["memory <= 3", "loss < 3", "loss <= much", "tokens_per_s >= 0", "grad_norm <= 1"])
def test_what_is_no_constraint_is_refused_with_the_form_that_it_should_have(text: str) -> None:
    with pytest.raises(ValueError, match=r"as `|write it|positive"):
        parse(text)


def test_the_front_is_what_nothing_else_beats() -> None:
    costs = {"a": (1.0, 5.0), "b": (2.0, 2.0), "c": (2.0, 3.0), "d": (5.0, 1.0), "e": (2.0, 2.0)}
    assert front(costs) == ("a", "b", "d")


def test_the_hypervolume_is_that_of_the_boxes_together() -> None:
    assert hypervolume([(1.0, 3.0), (2.0, 1.0)], (4.0, 4.0)) == pytest.approx(3 * 1 + 2 * 3 - 2 * 1)
    assert hypervolume([(0.0, 0.0, 0.0)], (2.0, 3.0, 4.0)) == pytest.approx(24)
    assert hypervolume([(9.0, 9.0)], (4.0, 4.0)) == 0
    rng = random.Random(0)
    points = [(rng.random(), rng.random(), rng.random()) for _ in range(8)]
    drawn = [(rng.random(), rng.random(), rng.random()) for _ in range(20000)]
    hit = sum(any(all(a <= b for a, b in zip(p, d, strict=True)) for p in points) for d in drawn)
    assert hypervolume(points, (1.0, 1.0, 1.0)) == pytest.approx(hit / len(drawn), abs=0.02)


def trials() -> list[Any]:
    return [
        made_up_trial({"rank": rank}, objective=loss, memory_bytes=int(gib * GIB))
        for rank, loss, gib in ((4, 2.0, 1), (8, 1.9, 2), (16, 1.8, 4), (32, 1.85, 5))
    ]


def test_who_breaks_a_constraint_is_not_recommended_and_the_report_says_so() -> None:
    sweep = made_up_sweep(trials()).model_copy(update={"constraints": ("peak_memory_bytes <= 3GiB",)})
    answer = recommend(sweep)
    assert answer.label == "rank=8"
    assert "Left out, since they do not keep peak_memory_bytes <= 3GiB: rank=16, rank=32." in answer.evidence
    assert not any("scatter" in line for line in answer.evidence)


def test_who_is_left_alone_by_the_constraints_is_said_to_be() -> None:
    sweep = made_up_sweep(trials()).model_copy(update={"constraints": ("peak_memory_bytes <= 1GiB",)})
    assert "no other configuration has completed soundly and keeps the constraints" in recommend(sweep).answer


def test_before_anything_has_completed_who_breaks_a_constraint_is_not_the_best_so_far() -> None:
    running = [trial.model_copy(update={"status": TrialStatus.RUNNING}) for trial in trials()]
    sweep = made_up_sweep(running, ended_ms=None, constraints=("peak_memory_bytes <= 3GiB",))
    assert recommend(sweep).label == "rank=8"
    sweep = made_up_sweep(running, ended_ms=None, constraints=("tokens_per_s >= 1000000",))
    assert recommend(sweep).answer == "No answer yet: no configuration so far keeps the constraints."
    assert trial_to_take(sweep) is None


@pytest.mark.parametrize(
    ("keys", "is_over"),
    [({}, True), ({"ended_ms": None}, False), ({"interrupted": True}, False)],
    ids=["ended", "at work", "interrupted"],
)
def test_no_answer_is_to_come_of_a_sweep_that_has_ended(keys: dict[str, Any], is_over: bool) -> None:
    ends = [TrialStatus.FAILED, TrialStatus.OUT_OF_MEMORY, TrialStatus.INFEASIBLE]
    lost = [made_up_trial({"rank": 4 + place}, status=status) for place, status in enumerate(ends)]
    waits = made_up_trial({"rank": 16}, status=TrialStatus.PENDING)
    assert recommend(made_up_sweep(lost, **keys)).answer.endswith("and the sweep has ended.") == is_over
    assert recommend(made_up_sweep([*lost, waits], **keys)).answer.startswith("No answer yet: ")


def test_where_nobody_keeps_the_constraints_the_report_says_that() -> None:
    sweep = made_up_sweep(trials()).model_copy(update={"constraints": ("tokens_per_s >= 1000000",)})
    answer = recommend(sweep)
    assert answer.label is None
    assert "loosen them" in answer.answer
    assert answer.answer.endswith(" rank=16 comes nearest, at 0.2 % of the bound in tokens_per_s >= 1000000.")
    assert trial_to_take(sweep) is None


def test_who_comes_nearest_to_the_constraints_is_named_by_the_one_that_it_breaks_the_worst() -> None:
    constraints = ("peak_memory_bytes <= 0.5GiB", "eval_loss <= 1.75")
    answer = recommend(made_up_sweep(trials()).model_copy(update={"constraints": constraints})).answer
    assert answer.endswith(" rank=4 comes nearest, at 200 % of the bound in peak_memory_bytes <= 0.5GiB.")


@pytest.mark.parametrize("bound", ["5e-324", "1e-300", "1e-9"])
def test_a_bound_that_everything_is_far_past_is_told_without_its_many_digits(bound: str) -> None:
    sweep = made_up_sweep([made_up_trial({"rank": 4})], constraints=(f"eval_loss <= {bound}",))
    nearest = f" rank=4 comes nearest, at over 1,000,000 % of the bound in eval_loss <= {bound}."
    assert recommend(sweep).answer.endswith(nearest)


def test_who_is_beaten_in_every_objective_is_not_said_to_scatter() -> None:
    objectives = (("eval_loss", "min"), ("peak_memory_bytes", "min"))
    sweep = made_up_sweep(trials()).model_copy(update={"objectives": objectives})
    assert not any("scatter" in line for line in recommend(sweep).evidence)


def test_the_front_of_several_objectives_stands_in_the_report() -> None:
    objectives = (("eval_loss", "min"), ("peak_memory_bytes", "min"))
    sweep = made_up_sweep(trials()).model_copy(update={"objectives": objectives})
    told = recommend(sweep).evidence[-1]
    assert "Pareto front of eval_loss and peak memory: " in told
    assert "rank=32" not in told
    assert "hypervolume" in told


def test_a_front_behind_which_nobody_lies_has_no_hypervolume() -> None:
    objectives = (("eval_loss", "min"), ("peak_memory_bytes", "min"))
    both = [
        made_up_trial({"rank": 8}, objective=2.0, memory_bytes=2 * GIB),
        made_up_trial({"rank": 16}, objective=1.9, memory_bytes=3 * GIB),
    ]
    behind = made_up_trial({"rank": 32}, objective=2.2, memory_bytes=4 * GIB)
    for trials, share in ((both, None), ([*both, behind], "86 %")):
        sweep = made_up_sweep(trials).model_copy(update={"objectives": objectives})
        found = summaries(sweep)
        (told,) = evidence(sweep, found, found)
        assert "rank=16, rank=8" in told
        assert ("hypervolume" in told) == bool(share)
        assert not share or share in told


def test_both_ends_of_a_front_count_in_its_hypervolume() -> None:
    """Up to a tenth of the range past the worst value: at the worst itself they would come to nothing."""
    objectives = (("eval_loss", "min"), ("tokens_per_s", "max"))
    made = [
        made_up_trial({"rank": rank}, objective=loss, step_time_s=1024 / rate)
        for rank, loss, rate in ((4, 2.4, 1000), (8, 2.0, 500), (16, 2.4, 700))
    ]
    sweep = made_up_sweep(made, objectives=objectives)
    front = front_of(sweep, summaries(sweep))
    assert front.words == "eval_loss and tokens a second"
    assert front.reference == pytest.approx((2.44, 450.0))
    assert front.hypervolume == pytest.approx((2 * 1.1 * 0.1 - 0.1 * 0.1) / 1.1**2)
    assert "hypervolume is 17 %" in recommend(sweep).evidence[-1]


def test_where_all_are_alike_in_an_objective_the_others_make_the_hypervolume() -> None:
    made = [made_up_trial({"rank": rank}, objective=2.0, memory_bytes=rank * GIB) for rank in (1, 2)]
    sweep = made_up_sweep(made, objectives=(("eval_loss", "min"), ("peak_memory_bytes", "min")))
    assert front_of(sweep, summaries(sweep)).hypervolume == pytest.approx(1.0)


def test_the_front_that_is_drawn_and_given_as_json_is_that_of_the_objectives_over_what_competes(tmp_path: Path) -> None:
    """rank=16 is the lightest, which nobody asked for; rank=32 breaks the constraint."""
    cost_of = {4: 1.0, 8: 5.0, 16: 3.0, 32: 3.0}
    made = []
    for rank, loss, gib in ((4, 2.4, 3), (8, 2.0, 5), (16, 2.4, 2), (32, 1.9, 30)):
        trial = made_up_trial({"rank": rank}, objective=loss, memory_bytes=gib * GIB)
        assert trial.last
        made.append(trial.model_copy(update={"last": trial.last.model_copy(update={"cost": cost_of[rank]})}))
    objectives, constraints = (("eval_loss", "min"), ("cost", "min")), ("peak_memory_bytes <= 24GiB",)
    sweep = made_up_sweep(made, objectives=objectives, constraints=constraints)
    built = report.build(write_made_up(tmp_path, sweep))
    raw = json.loads(report.render_json(built))
    on_front = {one["label"] for one in raw["configurations"] if one["is_on_pareto_front"]}
    assert on_front == {"rank=4", "rank=8"}
    assert raw["pareto_front"]["metrics"] == ["eval_loss", "cost"]
    assert raw["pareto_front"]["configuration_ids"] == [made[1].configuration_id, made[0].configuration_id]
    assert raw["pareto_front"]["hypervolume"] == pytest.approx(0.21 / 1.21)
    page = report.render_html(built)
    assert "eval_loss against cost" in page
    assert "2 of 4 configurations are on the Pareto front of eval_loss and cost" in page
    assert page.count(">Pareto</span>") == 2


def on_a_sphere(count: int) -> list[tuple[float, ...]]:
    """Points in four objectives, of which none beats another."""
    rng = random.Random(0)
    drawn = [[abs(rng.gauss(0, 1)) for _ in range(4)] for _ in range(count)]
    return [tuple(2 - value / math.hypot(*point) for value in point) for point in drawn]


def test_the_hypervolume_of_hundreds_in_four_objectives_is_known_at_once() -> None:
    """Slice by slice, with what is beaten in a slice, 200 took a minute."""
    start = time.perf_counter()
    assert 0 < hypervolume(on_a_sphere(200), (2.0,) * 4) < 1
    assert time.perf_counter() - start < 5


def of_hundreds() -> SweepResult:
    made = []
    for rank, (loss, memory, time_s, norm) in enumerate(on_a_sphere(300), start=1):
        trial = made_up_trial({"rank": rank}, objective=loss, memory_bytes=int(memory * GIB), step_time_s=time_s)
        assert trial.best
        made.append(trial.model_copy(update={"best": trial.best.model_copy(update={"grad_norm": norm})}))
    names = ("eval_loss", "peak_memory_bytes", "step_time_s", "grad_norm")
    return made_up_sweep(made, objectives=tuple((name, "min") for name in names))


def test_a_front_of_hundreds_is_told_in_one_line() -> None:
    sweep = of_hundreds()
    found = summaries(sweep)
    (told,) = evidence(sweep, found, found)
    assert told.startswith("Pareto front of eval_loss, peak memory, step_time_s and grad_norm: rank=")
    assert re.search(r" and \d+ more", told)


def test_a_front_too_large_for_its_hypervolume_is_told_at_once_and_without_it() -> None:
    """In seven objectives 300 configurations took `status` two minutes."""
    sweep, start = of_hundreds(), time.perf_counter()
    found = summaries(sweep)
    front = front_of(sweep, found)
    assert front.reference
    assert front.hypervolume is None
    assert "its hypervolume is left out" in evidence(sweep, found, found)[0]
    assert time.perf_counter() - start < 5


def test_hundreds_that_break_a_constraint_are_told_in_one_line() -> None:
    sweep = of_hundreds().model_copy(update={"objectives": (), "constraints": ("peak_memory_bytes <= 1536MiB",)})
    (told,) = evidence(sweep, summaries(sweep), ())
    assert re.fullmatch(r"Left out, since they do not keep peak_memory_bytes <= 1536MiB: .* and \d+ more\.", told)


def test_of_several_objectives_those_on_the_front_compete_and_the_next_one_decides_within_the_noise() -> None:
    """rank=16 is as good as rank=8, heavier and faster; rank=4 is the lightest of all and beaten in both objectives."""
    found = [(4, 2.01, 1, 0.9), (8, 2.0, 2, 0.5), (16, 2.0, 4, 0.25), (32, 1.5, 8, 2.0)]
    made = [
        made_up_trial({"rank": rank}, repeat, objective=loss + wobble, memory_bytes=gib * GIB, step_time_s=seconds)
        for rank, loss, gib, seconds in found
        for repeat, wobble in enumerate((0.0, 0.02 * (rank == 4), 0.01))
    ]
    sweep = made_up_sweep(made[:-3])
    assert recommend(sweep).label == "rank=4", "one objective: memory decides within the noise"
    objectives = (("eval_loss", "min"), ("tokens_per_s", "max"))
    assert recommend(sweep.model_copy(update={"objectives": objectives})).label == "rank=16"
    whole = made_up_sweep(made, objectives=objectives)
    assert recommend(whole).label == "rank=32", "the first objective comes first"
    assert "nothing better by tokens_per_s is within its noise" in recommend(whole).answer


def test_an_answer_within_the_noise_says_by_which_objective_it_was_chosen() -> None:
    made = [
        made_up_trial({"rank": rank}, repeat, objective=loss + 0.01 * (repeat == rank % 3), step_time_s=seconds)
        for rank, loss, seconds in ((8, 2.0, 0.5), (16, 2.001, 0.25))
        for repeat in range(3)
    ]
    answer = recommend(made_up_sweep(made, objectives=(("eval_loss", "min"), ("tokens_per_s", "max"))))
    assert answer.label == "rank=16"
    assert answer.answer.endswith("and of those within the noise it has the best tokens_per_s.")


def test_who_is_best_in_everything_is_recommended_for_that() -> None:
    objectives = (("eval_loss", "min"), ("peak_memory_bytes", "min"))
    answer = recommend(made_up_sweep([trials()[0], made_up_trial({"rank": 2}, objective=9.0)], objectives=objectives))
    assert answer.answer == ("Take rank=4: no other configuration is better by any of eval_loss and peak_memory_bytes.")


def test_cost_is_that_of_all_steps_as_an_objective_and_as_a_constraint() -> None:
    ran = [made_up_trial({"rank": rank}, objective=loss) for rank, loss in ((4, 2.0), (8, 1.9))]
    priced = [
        trial.model_copy(update={"last": trial.last and trial.last.model_copy(update={"cost": cost})})
        for trial, cost in zip(ran, (1.0, 3.0), strict=True)
    ]
    objectives = (("eval_loss", "min"), ("cost", "min"))
    told = recommend(made_up_sweep(priced, objectives=objectives)).evidence
    assert any("Pareto front of eval_loss and cost: rank=8, rank=4" in line for line in told)
    kept = recommend(made_up_sweep(priced, constraints=("cost <= 2",)))
    assert kept.label == "rank=4"
    assert any("do not keep cost <= 2: rank=8." in line for line in kept.evidence)
    raw = {"name": "a", "model": "m", "data": {"train": "t"}, "constraints": ["cost <= 2"]}
    limit = limits(SweepConfig.model_validate(raw))["cost <= 2"]
    assert [worst_excess(limit, [one]) for one in priced] == [
        pytest.approx(-math.log(2)),
        pytest.approx(math.log(1.5)),
    ]


def test_a_repeat_that_was_stopped_does_not_make_a_configuration_cheaper() -> None:
    def priced(repeat: int, status: TrialStatus, cost: float) -> Any:
        trial = made_up_trial({"rank": 8}, repeat, status)
        return trial.model_copy(update={"last": trial.last and trial.last.model_copy(update={"cost": cost})})

    cheap = made_up_trial({"rank": 4}, objective=3.0)
    cheap = cheap.model_copy(update={"last": cheap.last and cheap.last.model_copy(update={"cost": 1.0})})
    repeats = [priced(0, TrialStatus.COMPLETED, 8.0), priced(1, TrialStatus.STOPPED, 1.0)]
    answer = recommend(made_up_sweep([cheap, *repeats], constraints=("cost <= 6",)))
    assert answer.label == "rank=4"
    assert any("do not keep cost <= 6: rank=8." in line for line in answer.evidence)


def test_the_front_that_is_told_is_of_those_that_compete() -> None:
    """rank=2 is best in both, and one of its repeats diverged."""
    objectives = (("eval_loss", "min"), ("peak_memory_bytes", "min"))
    broken = [
        made_up_trial({"rank": 2}, objective=1.0, memory_bytes=GIB // 2),
        made_up_trial({"rank": 2}, 1, TrialStatus.DIVERGED),
    ]
    answer = recommend(made_up_sweep([*trials(), *broken], objectives=objectives))
    (told,) = [line for line in answer.evidence if line.startswith("Pareto front of")]
    assert "rank=2" not in told
    assert answer.label is not None
    assert answer.label in told


def test_a_list_of_objectives_is_read_and_the_first_is_the_primary_one() -> None:
    raw = {"name": "a", "model": "m", "data": {"train": "t"}, "constraints": ["tokens_per_s  >= 1000"]}
    sweep = SweepConfig.model_validate(raw | {"objective": [{"metric": "eval_loss"}, {"metric": "tokens_per_s"}]})
    assert sweep.primary.metric == "eval_loss"
    assert [objective.mode for objective in sweep.objectives] == ["min", "max"]
    assert sweep.constraints == ("tokens_per_s >= 1000",)


@pytest.mark.parametrize(
    ("objective", "best_by"),
    [
        ([{"metric": "eval_loss"}, {"metric": "tokens_per_s"}], ("eval_loss", "min")),
        ([{"metric": "tokens_per_s"}, {"metric": "loss"}], ("loss", "min")),
        ({"metric": "peak_memory_bytes"}, ("eval_loss", "min")),
        ([{"metric": "step_time_s"}, {"metric": "cost"}], ("eval_loss", "min")),
        ([{"metric": "peak_memory_bytes"}, {"metric": "tiny/acc", "mode": "max"}], ("eval_loss", "min")),
    ],
    ids=str,
)
def test_a_trial_keeps_its_best_evaluation_by_the_first_objective_that_is_no_cost_or_else_by_eval_loss(
    objective: Any, best_by: tuple[str, str]
) -> None:
    sweep = SweepConfig.model_validate({"name": "a", "model": "m", "data": {"train": "t"}, "objective": objective})
    prepared: Any = SimpleNamespace(sweep=sweep, gpu_memory_fraction=None, shape=SimpleNamespace(gpus=0))
    task = _task(trials()[0], prepared, SweepFolder(Path("sweeps/a")), halves_micro_batch=False)
    assert (task.best_metric, task.best_mode) == best_by


def ran(rank: int, losses: list[float], step_times_s: list[float], gib: list[float], best: int) -> TrialResult:
    """A trial with an evaluation every 20 steps, of which number `best` is its best."""
    curve = [
        made_up_point(20 * (n + 1), loss, step_time_s, int(size * GIB))
        for n, (loss, step_time_s, size) in enumerate(zip(losses, step_times_s, gib, strict=True))
    ]
    made = made_up_trial({"rank": rank}, step_time_s=step_times_s[-1], memory_bytes=int(max(gib) * GIB))
    return made.model_copy(update={"best": curve[best], "last": curve[-1]})


@pytest.mark.parametrize("constraints", [(), ("cost <= 0.001",)])
def test_thousands_of_configurations_are_not_looked_for_among_all_trials_one_by_one(
    constraints: tuple[str, ...],
) -> None:
    """With money as the second objective the answer of 10,000 took half a minute."""
    walks: list[int] = []

    class Watched(tuple[TrialResult, ...]):
        def __iter__(self) -> Iterator[TrialResult]:
            walks.append(len(self))
            return super().__iter__()

    trials = []
    for rank in range(1, 101):
        last = made_up_point(100, 2 + rank / 100).model_copy(update={"cost": 1 / rank if rank < 4 else rank})
        trials.append(made_up_trial({"rank": rank}).model_copy(update={"best": last, "last": last}))
    sweep = made_up_sweep(trials, objectives=(("eval_loss", "min"), ("cost", "min")), constraints=constraints)
    assert recommend(sweep.model_copy(update={"trials": Watched(trials)})).answer == recommend(sweep).answer
    assert len(walks) < 50


def test_thousands_on_a_front_are_not_looked_for_among_all_trials_one_by_one() -> None:
    """Each was asked whether it is cheaper: the answer of 2,000 that are all on the front took seconds."""
    walks: list[int] = []

    class Watched(tuple[TrialResult, ...]):
        def __iter__(self) -> Iterator[TrialResult]:
            walks.append(len(self))
            return super().__iter__()

    trials = [made_up_trial({"rank": rank}, objective=2 + rank, step_time_s=1 / rank) for rank in range(1, 101)]
    sweep = made_up_sweep(trials, objectives=(("eval_loss", "min"), ("step_time_s", "min")))
    assert recommend(sweep.model_copy(update={"trials": Watched(trials)})).answer == recommend(sweep).answer
    assert len(walks) < 50


def test_a_front_of_thousands_in_two_objectives_is_not_compared_each_with_each() -> None:
    compared: list[float] = []

    class Counted(float):
        def __le__(self, other: float) -> bool:
            compared.append(other)
            return super().__le__(other)

    costs = {number: (float(number), Counted(-number)) for number in range(1000)}
    assert len(front(costs)) == 1000
    assert len(compared) < 5000


@pytest.mark.parametrize("cost", ["tokens_per_s", "step_time_s", "peak_memory_bytes"])
def test_what_a_trial_took_is_that_of_all_of_it_and_not_of_its_best_evaluation(cost: str) -> None:
    """The first one's best evaluation was its fastest, and before its memory was at its peak."""
    one = ran(8, [1.5, 3.0, 1.6], [0.4, 0.9, 0.9], [2, 6, 6], best=0)
    other = ran(64, [2.5, 2.2, 2.0], [0.8, 0.8, 0.8], [5, 5, 5], best=2)
    mode = "max" if cost == "tokens_per_s" else "min"
    objectives = ((cost, mode), ("eval_loss", "min"))
    sweep = made_up_sweep([one, other], objective_metric=cost, objective_mode=mode, objectives=objectives)
    found = {summary.label: costs_of(sweep, [summary])[summary.configuration_id] for summary in summaries(sweep)}
    assert found["rank=8"][0] > found["rank=64"][0]
    assert (found["rank=8"][1], found["rank=64"][1]) == (1.5, 2.0)
    assert best_settings(sweep.trials, {"rank": Choice(choice=(8, 64))}, {}, Goal(cost, mode), {})[0] == {"rank": 64}


def test_a_measured_constraint_is_told_to_the_search() -> None:
    raw = {"name": "a", "model": "m", "data": {"train": "t"}, "constraints": ["tokens_per_s >= 1000"]}
    found = limits(SweepConfig.model_validate(raw))
    slow = record(0, {"rank": 8}, TrialStatus.COMPLETED, tokens_per_s=500.0)
    (one,) = observe([slow], [Goal("eval_loss", "min")], lambda _: [point(10, 1.0)], found)
    assert one.violation == pytest.approx(math.log(2))


@pytest.mark.parametrize("constraint", ["eval_loss <= 2.05", "tokens_per_s >= 1000", "peak_memory_bytes <= 5GiB"])
def test_the_worst_repeat_breaks_a_constraint_for_its_configuration_in_search_and_report_alike(constraint: str) -> None:
    """Two of three keep to it, and so does their mean."""
    repeats = [
        made_up_trial({"rank": 8}, repeat, objective=loss, step_time_s=step_time_s, memory_bytes=gib * GIB)
        for repeat, (loss, step_time_s, gib) in enumerate([(1.9, 0.8, 2), (1.9, 0.8, 2), (2.1, 1.1, 6)])
    ]
    (summary,) = summaries(made_up_sweep(repeats, constraints=(constraint,)))
    assert summary.breaks == (constraint,)
    assert dict(constraints_of(repeats, {constraint: parse(constraint)}))[constraint] > 0
    assert summaries(made_up_sweep(repeats[:2], constraints=(constraint,)))[0].breaks == ()


@pytest.mark.parametrize("algorithm", ["tpe", "gp"])
def test_a_search_for_two_objectives_under_a_constraint_looks_along_the_front(algorithm: str) -> None:
    """Loss falls and memory rises with the rank; a rank above 64 breaks the constraint."""
    space = domains(Space.model_validate({"rank": {"log_int": [1, 256]}, "learning_rate": {"log_uniform": [1e-5, 1]}}))
    known: list[Observation] = []
    for number in range(12):
        settings = next_settings(algorithm, space, {}, [], (), known, 0)
        assert settings is not None
        off = (math.log10(settings["learning_rate"]) + 2) ** 2
        curves = (((10, 5 - math.log2(settings["rank"]) / 4 + off),), ((10, float(settings["rank"])),))
        constraints = (("runs", -1.0), ("rank <= 64", math.log(settings["rank"] / 64)))
        known.append(Observation(number, settings, Standing.WHOLE, curves, constraints))
    assert min(abs(math.log10(one.settings["learning_rate"]) + 2) for one in known[7:]) < 0.7
