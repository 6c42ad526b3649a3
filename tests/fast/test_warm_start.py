"""What an adaptive search takes over from trials that it did not propose."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config.search_space import Space, domains
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.errors import FolderError
from orchestrator.results.records import Timing, TrialStatus
from orchestrator.search.observation import Goal, Observation, Standing
from orchestrator.search.suggest import next_settings
from orchestrator.search.warm_start import BEST, LIGHTER, best_settings, learned, of_another_model
from tests.made_up_sweep import made_up_sweep, made_up_trial, write_made_up

pytest.importorskip("ray")

from orchestrator.sweep.lesson import lesson_of
from orchestrator.sweep.suggestions import goals, to_try_first

SPACE = domains(Space.model_validate({"rank": [4, 8, 16, 32], "learning_rate": {"log_uniform": [1e-5, 1e-2]}}))
BASE = {"max_steps": 100}
GOAL = Goal("eval_loss", "min")


def trial(rank: int, loss: float, rate: float = 1e-3, step_time_s: float = 0.5, **settings: object):
    settings = {**BASE, "rank": rank, "learning_rate": rate, **settings}
    return made_up_trial(settings, objective=loss, step_time_s=step_time_s)


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
    best = best_settings(records, SPACE, BASE, GOAL, {})
    assert [one["rank"] for one in best] == [8, 16, 32]
    assert len(best) == BEST
    refused = made_up_trial({"rank": 8}, status=TrialStatus.INFEASIBLE)
    assert best_settings([refused], SPACE, BASE, GOAL, {}) == ()


def test_a_search_that_was_taught_asks_its_model_at_once_and_may_try_the_best_again() -> None:
    warm = taught([trial(rank, 1 + abs(i - 3), 10**-i) for rank in (4, 8) for i in (2.2, 3, 4, 4.8)])
    cold = next_settings("tpe", SPACE, BASE, [], (), (), 0)
    assert next_settings("tpe", SPACE, BASE, [], (), (), 0, warm) != cold
    again = {"rank": 8, "learning_rate": 1e-3}
    assert next_settings("tpe", SPACE, BASE, [], (again,), (), 0, warm) == again


def test_of_equal_configurations_the_cheapest_is_tried_first() -> None:
    dear, cheap = (trial(rank, 2.0, step_time_s=seconds) for rank, seconds in ((4, 2.0), (32, 0.1)))
    timed = [r.model_copy(update={"timing": Timing(total_s=100 * (r.step_time_s or 0))}) for r in (dear, cheap)]
    assert [one["rank"] for one in best_settings(timed, SPACE, BASE, GOAL, {})] == [32, 4]


def seen(number: int, rate: float, loss: float, standing: Standing = Standing.WHOLE) -> Observation:
    curves = (((50, loss + 0.5), (100, loss)),) if standing is not Standing.REFUSED else ()
    return Observation(number, {"rank": 8, "learning_rate": rate}, standing, curves)


def test_another_models_results_count_less_and_are_told_on_this_models_scale() -> None:
    foreign = [seen(-1 - n, 10.0**-n, 3.0 + (n - 5) ** 2) for n in range(2, 11)]
    foreign.append(seen(-20, 0.5, 0.0, Standing.REFUSED))
    alone = of_another_model(foreign, ())
    assert len(alone) == len(foreign) // LIGHTER
    assert alone[0].settings["learning_rate"] == 1e-5, "the best is among them"
    assert all(one.standing is Standing.WHOLE for one in alone), "what did not fit there says nothing of here"
    # The same settings came to 10 more here.
    own = [seen(0, 1e-5, 13.0), seen(1, 3e-5, 12.5)]
    shifted = of_another_model(foreign, own)
    assert shifted[0].curves[0] == ((50, 13.5), (100, 13.0))
    # Where nothing was tried in both, the best stand on each other.
    assert of_another_model(foreign, own[1:])[0].curves[0][-1] == (100, 12.5)
    much = [seen(n, 1.1e-5 * (n + 1), 14.0) for n in range(30)]
    assert len(of_another_model(foreign, much)) < len(alone)


def test_the_same_settings_in_another_sweep_are_the_same_though_a_record_spells_them_otherwise() -> None:
    modules = [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj",)]
    foreign = [
        Observation(-1 - n, {"target_modules": names, "alpha": 8.0}, Standing.WHOLE, (((10, 3.0 + n / 10),),))
        for n, names in enumerate(modules)
    ]
    own = [
        Observation(n, {"target_modules": list(names), "alpha": 8}, Standing.WHOLE, (((10, loss),),))
        for n, (names, loss) in enumerate(zip(modules, (2.5, 2.0, 2.9), strict=True))
    ]
    # By 0.5, 1.1 and 0.3 less than there.
    assert of_another_model(foreign, own)[0].curves == (((10, pytest.approx(2.5)),),)


def test_what_a_grid_ran_in_the_same_folder_is_not_proposed_again() -> None:
    known = taught([trial(8, 2.0)])
    again = {"rank": 8, "learning_rate": 1e-3}
    assert next_settings("tpe", SPACE, BASE, [], (again,), known, 0) != again


@pytest.mark.parametrize(
    ("model", "data_hash", "sweep_file", "known", "told"),
    [
        ("m", "h", True, 7, "warm start: 7 configurations of"),
        ("m", "other", True, 0, "no more is learned: its data is other"),
        # Another tokenizer has another hash: the sweep file says that the text was the same.
        ("larger", "other", True, 7, "of which one of 3 counts: it trained larger"),
        ("larger", "other", False, 0, "no more is learned: its data is other"),
        ("larger", "h", False, 7, "of which one of 3 counts: it trained larger"),
    ],
)
def test_what_is_learned_of_another_sweep_is_told(
    tmp_path: Path, model: str, data_hash: str, sweep_file: bool, known: int, told: str
) -> None:
    rates = [10**-place for place in (1.5, 2, 2.5, 3, 3.5, 4, 4.5)]
    trials = [trial(8, 2 + (math.log10(rate) + 3) ** 2, rate) for rate in rates]
    folder = write_made_up(tmp_path / "earlier", made_up_sweep(trials, model=model, data_hash=data_hash))
    raw = {"name": "a", "model": "m", "data": {"train": "t"}, "trial": BASE, "budget": {"trials": 4}}
    if sweep_file:
        folder.sweep_file.write_text(yaml.safe_dump({**raw, "model": model}))
    search = {"algorithm": "tpe", "warm_start": str(folder.root)}
    space = {"rank": [8, 16], "learning_rate": {"log_uniform": [1e-5, 1]}}
    sweep = SweepConfig.model_validate({**raw, "search": search, "space": space})
    lesson = lesson_of(sweep, "h", goals(sweep), {})
    assert len(lesson.observations) == known
    assert told in (lesson.told or "")
    assert len(lesson.beside(())) == (known if model == "m" else -(-known // LIGHTER))
    assert to_try_first(sweep)[0]["learning_rate"] == 1e-3, "the best is tried first whatever else is learned"


@pytest.mark.parametrize(("model", "first"), [("m", [8, 16]), ("larger", [4, 8, 16])])
def test_what_broke_a_constraint_is_not_tried_first_unless_it_was_of_another_model(
    tmp_path: Path, model: str, first: list[int]
) -> None:
    """The best loss took too much memory, in one of its two repeats."""
    ranks = ((4, 0, 2.0, 4), (4, 1, 2.0, 9), (8, 0, 2.1, 4), (16, 0, 2.2, 4))
    trials = [
        made_up_trial({**BASE, "rank": rank}, repeat, objective=loss, memory_bytes=gib * 2**30)
        for rank, repeat, loss, gib in ranks
    ]
    folder = write_made_up(tmp_path / "earlier", made_up_sweep(trials, model=model))
    raw = {"name": "a", "model": "m", "data": {"train": "t"}, "trial": BASE, "space": {"rank": [4, 8, 16]}}
    raw |= {"search": {"algorithm": "tpe", "warm_start": str(folder.root)}, "budget": {"trials": 4}}
    sweep = SweepConfig.model_validate({**raw, "constraints": ["peak_memory_bytes <= 8GiB"]})
    assert [settings["rank"] for settings in to_try_first(sweep)] == first


def test_a_sweep_that_would_warm_start_from_itself_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    search = {"algorithm": "tpe", "warm_start": str(tmp_path / "x" / ".." / "a")}
    raw = {"name": "a", "model": "builtin:tiny-llama", "data": {"train": "builtin:python-docs"}, "search": search}
    file.write_text(yaml.safe_dump({**raw, "space": {"rank": [8, 16]}, "budget": {"trials": 2}}))
    ended = CliRunner().invoke(app, ["run", str(file), "--storage", str(tmp_path)])
    assert ended.exit_code == 2
    assert "names this sweep's own folder" in ended.stderr
    assert not (tmp_path / "a").exists()


def test_a_plan_is_made_without_the_sweep_to_learn_from_and_says_what_run_refuses(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    search = {"algorithm": "tpe", "warm_start": str(tmp_path / "nowhere")}
    raw = {"name": "a", "model": "builtin:tiny-llama", "data": {"train": "builtin:python-docs"}, "search": search}
    raw |= {"space": {"rank": [8, 16]}, "budget": {"trials": 2}, "storage": str(tmp_path)}
    file.write_text(yaml.safe_dump(raw))
    planned, ended = (CliRunner().invoke(app, [command, str(file)]) for command in ("plan", "run"))
    told = f"search.warm_start: {tmp_path / 'nowhere'} holds no sweep: name a folder that `orchestrator run` made"
    assert planned.exit_code == 0
    assert told in " ".join(planned.stdout.split())
    assert (ended.exit_code, ended.stderr) == (2, f"error: {told}\n")


def test_a_warm_start_from_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    search = {"algorithm": "tpe", "warm_start": str(tmp_path)}
    raw = {"name": "a", "model": "m", "data": {"train": "t"}, "search": search}
    with pytest.raises(FolderError, match="holds no sweep: name a folder that"):
        lesson_of(SweepConfig.model_validate(raw), "h", [GOAL], {})
