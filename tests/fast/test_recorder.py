from __future__ import annotations

import pickle

import pytest

pytest.importorskip("ray")

from ray.tune.experiment import Trial

from orchestrator.sweep.recorder import ForgetResults


def test_tune_keeps_of_a_trials_results_only_where_they_came_from() -> None:
    trial = Trial("sweep", stub=True)
    sizes = []
    for iteration in range(1, 40):
        result = {
            "progress": ["a curve"] * 1000,
            "trial_config": object(),
            "done": iteration == 39,
            "training_iteration": iteration,
            "time_total_s": 1.0 * iteration,
            "trial_id": "t-0",
            "pid": 1,
            "node_ip": "127.0.0.1",
        }
        ForgetResults().on_trial_result(iteration, [trial], trial, result)
        trial.update_last_result(result)
        sizes.append(len(pickle.dumps(trial.run_metadata)))
    assert trial.last_result == {"done": True, "trial_id": "t-0", "pid": 1, "node_ip": "127.0.0.1"}
    assert set(trial.run_metadata.metric_analysis) == {"done"}
    assert max(sizes) < 2 * min(sizes)

    trial.config = {"trial_id": "t-0", "task": ["settings"] * 1000}
    ForgetResults().on_trial_complete(40, [trial], trial)
    assert trial.config == {"trial_id": "t-0"}
