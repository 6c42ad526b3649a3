"""Running out of memory, for real: allocations that fail against a limit, and what the sweep makes of them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from orchestrator.results.records import TrialStatus
from tests.ray.sweeps import start, trial_processes
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(600)
GIB = 2**30


def test_what_cannot_fit_is_refused_what_runs_out_is_learned_from_and_auto_finds_a_size_that_runs(
    tmp_path: Path,
) -> None:
    run = start(
        tmp_path,
        trial={"global_batch_size": 1024, "sequence_length": 64, "max_steps": 2},
        space={"micro_batch_size": [2, 512, 1024, "auto"]},
        resources={"max_concurrent": 1},
    )
    trial = wait_until(lambda: trial_processes(run), bool, 120)[0]
    # Its template: what is forked from it later inherits the limit, and torch's allocations beyond it fail.
    template = trial.parent()
    assert template is not None
    limit_bytes = template.memory_info().data + 350 * 2**20
    template.rlimit(psutil.RLIMIT_DATA, (limit_bytes, limit_bytes))
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    small, full, fuller, automatic = run.trials().values()

    assert small.status is TrialStatus.COMPLETED
    assert full.status is TrialStatus.OUT_OF_MEMORY
    assert "lower micro_batch_size (now 512)" in str(full.reason)
    # Needs more than what ran out already: not launched, with that evidence.
    assert fuller.status is TrialStatus.INFEASIBLE
    assert f"trial {full.trial_id} ran out of memory here" in str(fuller.reason)
    assert not run.folder.trial(fuller.trial_id).log.exists()
    # Chosen by us, so made smaller until it runs; the batch that is learned from is the same.
    assert automatic.status is TrialStatus.COMPLETED
    assert isinstance(automatic.config.micro_batch_size, int)
    assert automatic.config.micro_batch_size < 512
    assert any("micro_batch_size" in note and "ran out of memory" in note for note in automatic.notes)
    assert automatic.best.eval_loss == pytest.approx(small.best.eval_loss, rel=1e-4)


def test_a_limit_refuses_the_rank_that_cannot_fit_and_holds_for_the_others(tmp_path: Path) -> None:
    run = start(
        tmp_path,
        trial={"max_steps": 2, "sequence_length": 16},
        space={"rank": [4, 65536]},
        resources={"memory_per_worker": "1GiB"},
    )
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    small, large = run.trials().values()
    assert small.status is TrialStatus.COMPLETED
    assert small.peak_memory.measured_bytes < GIB
    assert large.status is TrialStatus.INFEASIBLE
    assert "resources.memory_per_worker allows 1.0 GiB" in str(large.reason)
