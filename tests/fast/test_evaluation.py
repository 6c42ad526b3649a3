"""The evaluation after the last trial, cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.sweep import evaluation
from orchestrator.sweep.worker import GroupShape
from tests.made_up_sweep import made_up_sweep, made_up_trial, write_made_up


class CutShort:
    """A cluster on which whoever waits for an answer is interrupted."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def remote(self, **options: Any) -> Any:
        cluster = self

        class Remote:
            def __init__(self, function: Any) -> None: ...

            def remote(self, task: Any, model: str) -> str:
                return f"{task.trial_id} on {cluster}"

        return Remote

    def wait(self, waiting: list[str], num_returns: int) -> Any:
        raise KeyboardInterrupt

    def cancel(self, task: str, force: bool) -> None:
        self.cancelled.append(task)


def test_an_interrupted_evaluation_says_that_it_did_not_come_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = made_up_sweep([made_up_trial({"rank": rank}).model_copy(update={"adapter": "adapter"}) for rank in (2, 4)])
    folder = write_made_up(tmp_path, result)
    raw: dict[str, Any] = {"name": "a", "model": "builtin:tiny-llama", "data": {"train": "builtin:python-docs"}}
    sweep = SweepConfig.model_validate({**raw, "evaluate": {"prompts": ["def"], "trials": "all"}})
    said: list[str] = []
    cluster = CutShort()
    monkeypatch.setattr(evaluation, "ray", cluster)
    assert not evaluation.evaluate(sweep, result, GroupShape(1, 0, 1), folder, said.append)
    assert len(cluster.cancelled) == 2
    assert "evaluation was interrupted: run the same command again to have the rest" in said
    asked_nothing = SweepConfig.model_validate(raw)
    assert evaluation.evaluate(asked_nothing, result, GroupShape(1, 0, 1), folder, said.append)
