from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from orchestrator.results.records import TrialStatus
from tests.ray.sweeps import Run, processes_of, start, trial_processes
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(600)


def client_of(storage: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")


def runs_of(storage: Path) -> tuple[list[object], list[object]]:
    """The parents and the children in MLflow."""
    client = client_of(storage)
    runs = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    parents = [run for run in runs if run.data.tags.get("kind") == "sweep"]
    return parents, [run for run in runs if run.data.tags.get("kind") == "trial"]


def test_a_sweep_with_two_workers_a_trial_refusals_and_asha_runs_to_its_report(tmp_path: Path) -> None:
    run = start(
        tmp_path,
        trial={"max_steps": 12, "eval_every": 2, "micro_batch_size": "auto"},
        space={"learning_rate": [1e-2, 1e-4, 1e-5], "offload": ["none", "optimizer_and_parameters"]},
        scheduler={"asha": {"grace_steps": 2, "reduction_factor": 3}},
        resources={"workers_per_trial": 2},
    )
    exit_code, out, err = run.wait()
    assert exit_code == 0, err
    trials = list(run.trials().values())
    by_rate = {t.config.learning_rate: t for t in trials if t.config.offload == "none"}
    refused = [t for t in trials if t.config.offload != "none"]

    # The first one ends, the two that are worse at their first rung do not; the refused ones never ran.
    assert by_rate[1e-2].status is TrialStatus.COMPLETED
    assert by_rate[1e-4].status is by_rate[1e-5].status is TrialStatus.STOPPED
    assert [t.status for t in refused] == [TrialStatus.INFEASIBLE] * 3
    assert all("offload" in str(t.reason) and not run.folder.trial(t.trial_id).metrics.exists() for t in refused)

    best = by_rate[1e-2]
    folder = run.folder.trial(best.trial_id)
    points = folder.read_metrics()
    assert [p.step for p in points] == list(range(1, 13))
    assert [p.step for p in points if p.eval_loss is not None] == [2, 4, 6, 8, 10, 12]
    assert points[-1].eval_loss < points[1].eval_loss
    assert json.loads(folder.deepspeed.read_text())["train_batch_size"] == 4
    assert (folder.adapter / "adapter_model.safetensors").exists()
    assert best.peak_memory is not None
    assert best.peak_memory.measured_bytes > 2**27
    assert best.tokens_per_s > 0
    assert run.folder.report.exists()
    assert len(run.folder.results_csv.read_text().splitlines()) == 7
    assert "recommended" in out

    parents, children = runs_of(tmp_path)
    assert len(parents) == 1
    assert len(children) == 6
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parents[0].info.run_id}
    of_best = next(child for child in children if child.data.tags["trial_id"] == best.trial_id)
    history = client_of(tmp_path).get_metric_history(of_best.info.run_id, "loss")
    assert [(m.step, m.timestamp) for m in history] == [(p.step, p.time_ms) for p in points]
    assert of_best.data.params["learning_rate"] == "0.01"
    assert {child.data.tags["status"] for child in children} == {"completed", "stopped", "infeasible"}
    artifacts = {a.path for a in client_of(tmp_path).list_artifacts(of_best.info.run_id)}
    assert {"adapter", "deepspeed.json", "log.txt"} <= artifacts
    assert "report.html" in {a.path for a in client_of(tmp_path).list_artifacts(parents[0].info.run_id)}


def test_ctrl_c_saves_the_state_and_the_same_command_goes_on(tmp_path: Path) -> None:
    keys = {
        "space": {"rank": [2, 4]},
        "trial": {"max_steps": 100, "eval_every": 25},
        "resources": {"max_concurrent": 1},
    }
    run = start(tmp_path, **keys)
    wait_until(run_statuses(run), lambda seen: seen.count("completed") >= 1, 200)
    below = processes_of(run)
    run.process.send_signal(signal.SIGINT)
    exit_code, _, err = run.wait()
    assert exit_code == 130, err
    assert psutil.wait_procs(below, 10)[1] == []
    before = run.trials()
    finished = {i: t for i, t in before.items() if t.status is TrialStatus.COMPLETED}
    assert finished
    assert {t.status for i, t in before.items() if i not in finished} == {TrialStatus.CANCELLED}
    assert all("again" in str(t.reason) for i, t in before.items() if i not in finished)

    again = start(tmp_path, **keys)
    exit_code, _, err = again.wait()
    assert exit_code == 0, err
    after = again.trials()
    assert {t.status for t in after.values()} == {TrialStatus.COMPLETED}
    assert {i: after[i] for i in finished} == finished
    parents, children = runs_of(tmp_path)
    assert len(parents) == 1
    assert sorted(child.data.tags["trial_id"] for child in children) == sorted(after)


