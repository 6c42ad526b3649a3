"""What a sweep file may ask of a search, and what the plan says of one that proposes as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.axes import axes_of
from orchestrator.config.known_good import known_good
from orchestrator.config.search_space import Space, domains
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.sweep_file import load
from orchestrator.errors import SweepFileError
from orchestrator.planning.plan_table import render
from tests.fast.cases import A100
from tests.fast.test_plan import plan

SWEEP: dict[str, Any] = {
    "name": "a",
    "model": "builtin:tiny-llama",
    "data": {"train": "builtin:python-docs"},
    "space": {"rank": [8, 32], "precision": ["fp32", "bf16", "nf4"]},
    "budget": {"trials": 10},
}

PBT = {"population": 8, "interval_steps": 10}
EVALUATED = {"max_steps": 20, "eval_every": 10}


def problems(tmp_path: Path, **keys: Any) -> str:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(SWEEP | keys))
    with pytest.raises(SweepFileError) as caught:
        load(file)
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"search": {"algorithm": "tpee"}}, "did you mean tpe?"),
        ({"search": {"algorithm": "pbt"}}, "pbt needs its population"),
        ({"search": {"algorithm": "gp"}, "budget": {}}, "gp goes on until budget.trials"),
        (
            {"search": {"algorithm": "tpe"}, "space": {"max_steps": [10, 100], "rank": [4, 8]}},
            "space.max_steps: tpe compares trials at a step that all reach: put it under `trial:`",
        ),
        ({"search": {"algorithm": "gp"}, "space": {"eval_every": [1, 5], "rank": [4, 8]}}, "space.eval_every: gp"),
        ({"search": {"algorithm": "cma_es"}}, "space.precision: has no order, which cma_es needs"),
        ({"search": {"algorithm": "grid", "points": [{"rank": 8}]}}, "a grid tries every point anyway"),
        ({"search": {"algorithm": "tpe", "points": [{"rnk": 8}]}}, "did you mean rank?"),
        ({"search": {"algorithm": "tpe", "points": [{"rank": 9}]}}, "9 is none of those searched: 8, 32"),
        ({"search": {"algorithm": "grid"}, "space": {"rank": {"int": [1, 9]}}}, "a grid cannot walk"),
        ({"search": {"algorithm": "tpe", "points": ["known_good"]}}, "knows learning_rate and alpha: search one"),
        ({"search": {"algorithm": "tpe", "points": ["knwn_good"]}}, "did you mean known_good?"),
        (
            {"search": {"algorithm": "tpe", "points": "known_good"}},
            "search.points: takes a list, as `points: [known_good",
        ),
        (
            {"search": {"algorithm": "tpe", "points": {"rank": 8}}},
            "search.points: takes a list, as `points: [known_good",
        ),
        ({"evaluate": {"prompts": "Hello"}}, "evaluate.prompts: takes a list, not 'Hello'"),
        ({"objective": [{"metric": "loss"}, {"metric": "loss", "mode": "max"}]}, "names loss twice"),
        ({"objective": {"metric": "cost"}, "budget": {"price_per_gpu_hour": 2}}, "behind another objective"),
        ({"objective": [{"metric": "loss"}, {"metric": "cost"}]}, "name budget.price_per_gpu_hour, or use step_time_s"),
        (
            {"objective": [{"metric": "loss"}, {"metric": "cost"}], "budget": {"price_per_gpu_hour": 0}},
            "raise budget.price_per_gpu_hour above 0, or use step_time_s",
        ),
        ({"constraints": ["cost <= 3"]}, "name budget.price_per_gpu_hour, or use step_time_s"),
        ({"constraints": ["eval_loss <= 1", "eval_loss >= 2"]}, "constraints[1]: leaves no eval_loss between"),
        (
            {"space": {"learning_rate": [1e-4, 1e-3]}, "budget": {}, "scheduler": {"pbt": PBT}, "trial": EVALUATED},
            "scheduler.pbt.population: is more than the 2 configurations that there are",
        ),
        ({"constraints": "cost <= 3"}, "constraints: takes a list, as `constraints: [peak_memory_bytes <= 24GiB]`"),
    ],
    ids=str,
)
def test_a_search_that_cannot_be_meant_is_refused_with_the_mend(
    tmp_path: Path, keys: dict[str, Any], told: str
) -> None:
    assert told in problems(tmp_path, **keys)


WITH_CONDITION = {
    "rank": [8, 32],
    "precision": ["bf16", "nf4"],
    "lora_dropout": {"choice": [0.0, 0.1], "when": {"rank": 32}},
}


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
@pytest.mark.parametrize(
    ("point", "told"),
    [
        (
            {"rank": 8, "precision": "bf16", "lora_dropout": 0.1},
            "search.points[1].lora_dropout: is searched only where its `when` holds ({'rank': 32}), and not in this",
        ),
        ({"rank": 32, "precision": "nf4"}, "search.points[1]: is excluded by exclude[1]"),
        # The middle of its precisions.
        ({"rank": 32}, "search.points[1]: is excluded by exclude[1], with what it leaves open"),
    ],
    ids=str,
)
def test_a_point_that_cannot_be_tried_as_it_is_written_is_refused_with_its_line(
    tmp_path: Path, algorithm: str, point: dict[str, Any], told: str
) -> None:
    exclude = [{"rank": 8, "precision": "nf4"}, {"rank": 32, "precision": "nf4"}]
    keys = {"space": WITH_CONDITION, "exclude": exclude, "budget": {"trials": 3}}
    fine = {"rank": 32, "precision": "bf16", "lora_dropout": 0.1}
    refusal = problems(tmp_path, **keys, search={"algorithm": algorithm, "points": [fine, point]})
    assert told in refusal
    assert len(refusal.splitlines()) == 1
    assert refusal.startswith(f"{tmp_path / 'sweep.yaml'}:"), "with its line"


def test_a_point_whose_condition_hangs_on_the_hardware_is_judged_there(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    space = {"rank": [8, 32], "lora_dropout": {"choice": [0.0, 0.1], "when": {"precision": "fp32"}}}
    search = {"algorithm": "tpe", "points": [{"rank": 8, "lora_dropout": 0.1}]}
    file.write_text(yaml.safe_dump(SWEEP | {"space": space, "search": search, "budget": {"trials": 3}}))
    assert load(file).on_hardware(has_gpus=False).points == ({"rank": 8, "lora_dropout": 0.1},)


def test_what_the_field_begins_with_is_tried_first_for_a_middle_a_low_and_a_high_rank(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    rates = [1e-5, 5e-5, 2e-4, 1e-3]
    space = {"rank": [4, 16, 256], "alpha": ["2x", 8], "learning_rate": rates}
    search = {"algorithm": "random", "points": ["known_good", {"rank": 4, "alpha": 8}]}
    file.write_text(yaml.safe_dump(SWEEP | {"space": space, "search": search, "budget": {"trials": 6}}))
    found = [(one.config.rank, one.config.alpha, one.config.learning_rate) for one in load(file).trials()]
    assert found[:4] == [(16, "2x", 2e-4), (4, "2x", 2e-4), (256, "2x", 5e-5), (4, 8, 2e-4)]


def test_which_of_the_known_good_points_exclude_names_is_known() -> None:
    space = {"rank": [4, 16, 256], "learning_rate": [2e-4, 1e-3]}
    points = {"algorithm": "random", "points": ["known_good"]}
    sweep = SweepConfig.model_validate(SWEEP | {"space": space, "search": points, "exclude": [{"rank": [4, 256]}]})
    assert sweep.excluded_points == ({"rank": 4, "learning_rate": 2e-4}, {"rank": 256, "learning_rate": 2e-4})
    assert {one.config.rank for one in sweep.trials()} == {16}


def test_known_good_values_keep_to_their_ranges() -> None:
    space = {"rank": ["full", 8], "alpha": {"uniform": [1, 10]}, "learning_rate": {"log_uniform": [1e-4, 1e-3]}}
    adapter, full = known_good(axes_of(domains(Space.model_validate(space))), {})
    assert adapter == {"rank": 8, "alpha": 10, "learning_rate": pytest.approx(2e-4 * 2**0.5)}
    assert (full["rank"], full["learning_rate"]) == ("full", 1e-4)
    alone = known_good(axes_of(domains(Space.model_validate({"alpha": [8, 32, 128]}))), {"rank": 64})
    assert alone == ({"alpha": 128},)


def test_random_search_tries_its_points_first(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    search = {"algorithm": "random", "points": [{"rank": 32, "precision": "nf4"}]}
    file.write_text(yaml.safe_dump(SWEEP | {"search": search, "budget": {"trials": 3}}))
    trials = load(file).trials()
    assert (trials[0].config.rank, trials[0].config.precision) == (32, "nf4")
    assert len(trials) == 3


def test_the_plan_of_an_adaptive_search_says_that_its_trials_are_examples() -> None:
    found = plan(A100, space=SWEEP["space"], search={"algorithm": "tpe"}, budget={"trials": 4})
    assert found.proposed_by == "tpe"
    assert found.launches == 4
    told = render(found)
    assert "tpe proposes one configuration after the other" in told
    assert "up to 4 trials" in told


def test_lengths_may_be_searched_by_what_does_not_learn(tmp_path: Path) -> None:
    for algorithm in ("grid", "random"):
        file = tmp_path / f"{algorithm}.yaml"
        file.write_text(yaml.safe_dump(SWEEP | {"search": {"algorithm": algorithm}, "space": {"max_steps": [10, 100]}}))
        assert len(load(file).trials()) == 2
