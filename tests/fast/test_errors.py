from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator import errors
from orchestrator.cli import app
from orchestrator.errors import InputError, OrchestratorError, Problem
from tests.made_up_sweep import made_up_sweep, made_up_trial, write_made_up

REMEDY = re.compile(r"lower|mend|name|write|set|did you mean", re.IGNORECASE)
EXAMPLES = [
    errors.SweepFileError("a.yaml", (Problem("trial.rnk", "is no key; did you mean rank?", 3),)),
    errors.TrialOutOfMemoryError(3, 2**34, 2**30, 8),
    errors.TrialDivergedError(7, float("nan")),
    errors.TrialFailedError("RuntimeError: boom", "trials/x/log.txt"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_survives_pickling_and_names_a_remedy(error: OrchestratorError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))
    assert REMEDY.search(str(error))


def test_exit_codes_are_the_contracts() -> None:
    assert errors.SweepFileError.exit_code == errors.ModelError.exit_code == errors.FolderError.exit_code == 2
    assert errors.ClusterUnreachableError.exit_code == errors.StorageError.exit_code == 3
    assert errors.SweepInterruptedError.exit_code == 130


def test_a_bug_has_an_exit_code_of_its_own_and_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr("orchestrator.results.storage.newest_sweep", broken)
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 70
    assert "RuntimeError: nobody thought of this" in result.stderr
    assert "bug of orchestrator" in result.stderr


@pytest.mark.parametrize("to", ["2>&-", "2>/dev/full"])
def test_messages_that_cannot_be_written_do_not_go_to_stdout_and_change_no_exit_code(to: str) -> None:
    command = f"exec '{sys.executable}' -c 'from orchestrator.cli import main; main()' status nowhere {to}"
    done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_current_folder_that_is_gone_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Path("search_spaces/smoke.yaml").absolute()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    elsewhere = ["run", str(sweep), "--storage", str(tmp_path)]
    for words in (["plan", str(sweep)], ["run", str(sweep)], elsewhere, ["doctor"]):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2, result.stderr
        assert "the current folder is gone: cd to one that is there" in result.stderr


@pytest.mark.parametrize("uri", ["http://[bad", "http://", "http://host:port", "nonsense://", "mlflow:5000"])
def test_a_tracking_address_that_is_none_is_told_before_anything_starts(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    result = CliRunner().invoke(app, ["run", "search_spaces/smoke.yaml", "--storage", str(tmp_path)])
    assert result.exit_code == 2, result.stderr
    assert f"address {uri} is none" in result.stderr
    assert "write one such as http://mlflow:5000 (tracking.uri, or MLFLOW_TRACKING_URI)" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("locked", ["adapter", "adapter/adapter_model.safetensors", "results.json"])
def test_what_may_not_be_read_is_told_as_that_and_not_as_missing_or_damaged(locked: str, tmp_path: Path) -> None:
    trial = made_up_trial({"rank": 8})
    folder = write_made_up(tmp_path / "sweep", made_up_sweep([trial]))
    adapter = folder.trial(trial.trial_id).adapter
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    file = folder.results_json if locked == "results.json" else adapter.parent / locked
    file.chmod(0)
    # Root reads all but what it gives up the right to.
    plain = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    words = ["export", str(folder.root), "--trial", trial.trial_id, "--to", str(tmp_path / "out")]
    done = subprocess.run(
        [*plain, sys.executable, "-m", "orchestrator", *words], capture_output=True, text=True, timeout=120, check=False
    )
    file.chmod(0o755)
    assert done.returncode == 2, done.stderr
    assert f"{file} may not be read by this account: give it the right to" in done.stderr


LONG = "x" * 3000


@pytest.mark.parametrize(
    "words",
    [
        ["plan", LONG],
        ["plan", "search_spaces/smoke.yaml", "--gpu", LONG],
        ["report", LONG],
        ["report", f"s3://{LONG}?"],
        ["run", "search_spaces/smoke.yaml", "--address", f"{LONG}:1"],
        ["run", "search_spaces/smoke.yaml", "--notify", f"@{LONG}"],
        *(
            ["plan", "search_spaces/smoke.yaml", "--set", change]
            for change in (
                f"model=builtin:{LONG}",
                f"model=./{LONG}",
                f"data.train=~{LONG}/rows",
                f"trial.precision={LONG}",
                f"trial.target_modules=[{LONG}]",
                f"objective.metric={LONG}/acc",
                f"constraints=['eval_loss <= {LONG}']",
                f"search={{algorithm: tpe, points: [{{rank: {LONG}}}]}}",
            )
        ),
    ],
)
def test_a_long_value_is_cut_where_a_message_repeats_it(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code in (2, 3)
    assert LONG[:100] in result.stderr
    assert len(result.stderr) < 1500


def test_estimate_cuts_long_values_too() -> None:
    lines = [{"model": f"./{LONG}"}, {"model": {"model_type": LONG, "vision_config": {"depth": 1}}}]
    answer = CliRunner().invoke(app, ["estimate"], input="\n".join(map(json.dumps, lines)))
    told = [json.loads(line)["error"] for line in answer.stdout.splitlines()]
    assert [LONG[:100] in one and len(one) < 500 for one in told] == [True, True]


@pytest.mark.parametrize("option", ["--storage", "--name"])
def test_an_option_that_is_no_text_is_told_by_its_own_name(option: str) -> None:
    result = CliRunner().invoke(app, ["run", "search_spaces/smoke.yaml", option, os.fsdecode(b"caf\xe9")])
    assert result.exit_code == 2, result.stderr
    assert result.stderr.startswith(f"error: {option} caf")
    assert "is not text in UTF-8" in result.stderr


def test_plan_and_run_warn_where_trials_are_evaluated_on_what_they_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(*_: object) -> None:
        raise InputError("enough")

    monkeypatch.setattr("orchestrator.sweep.run.run", cut_short)
    source = "builtin:python-docs"
    changes = [f"data.train={source}", f"data.eval={source}", f"storage={tmp_path}"]
    options = [word for change in changes for word in ("--set", change)]
    for command in ("plan", "run"):
        result = CliRunner().invoke(app, [command, "search_spaces/smoke.yaml", *options])
        warning = f"warning: data.eval and data.train both have the rows of {source}"
        assert warning in result.output, result.stderr