def test_sigterm_before_the_first_trial_ends_the_run_as_ctrl_c_does(tmp_path: Path) -> None:
    run = start(tmp_path)
    # Ray is there then, with a handler of its own that would end the run with the signal's number.
    while "data: " not in (line := run.process.stderr.readline()):
        assert line, "the run ended before it read its data"
    run.process.send_signal(signal.SIGTERM)
    exit_code, _, err = run.wait()
    assert exit_code == 130, err
    assert "interrupted" in err


def to_its_group(run: Run) -> None:
    """What `timeout` does with a signal: to its child, and once more to all of the group that it leads."""
    run.process.terminate()


def to_every_process(run: Run) -> None:
    """What `systemctl stop` and `scancel` do."""
    for process in processes_of(run):
        with suppress(psutil.NoSuchProcess):
            process.terminate()


@pytest.mark.parametrize(
    ("send", "words"),
    [(to_its_group, "the state is saved"), (to_every_process, "running trials go on from their last checkpoints")],
)
def test_sigterm_that_reaches_more_than_the_driver_interrupts_the_sweep_in_time(
    tmp_path: Path, send: Callable[[Run], None], words: str
) -> None:
    run = start(tmp_path, within=["timeout", "500"], trial={"max_steps": LONG_STEPS}, space={"rank": [2]})
    wait_until(lambda: list(run.folder.root.glob("trials/*/checkpoint-*")), bool, 200)
    below = processes_of(run)
    sent_s = time.monotonic()
    send(run)
    exit_code, _, err = run.wait()
    assert exit_code == 130, err
    # Less than the 50 s that a head which is gone is waited for otherwise.
    assert time.monotonic() - sent_s < 30
    assert words in err
    assert psutil.wait_procs(below, 30)[1] == []
    (trial,) = run.trials().values()
    assert not trial.status.is_final
    assert list(run.folder.trial(trial.trial_id).root.glob("checkpoint-*"))


def run_statuses(run: object) -> object:
    def look() -> list[str]:
        try:
            return run.statuses()
        except Exception:
            return []

    return look


LONG_STEPS = 100_000


def test_twenty_trials_on_two_cpus_end_though_one_crashes_and_leave_nothing_behind(tmp_path: Path) -> None:
    run = start(
        tmp_path,
        # One would go on for an hour: it is still training whenever the others are looked at.
        space={"max_steps": [LONG_STEPS, *range(2, 21)]},
        resources={"max_concurrent": "auto"},
    )
    wait_until(run_statuses(run), lambda seen: "completed" in seen, 200)
    (long,) = (trial.trial_id for trial in run.trials().values() if trial.config.max_steps == LONG_STEPS)
    wait_until(run.folder.trial(long).read_metrics, bool, 200)
    below = processes_of(run)
    (process,) = trial_processes(run, long)
    process.send_signal(signal.SIGABRT)
    exit_code, _, err = run.wait()
    assert exit_code == 1, err
    trials = sorted(run.trials().values(), key=lambda trial: trial.config.max_steps)
    assert [t.status.value for t in trials] == ["completed"] * 19 + ["failed"]
    assert "signal 6" in str(trials[-1].reason)
    assert psutil.wait_procs(below, 10)[1] == []
    (state,) = run.folder.tune.glob("experiment_state-*.json")
    assert len(json.loads(state.read_text())["trial_data"]) < 5, "Tune keeps the trials that have ended"
    # What came after a slot's first trial had its worker, its imports and its group there already.
    startups = sorted(t.timing.startup_s for t in trials[:-1])
    assert startups[9] < startups[-1] / 3


def test_losses_are_bit_identical_warm_and_fresh(tmp_path: Path) -> None:
    keys = {
        "space": {"zero_stage": [0, 3], "precision": ["fp32", "nf4"]},
        # Two of the four: a fresh group takes half a minute each.
        "exclude": [{"zero_stage": 0, "precision": "nf4"}, {"zero_stage": 3, "precision": "fp32"}],
        "trial": {"lora_dropout": 0.1},
    }
    runs = [start(tmp_path / isolation, "--isolation", isolation, **keys) for isolation in ("warm",)]
    assert runs[0].wait()[0] == 0
    runs.append(start(tmp_path / "fresh", "--isolation", "fresh", **keys))
    assert runs[1].wait()[0] == 0
    curves = [
        {i: [(p.loss, p.eval_loss, p.grad_norm) for p in run.folder.trial(i).read_metrics()] for i in run.trials()}
        for run in runs
    ]
    assert curves[0] == curves[1]
    assert all(len(curve) == 6 for curve in curves[0].values())
