"""One life for all adaptive algorithms: suggest, report, stop, fail, run out of memory, resume. No Ray, no training."""

from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.config.axes import axes_of, places_of, settings_at
from orchestrator.config.search_space import Space, domains, is_excluded
from orchestrator.config.trial_config import TrialConfig
from orchestrator.results.records import MetricPoint, PeakMemory, Suggestion, TrialResult, TrialStatus
from orchestrator.search import suggest
from orchestrator.search.evolution import rank
from orchestrator.search.fidelity import common_step, values_at
from orchestrator.search.observation import Goal, Observation, Standing, constraints_of, observe
from orchestrator.search.suggest import ALGORITHMS, FIRST, distance, next_settings

SPACE = domains(
    Space.model_validate(
        {
            "rank": [8, 32, 128],
            "zero_stage": [1, 2, 3],
            "offload": {"choice": ["none", "optimizer"], "when": {"zero_stage": [2, 3]}},
            "learning_rate": {"log_uniform": [1e-5, 1e-2]},
        }
    )
)
BASE = {"max_steps": 20, "micro_batch_size": 4}
EXCLUDE = [{"rank": 32, "zero_stage": 1}]
GOAL = Goal("eval_loss", "min")


def point(step: int, loss: float) -> MetricPoint:
    return MetricPoint(step=step, tokens=step * 64, seconds=step, eval_loss=loss, learning_rate=1e-3, time_ms=step)


class Play:
    """A sweep without trials: every status comes, and the loss is best at a learning rate of 1e-3."""

    def __init__(self, algorithm: str, seed: int = 0) -> None:
        self.algorithm, self.seed = algorithm, seed
        self.records: list[TrialResult] = []
        self.curves: dict[str, list[MetricPoint]] = {}

    def known(self) -> tuple[Observation, ...]:
        return observe(self.records, [GOAL], lambda trial_id: self.curves.get(trial_id, []))

    def suggest(self) -> dict[str, Any]:
        settings = next_settings(self.algorithm, SPACE, BASE, EXCLUDE, (), self.known(), self.seed)
        assert settings is not None
        return settings

    def end(self, settings: dict[str, Any]) -> None:
        number = len(self.records)
        loss = 1 + (math.log10(settings["learning_rate"]) + 3) ** 2 + 0.1 * (settings["rank"] != 32)
        status, steps = TrialStatus.COMPLETED, (10, 20)
        if settings["rank"] == 128:
            status, steps = TrialStatus.OUT_OF_MEMORY, ()
        elif settings["zero_stage"] == 1:
            status, steps = TrialStatus.INFEASIBLE, ()
        elif settings["learning_rate"] > 5e-3:
            status, steps = TrialStatus.DIVERGED, (10,)
        elif number % 7 == 6:
            status, steps = TrialStatus.FAILED, ()
        elif loss > 2:
            status, steps = TrialStatus.STOPPED, (10,)
        self.curves[str(number)] = [point(step, loss + 1 / step) for step in steps]
        self.records.append(record(number, settings, status))


def record(number: int, settings: dict[str, Any], status: TrialStatus, **more: Any) -> TrialResult:
    return TrialResult(
        trial_id=str(number),
        configuration_id=str(number),
        status=status,
        reason="told" if status.needs_reason else None,
        config=TrialConfig(**{**BASE, **settings}),
        repeat=0,
        seed=0,
        suggestion=Suggestion(number=number, settings=settings),
        **more,
    )


def played(algorithm: str, count: int) -> Play:
    play = Play(algorithm)
    for _ in range(count):
        play.end(play.suggest())
    return play


@pytest.fixture(scope="module", params=ALGORITHMS)
def life(request: pytest.FixtureRequest) -> Play:
    return played(request.param, 12)


def test_no_configuration_is_proposed_twice_and_no_excluded_one_at_all(life: Play) -> None:
    configs = [record.config for record in life.records]
    assert len(set(configs)) == len(configs)
    assert not any(is_excluded(config, EXCLUDE) for config in configs)


def test_a_setting_whose_condition_does_not_hold_is_not_proposed(life: Play) -> None:
    for one in life.records:
        assert one.suggestion is not None
        assert ("offload" in one.suggestion.settings) == (one.config.zero_stage > 1)


