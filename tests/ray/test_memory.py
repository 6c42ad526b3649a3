"""Running out of memory, for real: allocations that fail against a limit, and what the sweep makes of them."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import psutil
import pytest

from orchestrator.results.records import TrialStatus
from orchestrator.sweep.worker import JEMALLOC
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


def _maps_jemalloc(process: psutil.Process | None) -> bool:
    assert process is not None
    return any("libjemalloc" in mapped.path for mapped in process.memory_maps())


@pytest.mark.skipif(not JEMALLOC.is_file() or platform.machine() != "x86_64", reason="this Ray brings no jemalloc")
def test_a_trial_and_its_template_alone_allocate_by_jemalloc_with_which_it_stays_within_what_was_planned(
    tmp_path: Path,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{json.dumps({'prompt': 'Count:', 'completion': ' '.join(map(str, range(700)))})}\n" * 40)
    run = start(
        tmp_path,
        data={"train": str(rows)},
        # DeepSpeed's buckets are counted whole by the limit, though hardly touched.
        trial={
            "engine": "ddp",
            "attention": "eager",
            "global_batch_size": 16,
            "micro_batch_size": 8,
            "sequence_length": 512,
            "max_steps": 2,
        },
        # With glibc's heap, or with all that jemalloc would keep, it ran out of memory at 720.
        resources={"memory_per_worker": "680MiB"},
    )
    trial = wait_until(lambda: trial_processes(run), bool, 120)[0]
    template = trial.parent()
    assert template is not None
    assert _maps_jemalloc(trial)
    assert _maps_jemalloc(template)
    assert not _maps_jemalloc(template.parent())
    exit_code, _, err = run.wait()
    assert exit_code == 0, err
    (only,) = run.trials().values()
    assert only.status is TrialStatus.COMPLETED, only.reason
    assert only.peak_memory.measured_bytes == pytest.approx(only.peak_memory.predicted_bytes, rel=0.05)


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
