"""The object store that a sweep lies in goes away while a trial is at work."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("moto")

from orchestrator.results import remote
from orchestrator.results.folders import SweepFolder
from orchestrator.results.storage import read_sweep
from tests.object_store import BUCKET, fragile_store
from tests.ray.sweeps import Run, start
from tests.waiting import wait_until

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer

pytestmark = pytest.mark.timeout(900)
LIMIT_S = 400.0
KUBERNETES_S = 30.0
STEPS = 2400
STORAGE = f"s3://{BUCKET}/sweeps"
# The command in place of `python -m orchestrator`, with another patience.
PATIENT_FOR = """
import runpy, sys
from orchestrator.sweep import carrier
carrier.AWAY_LIMIT_S = {away_limit_s}
sys.argv = sys.argv[3:]
runpy.run_module("orchestrator", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedMotoServer]:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    with fragile_store() as made:
        yield made


def start_sweep(folder: Path, away_limit_s: float = 5.0) -> Run:
    return start(
        folder,
        "--storage",
        STORAGE,
        within=[sys.executable, "-c", PATIENT_FOR.format(away_limit_s=away_limit_s)],
        trial={"max_steps": STEPS, "eval_every": 50},
        space={"rank": [2, 4]},
    )


def in_store() -> SweepFolder:
    return remote.opened(f"{STORAGE}/test")


def steps_at_worker(folder: Path) -> int:
    """Of the trial at work, as its worker has them on its own disk."""
    here = "*/trials/*/metrics.jsonl"
    found = [file for file in (folder / "cache" / "copies").rglob(here) if "driver" not in file.parts]
    return max((file.read_bytes().count(b"\n") for file in found), default=0)


def lose_store_while_a_trial_is_at_work(store: ThreadedMotoServer, run: Run) -> None:
    wait_until(lambda: [trial.checkpoint_steps() for trial in in_store().trials()], any, LIMIT_S)
    assert run.process.poll() is None
    store.stop()


def assert_whole() -> None:
    folder = in_store()
    trials = read_sweep(folder)[0].trials
    assert [(trial.status.value, trial.steps) for trial in trials] == [("completed", STEPS)] * 2
    for trial in trials:
        points = folder.trial(trial.trial_id).read_metrics()
        assert [point.step for point in points] == list(range(1, STEPS + 1))
        remote.fetch_trial(folder, trial.trial_id)
        assert list(folder.trial(trial.trial_id).adapter.glob("*.safetensors"))
    assert folder.report.exists()


def test_a_trial_that_ends_while_the_store_is_away_loses_nothing(store: ThreadedMotoServer, tmp_path: Path) -> None:
    run = start_sweep(tmp_path, away_limit_s=LIMIT_S)
    lose_store_while_a_trial_is_at_work(store, run)
    wait_until(lambda: steps_at_worker(tmp_path), lambda steps: steps == STEPS, LIMIT_S)
    store.start()
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    assert_whole()


@pytest.mark.parametrize("ended_by", ["itself", "SIGTERM"])
def test_a_sweep_whose_store_stays_away_ends_in_words_and_goes_on_once_it_is_back(
    store: ThreadedMotoServer, tmp_path: Path, ended_by: str
) -> None:
    run = start_sweep(tmp_path)
    lose_store_while_a_trial_is_at_work(store, run)
    started_s = time.monotonic()
    if ended_by == "SIGTERM":
        run.process.send_signal(signal.SIGTERM)
    exit_code, _, err = run.wait()
    ended_s = time.monotonic() - started_s
    print(f"ended by {ended_by}: exit code {exit_code} after {ended_s:.1f} s")
    assert exit_code == 3, err
    assert f"storage {STORAGE}/test cannot be" in err.splitlines()[-1]
    assert "run the same command again" in err.splitlines()[-1]
    assert ended_s < KUBERNETES_S or ended_by == "itself"

    store.start()
    again = start_sweep(tmp_path)
    exit_code, _, err = again.wait()
    assert exit_code == 0, err
    assert_whole()
    assert any("went on from step" in note for trial in read_sweep(in_store())[0].trials for note in trial.notes)
