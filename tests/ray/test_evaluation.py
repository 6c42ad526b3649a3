"""What trained models are asked at the end of a real sweep, and a score that decides what loss alone would not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.sweep_config import EvaluateConfig
from orchestrator.results.evaluation import Evaluation, read_evaluation, write_evaluation
from tests.ray.sweeps import start
from tests.webhook import webhook

pytestmark = pytest.mark.timeout(600)
PROMPT = "def open_<list>(list):\n"


def test_prompts_are_answered_the_webhook_is_told_and_a_score_may_decide_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate: dict[str, Any] = {"prompts": [PROMPT], "max_new_tokens": 4, "trials": "all"}
    space = {"rank": [2, 8]}
    with webhook() as (url, told):
        run = start(tmp_path, "--notify", url, space=space, evaluate=evaluate)
        exit_code, out, err = run.wait()
    assert exit_code == 0, err
    (body,) = told
    assert body["status"] == "completed"
    assert body["answer"] in out
    page = run.folder.report.read_text()
    assert "def open_&lt;list&gt;(list):" in page
    by_loss = {trial_id: trial.best.eval_loss for trial_id, trial in run.trials().items() if trial.best}
    assert len(by_loss) == 2
    for trial_id in by_loss:
        found = read_evaluation(run.folder.trial(trial_id))
        assert found is not None
        assert [sample.prompt for sample in found.samples] == [PROMPT]

    # What has a score is not evaluated again, so that lm-eval has to be there and is not asked.
    (tmp_path / "packages" / "lm_eval").mkdir(parents=True)
    (tmp_path / "packages" / "lm_eval" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'packages'}:{Path.cwd()}")
    asked = {**evaluate, "tasks": ["tiny"]}
    worst = max(by_loss, key=lambda trial_id: by_loss[trial_id])
    for trial_id in by_loss:
        scores = {"tiny/acc": 0.75 if trial_id == worst else 0.5}
        write_evaluation(
            run.folder.trial(trial_id), Evaluation(asked=EvaluateConfig(**asked), scores=scores, seconds=1.0)
        )
    took = run.sweep().started_ms, run.sweep().ended_ms
    again = start(tmp_path, space=space, evaluate=asked, objective={"metric": "tiny/acc", "mode": "max"})
    exit_code, out, err = again.wait()
    assert exit_code == 0, err
    # It trained nothing, and so adds nothing to the time that the sweep took.
    assert (again.sweep().started_ms, again.sweep().ended_ms) == took
    assert again.trials()[worst].scores == {"tiny/acc": 0.75}
    assert "best tiny/acc (0.7500)" in out
    assert f"trials/{worst}/adapter" in out
