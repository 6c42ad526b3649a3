"""A node on which every worker dies, beside one that is well."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from orchestrator.results.records import TrialStatus
from tests.ray.clusters import joined_node, started_head
from tests.ray.sweeps import command_of, start
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(600)
LIMIT_S = 200.0


def workers() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if "RayTrainWorker" in command_of(one)]


def one_that_trains(but: set[int]) -> psutil.Process:
    def look() -> list[psutil.Process]:
        # Its template, and the trial's process below that.
        return [one for one in workers() if one.pid not in but and len(one.children(recursive=True)) >= 2]

    return wait_until(look, bool, LIMIT_S)[0]


def test_a_trial_that_failed_twice_on_a_node_goes_on_another_from_its_last_checkpoint(tmp_path: Path) -> None:
    with started_head({"RAY_AUTH_MODE": "disabled"}) as head:
        run = start(tmp_path, "--address", head.address, trial={"max_steps": 500, "eval_every": 25})
        wait_until(lambda: [trial.checkpoint_steps() for trial in run.folder.trials()], any, LIMIT_S)
        first = one_that_trains(set())
        sick = first.ppid()
        first.kill()
        second = one_that_trains({first.pid})
        assert second.ppid() == sick
        # It must not end before the other node is there.
        for process in second.children(recursive=True):
            process.send_signal(signal.SIGSTOP)
        with joined_node(head):
            second.kill()
            third = one_that_trains({first.pid, second.pid})
            assert third.ppid() != sick
            exit_code, _, err = run.wait()
    assert exit_code == 0, err
    (trial,) = run.trials().values()
    assert trial.status is TrialStatus.COMPLETED
    assert [point.step for point in run.folder.trial(trial.trial_id).read_metrics()] == list(range(1, 501))
    assert any("goes on away from" in note for note in trial.notes)
    assert any(note.startswith("went on from step") for note in trial.notes)