def test_after_a_resume_the_next_proposal_is_the_one_that_would_have_come(life: Play) -> None:
    # As read back from disk, in another order, by a search that remembers nothing.
    again = Play(life.algorithm)
    again.records = [TrialResult.model_validate_json(r.model_dump_json()) for r in reversed(life.records)]
    again.curves = life.curves
    assert again.suggest() == life.suggest()


def test_another_seed_proposes_something_else(life: Play) -> None:
    other = Play(life.algorithm, seed=1)
    other.records, other.curves = life.records, life.curves
    assert other.suggest() != life.suggest()


def test_while_a_trial_runs_the_next_proposal_is_another(life: Play) -> None:
    waiting = Play(life.algorithm)
    first = life.suggest()
    waiting.records = [*life.records, record(len(life.records), first, TrialStatus.RUNNING)]
    waiting.curves = life.curves
    assert waiting.suggest() != first


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_space_that_is_used_up_ends_the_search(algorithm: str) -> None:
    space = domains(Space.model_validate({"rank": [4, 8]}))
    known = []
    while (settings := next_settings(algorithm, space, {}, [], (), known, 0)) is not None:
        known.append(Observation(len(known), settings, Standing.WHOLE, (((10, 1.0 + len(known)),),)))
    assert sorted(one.settings["rank"] for one in known) == [4, 8]


def test_points_come_first_and_what_they_leave_open_stands_in_the_middle() -> None:
    points = ({"rank": 128}, {"rank": 8})
    first = next_settings("tpe", SPACE, BASE, [], points, (), 0)
    assert first is not None
    assert first["rank"] == 128
    assert first["learning_rate"] == pytest.approx(math.sqrt(1e-5 * 1e-2))
    second = next_settings("tpe", SPACE, BASE, [], points, [Observation(0, first, Standing.OPEN)], 0)
    assert second is not None
    assert second["rank"] == 8


def test_where_nobody_says_what_to_try_first_it_is_the_middle_of_the_space() -> None:
    space = domains(Space.model_validate({"rank": [2, 4, 8], "learning_rate": {"log_uniform": [1e-5, 1e-3]}}))
    first = next_settings("tpe", space, {}, [], FIRST, [], 0)
    assert first == {"rank": 4, "learning_rate": pytest.approx(1e-4)}


def test_what_was_tried_already_gives_way_to_its_nearest_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    space = domains(Space.model_validate({"rank": [2, 4, 8, 16, 32, 64], "lora_dropout": [0.0, 0.1, 0.2]}))
    wanted = {"rank": 16, "lora_dropout": 0.0}
    monkeypatch.setattr(suggest, "proposer", lambda *_: lambda attempt: wanted)
    tried = [wanted, {"rank": 8, "lora_dropout": 0.0}]
    known = [Observation(number, settings, Standing.OPEN) for number, settings in enumerate(tried)]
    assert next_settings("tpe", space, {}, [], (), known, 0) == {"rank": 32, "lora_dropout": 0.0}


def test_of_two_configurations_unordered_values_are_a_whole_axis_apart() -> None:
    space = domains(Space.model_validate({"rank": [2, 4, 8, 16], "precision": ["bf16", "int8", "nf4"]}))
    axes = axes_of(space)
    assert distance(axes, {"rank": 2, "precision": "bf16"}, {"rank": 4, "precision": "bf16"}) == pytest.approx(0.25)
    assert distance(axes, {"rank": 2, "precision": "bf16"}, {"rank": 2, "precision": "int8"}) == 1.0


def test_tpe_leaves_what_is_refused_and_comes_near_to_the_best() -> None:
    play = played("tpe", 40)
    late = play.records[25:]
    refused = sum(one.status in (TrialStatus.INFEASIBLE, TrialStatus.OUT_OF_MEMORY) for one in late)
    # By chance, 5 of 9 combinations of rank and stage are.
    assert refused <= len(late) / 3
    assert min(abs(math.log10(one.config.learning_rate) + 3) for one in late) < 0.1


def test_every_place_of_a_space_leads_back_to_itself() -> None:
    axes = axes_of(SPACE)
    for units in ((0.0, 0.0, 0.0, 0.0), (0.4, 0.5, 0.9, 0.3), (1.0, 1.0, 1.0, 1.0)):
        settings = settings_at(axes, BASE, units)
        assert settings_at(axes, BASE, places_of(axes, settings)) == settings


