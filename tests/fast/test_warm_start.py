"""What an adaptive search takes over from trials that it did not propose."""

from __future__ import annotations

from orchestrator.config.search_space import Space, domains
from orchestrator.results.records import TrialStatus
from orchestrator.search.observation import Goal, Observation, Standing
from orchestrator.search.suggest import next_settings
from orchestrator.search.warm_start import BEST, best_settings, learned
from tests.made_up_sweep import made_up_trial

SPACE = domains(Space.model_validate({"rank": [4, 8, 16, 32], "learning_rate": {"log_uniform": [1e-5, 1e-2]}}))
BASE = {"max_steps": 100}
GOAL = Goal("eval_loss", "min")


def trial(rank: int, loss: float, rate: float = 1e-3, **settings: object):
    return made_up_trial({**BASE, "rank": rank, "learning_rate": rate, **settings}, objective=loss)


def taught(records: list) -> tuple[Observation, ...]:
    by_id = {record.trial_id: record for record in records}
    return learned(records, SPACE, BASE, [GOAL], lambda i: [by_id[i].best] if by_id[i].best else [], {})


def test_trials_with_the_same_shared_settings_are_observations_and_others_are_not() -> None:
    found = taught([trial(8, 2.0), trial(16, 1.9, weight_decay=0.1), trial(64, 1.8), trial(8, 1.0, 0.5)])
    assert [one.settings for one in found] == [{"rank": 8, "learning_rate": 1e-3}]
    assert found[0].standing is Standing.WHOLE
    assert found[0].number == -1


def test_the_best_completed_settings_are_tried_first_as_far_as_they_are_searched() -> None:
    records = [trial(rank, loss) for rank, loss in ((4, 2.0), (8, 1.7), (16, 1.8), (32, 1.9), (64, 1.0))]
    best = best_settings(records, SPACE, BASE, GOAL)
    assert [one["rank"] for one in best] == [8, 16, 32]
    assert len(best) == BEST
    refused = made_up_trial({"rank": 8}, status=TrialStatus.INFEASIBLE)
    assert best_settings([refused], SPACE, BASE, GOAL) == ()


def test_a_search_that_was_taught_asks_its_model_at_once_and_may_try_the_best_again() -> None:
    warm = taught([trial(rank, 1 + abs(i - 3), 10**-i) for rank in (4, 8) for i in (2.2, 3, 4, 4.8)])
    cold = next_settings("tpe", SPACE, BASE, [], (), (), 0)
    assert next_settings("tpe", SPACE, BASE, [], (), (), 0, warm) != cold
    again = {"rank": 8, "learning_rate": 1e-3}
    assert next_settings("tpe", SPACE, BASE, [], (again,), (), 0, warm) == again


def test_what_a_grid_ran_in_the_same_folder_is_not_proposed_again() -> None:
    known = taught([trial(8, 2.0)])
    again = {"rank": 8, "learning_rate": 1e-3}
    assert next_settings("tpe", SPACE, BASE, [], (again,), known, 0) != again
