"""Sweeps as jobs of a real cluster that asks for a token."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import GitState, TrialStatus
from orchestrator.results.storage import read_sweep, read_trial_results
from tests.checkout import committed
from tests.ray.clusters import BIN, Head, started_head
from tests.ray.sweeps import BASE
from tests.waiting import wait_until
from tests.webhook import webhook

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parent.parent.parent
TOKEN = "0123456789abcdef0123456789abcdef"
WITH_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
LIMIT_S = 300.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder of the cluster's user; what was compiled for DeepSpeed is not compiled again."""
    home = tmp_path_factory.mktemp("home")
    (home / ".cache").symlink_to(Path.home() / ".cache")
    return home


@pytest.fixture(scope="module")
def head(home: Path) -> Iterator[Head]:
    # The orchestrator that runs in a job is the one that was packed, not one that the cluster can import.
    path = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": "", "HOME": str(home)}
    with started_head({**WITH_TOKEN, **path}) as started:
        yield started


def start(*command: str, cwd: Path, token: str | None = TOKEN) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled"} if token is None else {**WITH_TOKEN, "RAY_AUTH_TOKEN": token}
    environment |= {"NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it hangs; it said:\n{process.communicate()}") from None
    return process.returncode, out, err


def submit(head: Head, *arguments: str, cwd: Path, token: str | None = TOKEN) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "orchestrator", "submit", "sweep.yaml", "--address", head.dashboard, *arguments]
    return start(*command, cwd=cwd, token=token)


def write_sweep_file(folder: Path, **keys: object) -> None:
    (folder / "data").mkdir()
    rows = "".join(f'{{"text": "{"word " * (5 + i % 9)}"}}\n' for i in range(60))
    (folder / "data" / "rows.jsonl").write_text(rows)
    raw = {**BASE, "data": {"train": "data/rows.jsonl", "eval": 0.1}, "storage": str(folder / "sweeps"), **keys}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(raw))


def ask(head: Head, method: str, path: str) -> str:
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/{path}", method=method)
    request.add_header("Authorization", f"Bearer {TOKEN}")
    with urllib.request.urlopen(request, timeout=10) as response:
        return str(response.read(), "utf-8")


@pytest.mark.parametrize("token", [None, "f" * 32], ids=["none", "wrong"])
def test_without_the_token_nothing_is_submitted(head: Head, tmp_path: Path, token: str | None) -> None:
    write_sweep_file(tmp_path, space={"rank": [2]})
    exit_code, out, err = ended(submit(head, cwd=tmp_path, token=token))
    assert exit_code == 3, err
    assert "RAY_AUTH_TOKEN" in err
    assert "Traceback" not in err
    assert out == ""


def test_rays_own_submit_runs_a_sweep_of_the_checkout_to_its_report(head: Head, home: Path) -> None:
    small = ["space.rank=[2]", "space.zero_stage=[1]", "trial.max_steps=2", "trial.eval_every=2"]
    small += ["resources.workers_per_trial=1", "data.train=builtin:python-docs", "data.format=text"]
    run = ["python", "-m", "orchestrator", "run", "search_spaces/smoke.yaml"]
    command = [str(BIN / "ray"), "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", *run]
    refused = ended(start(*command, cwd=ROOT, token=None))
    assert refused[0] != 0
    exit_code, out, err = ended(start(*command, *(word for key in small for word in ("--set", key)), cwd=ROOT))
    assert exit_code == 0, out + err
    # A relative storage would be lost with the job's working directory.
    folder = SweepFolder(home / "sweeps" / "smoke")
    assert [trial.status for trial in read_sweep(folder)[0].trials] == [TrialStatus.COMPLETED]
    assert folder.report.exists()
    assert "recommended" in out


def test_a_job_is_followed_left_followed_again_stopped_and_resumed(head: Head, tmp_path: Path) -> None:
    write_sweep_file(
        tmp_path,
        name="long",
        trial={name: value for name, value in BASE["trial"].items() if name != "max_steps"},
        # Long enough that the stop comes in its middle, on a quick machine too.
        space={"max_steps": [2, 600]},
        resources={"cpus_per_worker": 1, "max_concurrent": 1},
    )
    commit = committed(tmp_path)
    folder = SweepFolder(tmp_path / "sweeps" / "long")
    left = submit(head, "--follow", cwd=tmp_path)
    wait_until(folder.plan.exists, bool, LIMIT_S)
    left.send_signal(signal.SIGINT)
    exit_code, out, err = ended(left)
    assert exit_code == 130, err
    assert "Running entrypoint for job long" in out
    assert "job long goes on" in err

    again = submit(head, "--follow", cwd=tmp_path)

    def steps() -> dict[int, int]:
        trials = read_trial_results(folder)[0].values()
        return {t.config.max_steps: len(folder.trial(t.trial_id).read_metrics()) for t in trials}

    wait_until(steps, lambda seen: seen.get(600, 0) >= 2, LIMIT_S)
    ask(head, "POST", "long/stop")
    exit_code, out, err = ended(again)
    assert exit_code == 130, err
    assert "job long is at work" in err
    assert "2 trials to run" in out
    before = {t.config.max_steps: t for t in read_sweep(folder)[0].trials}
    assert (before[2].status, before[600].status) == (TrialStatus.COMPLETED, TrialStatus.CANCELLED)
    assert folder.report.exists()

    exit_code, out, err = ended(submit(head, "--no-wait", cwd=tmp_path))
    assert (exit_code, out) == (0, "long-2\n"), err
    exit_code, out, err = ended(submit(head, "--follow", cwd=tmp_path))
    assert exit_code == 0, out + err
    assert "1 done before" in out
    after = {t.config.max_steps: t for t in read_sweep(folder)[0].trials}
    assert after[600].status is TrialStatus.COMPLETED
    assert after[600].git == GitState(commit=commit, dirty=False)
    assert after[2] == before[2]
    assert TOKEN not in ask(head, "GET", "")


def test_a_job_ends_with_the_exit_code_of_its_sweep_and_tells_the_webhook(head: Head, tmp_path: Path) -> None:
    write_sweep_file(tmp_path, name="bad", space={"rank": [2]}, storage="/proc/nothing")
    with webhook() as (url, told):
        exit_code, out, err = ended(submit(head, "--follow", "--notify", url, cwd=tmp_path))
    assert exit_code == 3, out + err
    assert "cannot write to /proc/nothing/bad" in out
    (body,) = told
    assert (body["name"], body["status"]) == ("bad", "failed")
    assert url not in ask(head, "GET", "")
