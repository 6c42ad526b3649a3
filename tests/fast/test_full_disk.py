"""A file system that is full, read-only or away under the Recorder: 64 KiB in a mount namespace of the test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import contextlib, subprocess, sys
from pathlib import Path
from orchestrator.config.sweep_config import ObjectiveConfig
from orchestrator.results.records import TrialStatus
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.storage import read_trial_results
from orchestrator.sweep import recorder as recorders
from orchestrator.sweep.folder_lock import Tenure
from tests.made_up_sweep import made_up_trial

first, second = made_up_trial({"rank": 2}), made_up_trial({"rank": 4})
ended = first.model_copy(update={"status": TrialStatus.FAILED, "reason": "later"})
recorders.STORAGE_LIMIT_S = 0.5

for fault in ("full", "read-only", "freed", "vanished"):
    root = Path(sys.argv[1]) / fault
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(root)], check=True)
    folder = SweepFolder(root / "sweep")
    recorder = recorders.Recorder(
        folder, {}, 0.0, None, {}, lambda config: 0, lambda trial_id: True, ObjectiveConfig(), Tenure(""), ()
    )
    write_atomically(folder.sweep_file, "name: sweep")
    recorder.save(first)
    if fault == "vanished":
        subprocess.run(["umount", str(root)], check=True)
    elif fault == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    else:
        with (root / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 512)

    def freed_while_waiting(seconds):
        (root / "filler").unlink(missing_ok=True)

    if fault == "freed":
        recorders.time.sleep = freed_while_waiting
    recorder.save(second)
    recorder.save(ended)
    if fault == "vanished":
        assert "has lost its sweep.yaml" in str(recorder.storage_error), recorder.storage_error
        # Nothing was begun in the place of what is away.
        assert list(root.iterdir()) == []
        continue
    kept, damaged = read_trial_results(folder)
    assert not damaged, damaged
    assert recorder.records == {first.trial_id: ended, second.trial_id: second}
    if fault == "freed":
        assert recorder.storage_error is None
        assert kept == recorder.records
    else:
        assert "cannot write" in str(recorder.storage_error), recorder.storage_error
        # What was there before is whole.
        assert kept == {first.trial_id: first}, kept
print("held")
"""


def can_mount(folder: Path) -> bool:
    if not shutil.which("unshare"):
        return False
    tried = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True
    )
    return tried.returncode == 0


def test_records_wait_for_a_disk_that_is_full_read_only_or_away_and_what_was_written_stays_whole(
    tmp_path: Path,
) -> None:
    if not can_mount(tmp_path):
        pytest.skip("needs the right to mount a file system of its own")
    command = ["unshare", "-m", sys.executable, "-c", SCRIPT, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.stdout == "held\n", done.stderr
    assert "only 0 MiB are left on the disk" in done.stderr
