from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PRINTS = """
import sys, time
from pathlib import Path
from orchestrator.training.trial_log import hide_secrets, redirect_output

log = Path(sys.argv[1])
redirect_output(log, limit_bytes=10_000, look_every_s=0.02)
print("x" * 20_000, flush=True)
until = time.monotonic() + 60
while log.stat().st_size > 10_000 and time.monotonic() < until:
    time.sleep(0.02)
print("the end, at http://me:pass-word@host with", "hf_" + "A1b2C3d4" * 4, flush=True)
hide_secrets(log)
"""


def test_a_trials_log_stays_small_keeps_its_end_and_holds_no_secret(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", PRINTS, str(log)], check=True, timeout=100, env=environment)
    assert "what came before is in log.earlier.txt" in log.read_text()
    assert log.read_text().splitlines()[-1] == "the end, at http://host with [hidden]"
    assert len(log.read_text()) < 1000
    assert (tmp_path / "log.earlier.txt").read_text().startswith("x" * 20_000)
