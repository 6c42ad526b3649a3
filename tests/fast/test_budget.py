from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from pydantic import ValidationError

from orchestrator.config.sweep_config import BudgetConfig
from orchestrator.planning.budget import cost, exhausted, shortfalls
from orchestrator.planning.step_time import Range

NEEDED = Range(1.0, 2.0, 4.0)


def test_a_plan_that_the_budget_holds_even_at_worst_is_not_warned_of() -> None:
    assert shortfalls(BudgetConfig(hours=4, gpu_hours=4), NEEDED, NEEDED) == ()
    assert shortfalls(BudgetConfig(), NEEDED, NEEDED) == ()


def test_what_will_not_fit_is_told_from_what_may_not() -> None:
    (will,) = shortfalls(BudgetConfig(hours=1.5), NEEDED, NEEDED)
    (may,) = shortfalls(BudgetConfig(gpu_hours=3), NEEDED, NEEDED)
    assert will.startswith("the sweep takes about 2 hours, and budget.hours is 1.5: it will end before")
    assert may == "the sweep may take up to 4 GPU-hours, and budget.gpu_hours is 3"


def test_a_limit_is_exhausted_once_it_is_reached() -> None:
    limits = BudgetConfig(hours=2, gpu_hours=8)
    assert exhausted(limits, hours=1.9, gpu_hours=7.9) is None
    assert exhausted(limits, hours=2.0, gpu_hours=7.9) == "budget.hours"
    assert exhausted(limits, hours=1.9, gpu_hours=8.0) == "budget.gpu_hours"
    assert exhausted(BudgetConfig(), hours=1e9, gpu_hours=1e9) is None


def test_money_is_a_limit_like_the_others() -> None:
    limits = BudgetConfig(cost=5, price_per_gpu_hour=2)
    (will,) = shortfalls(BudgetConfig(cost=3, price_per_gpu_hour=2), NEEDED, NEEDED)
    (may,) = shortfalls(limits, NEEDED, NEEDED)
    assert will.startswith("the sweep costs about 4, and budget.cost is 3: it will end before")
    assert may == "the sweep may cost up to 8, and budget.cost is 5"
    assert exhausted(limits, hours=9, gpu_hours=2.4) is None
    assert exhausted(limits, hours=9, gpu_hours=2.5) == "budget.cost"
    with pytest.raises(ValidationError, match="cost needs price_per_gpu_hour"):
        BudgetConfig(cost=5)


def test_there_is_no_cost_without_a_price() -> None:
    assert cost(BudgetConfig(), 3.0) is None
    assert cost(BudgetConfig(price_per_gpu_hour=2.5), 3.0) == 7.5
    assert cost(BudgetConfig(price_per_gpu_hour=0), 3.0) == 0


@pytest.mark.parametrize(
    ("budget", "mend"),
    [
        (
            {"hours": 2},
            "budget.hours is used up: run the same command again to go on for as long, or raise it",
        ),
        ({"gpu_hours": 1}, "budget.gpu_hours is used up: raise it and run the same command again to go on"),
    ],
)
def test_a_limit_that_ends_a_sweep_says_whether_it_must_be_raised(
    budget: dict[str, float], mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours are counted anew in each run, GPU-hours over all of them."""
    pytest.importorskip("ray")
    from orchestrator.sweep import stopper as module

    clock = SimpleNamespace(monotonic=lambda: 100.0)
    monkeypatch.setattr(module, "time", clock)
    stopper = module.Stopper(MagicMock(), BudgetConfig(**budget), lambda: 2.0, lambda: None)
    clock.monotonic = lambda: 100.0 + 2 * 3600
    assert stopper.stop_all()
    assert stopper.reason == mend
