from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import search_space
from orchestrator.config.search_space import Space, configuration_id, domains, grid, make_trials, sample
from orchestrator.config.trial_config import TrialConfig, micro_batches_per_step


def space(**settings: Any) -> dict[str, Any]:
    return domains(Space.model_validate(settings))


def test_a_grid_is_every_combination_in_order() -> None:
    found = grid({"max_steps": 7}, space(rank=[8, 128], dora=[False, True]), [])
    assert [(c.rank, c.dora, c.max_steps) for c in found] == [
        (8, False, 7),
        (8, True, 7),
        (128, False, 7),
        (128, True, 7),
    ]


def test_a_conditional_setting_is_searched_only_where_its_condition_holds() -> None:
    searched = space(
        engine=["ddp", "deepspeed"],
        zero_stage={"choice": [1, 2, 3], "when": {"engine": "deepspeed"}},
        offload={"choice": ["none", "optimizer"], "when": {"zero_stage": [2, 3]}},
    )
    found = [(c.engine, c.zero_stage, c.offload) for c in grid({}, searched, [])]
    assert found == [
        ("ddp", 0, "none"),
        ("deepspeed", 1, "none"),
        ("deepspeed", 2, "none"),
        ("deepspeed", 2, "optimizer"),
        ("deepspeed", 3, "none"),
        ("deepspeed", 3, "optimizer"),
    ]


@pytest.mark.parametrize("setting", ["weight_decay", "lora_dropout"])
def test_zero_with_a_sign_is_the_same_configuration_as_without(setting: str) -> None:
    (config,) = grid({}, space(**{setting: [0, -0.0, 0.0]}), [])
    assert configuration_id(config) == configuration_id(TrialConfig.model_validate({setting: 0}))
    assert grid({}, space(**{setting: [-0.0]}), []) == (config,)
    assert configuration_id(TrialConfig.model_validate({setting: -0.0})) == configuration_id(config)


def test_an_excluded_configuration_does_not_run() -> None:
    searched = space(precision=["bf16", "nf4"], zero_stage=[2, 3])
    found = grid({}, searched, [{"precision": "nf4", "zero_stage": 3}])
    assert ("nf4", 3) not in [(c.precision, c.zero_stage) for c in found]
    assert len(found) == 3


def test_conditions_that_wait_for_each_other_are_refused() -> None:
    searched = space(
        dora={"choice": [True], "when": {"rslora": True}}, rslora={"choice": [True], "when": {"dora": True}}
    )
    with pytest.raises(ValueError, match="wait for each other"):
        grid({}, searched, [])


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_random_search_draws_distinct_values_in_their_ranges_and_the_same_for_the_same_seed(seed: int) -> None:
    searched = space(rank={"log_int": [4, 64]}, learning_rate={"log_uniform": [1e-5, 1e-3]}, dora=[True, False])
    found = sample({}, searched, [], 8, seed)
    assert found == sample({}, searched, [], 8, seed)
    assert len({configuration_id(config) for config in found}) == 8
    assert all(4 <= config.rank <= 64 and 1e-5 <= config.learning_rate <= 1e-3 for config in found)


def test_random_search_over_a_small_space_ends() -> None:
    assert len(sample({}, space(dora=[True, False]), [], 10, 0)) == 2


def test_random_search_ends_soon_where_nothing_new_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_space, "MOST_IN_VAIN", 20)
    searched = space(learning_rate={"log_uniform": [1e-5, 1e-3]}, rank={"int": [1, 3]})
    # 100 million draws otherwise.
    assert sample({}, searched, [{"rank": [1, 2, 3]}], 10**6, 0) == ()
    assert len(sample({}, space(rank={"int": [1, 3]}), [], 10**6, 0)) == 3


def test_repeats_share_their_seeds_over_configurations_and_come_after_all_first_runs() -> None:
    trials = make_trials(grid({"seed": 5}, space(rank=[8, 16]), []), repeats=2)
    assert [(t.config.rank, t.config.seed, t.repeat) for t in trials] == [(8, 5, 0), (16, 5, 0), (8, 6, 1), (16, 6, 1)]
    assert len({t.trial_id for t in trials}) == 4


def test_a_trial_keeps_its_name_when_the_space_grows() -> None:
    small = {t.trial_id for t in make_trials(grid({}, space(rank=[8]), []), 1)}
    large = {t.trial_id for t in make_trials(grid({}, space(rank=[4, 8, 16]), []), 2)}
    assert small < large


def test_alpha_follows_the_rank_where_it_is_a_multiple() -> None:
    assert TrialConfig(rank=8).lora_alpha == 16
    assert TrialConfig(rank=8, alpha="0.5x").lora_alpha == 4
    assert TrialConfig(rank=8, alpha=32).lora_alpha == 32


def test_accumulation_follows_from_the_global_batch_and_must_divide() -> None:
    assert micro_batches_per_step(TrialConfig(global_batch_size=16, micro_batch_size=2), workers=4) == 2
    with pytest.raises(ValueError, match="no multiple"):
        micro_batches_per_step(TrialConfig(global_batch_size=16, micro_batch_size=3), workers=2)