def test_memory_is_told_as_need_over_room_and_a_trial_that_ran_out_as_more_than_there_is() -> None:
    def told(status: TrialStatus, predicted: int, measured: int | None = None) -> float:
        memory = PeakMemory(predicted_bytes=predicted, measured_bytes=measured, available_bytes=100, kind="resident")
        return dict(constraints_of([record(0, {"rank": 8}, status, peak_memory=memory)]))["fits"]

    assert told(TrialStatus.INFEASIBLE, 200) == pytest.approx(math.log(2))
    # On a GPU the record's figure leaves out what the refusal counts besides.
    assert told(TrialStatus.INFEASIBLE, 99) > 0
    assert told(TrialStatus.COMPLETED, 200, 50) == pytest.approx(-math.log(2))
    assert told(TrialStatus.OUT_OF_MEMORY, 50) > 0


def test_a_configuration_waits_for_all_its_repeats_and_is_their_mean() -> None:
    settings = {"rank": 8, "learning_rate": 1e-3}
    repeats = [record(0, settings, status) for status in (TrialStatus.COMPLETED, TrialStatus.RUNNING)]
    curves = iter([[point(10, 1.0)], [point(10, 3.0)]])
    assert observe(repeats, [GOAL], lambda _: [])[0].standing is Standing.OPEN
    ended = [repeats[0], repeats[0]]
    (one,) = observe(ended, [GOAL], lambda _: next(curves))
    assert one.curves == (((10, 2.0),),)


def test_configurations_are_compared_at_the_highest_step_that_enough_have_reached() -> None:
    def at(steps: int) -> Observation:
        return Observation(0, {}, Standing.PARTIAL, (((steps, 1.0),),))

    assert common_step([at(10), at(10), at(10), at(30), at(90)], dimensions=1) == 10
    assert common_step([at(10), at(30), at(30), at(90)], dimensions=1) == 30
    assert common_step([at(10), at(90)], dimensions=4) == 10


def test_in_a_generation_who_went_further_stands_before_who_was_stopped_and_refused_ones_come_last() -> None:
    whole = Observation(0, {}, Standing.WHOLE, (((90, 2.0),),))
    stopped = Observation(1, {}, Standing.PARTIAL, (((30, 1.0),),))
    refused = Observation(2, {}, Standing.REFUSED, (), (("fits", 0.5),))
    assert sorted([refused, stopped, whole], key=rank) == [whole, stopped, refused]


def test_what_was_stopped_is_carried_on_like_the_others_and_keeps_its_place() -> None:
    def at(number: int, *values: float) -> Observation:
        curve = tuple((10 * place, value) for place, value in enumerate(values, 1))
        return Observation(number, {}, Standing.PARTIAL, (curve,))

    whole = [at(0, 5.0, 4.0, 3.0), at(1, 6.0, 4.5, 4.0), at(2, 9.0, 8.5, 8.0)]
    stopped = at(3, 7.0, 5.0)
    known = [*whole, stopped]
    assert values_at(known, stopped, 30) == (4.5,)
    assert values_at(known, whole[1], 30) == (4.0,)
    assert values_at(known, whole[1], 5) is None
    assert values_at([stopped], stopped, 30) is None


def test_the_middle_of_a_range_is_the_number_that_a_person_writes_and_is_not_tried_twice() -> None:
    space = domains(Space.model_validate({"rank": [2, 4], "learning_rate": {"log_uniform": [1e-4, 1e-2]}}))
    points = ({"rank": 2}, {"rank": 2, "learning_rate": 0.001}, {"rank": 4})
    first = next_settings("tpe", space, BASE, [], points, (), 0)
    assert first == points[1]
    assert next_settings("tpe", space, BASE, [], points, [Observation(0, first, Standing.OPEN)], 0) == {
        "rank": 4,
        "learning_rate": 0.001,
    }


@pytest.mark.parametrize("kind", ["uniform", "log_uniform"])
def test_no_place_of_a_range_lies_beyond_its_ends(kind: str) -> None:
    low, high = 1e-4 / 3, 2e-4 / 3
    (axis,) = axes_of(domains(Space.model_validate({"learning_rate": {kind: [low, high]}})))
    assert all(low <= axis.at(place / 1000) <= high for place in range(1001))
    # An older record may have more digits.
    assert axis.at(axis.place(0.00004 + 1e-19)) == 0.00004
