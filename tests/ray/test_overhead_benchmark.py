"""The benchmark that the README quotes runs, and compares like with like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)


def test_rays_guide_warm_groups_and_plain_processes_train_the_same_trials_to_the_same_losses(tmp_path: Path) -> None:
    table, variants = tmp_path / "overhead.json", ["guide", "warm", "plain"]
    command = [sys.executable, "-m", "benchmarks.overhead", "--trials", "1", "--steps", "3", "--json", str(table)]
    done = subprocess.run([*command, "--variants", *variants], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(table.read_text())
    assert found["losses_identical"], done.stdout
    assert sorted(found["medians"]) == sorted(variants)
    assert all(found["medians"][variant]["makespan_s"] > 0 for variant in variants)
