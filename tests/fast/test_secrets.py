from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config.sweep_config import ObjectiveConfig, SweepConfig
from orchestrator.config.sweep_file import to_yaml
from orchestrator.errors import FolderError, InputError
from orchestrator.export.trial_weights import weights_of
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import TrialStatus
from orchestrator.results.remote import sweep_folder
from orchestrator.results.secrets import without_password, without_secret
from orchestrator.results.storage import read_sweep, read_trial_results, write_sweep
from tests.made_up_sweep import made_up_sweep, made_up_trial, write_made_up

SECRET = "s3cr3t-Value"
HF_TOKEN = "hf_" + "AbCd1234" * 4


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"uri: http://me:{SECRET}@host:5000/a", "uri: http://host:5000/a"),
        (f"http://me:p@{SECRET}@host", "http://host"),
        (f"postgresql://host/db?user=me&password={SECRET}&x=1", "postgresql://host/db?user=me&password=[hidden]&x=1"),
        (f"https://h/x?X-Amz-Signature={SECRET}", "https://h/x?X-Amz-Signature=[hidden]"),
        (f"401 with {HF_TOKEN} at hub", "401 with [hidden] at hub"),
        ("https://h/a?key_dim=3&name=b@c", "https://h/a?key_dim=3&name=b@c"),
        ("mail me@example.org about sqlite:////tmp/mlflow.db", "mail me@example.org about sqlite:////tmp/mlflow.db"),
    ],
)
def test_what_may_be_shown_holds_no_secret_and_all_the_rest(text: str, shown: str) -> None:
    assert without_secret(text) == shown


def test_the_password_of_an_address_is_hidden_where_a_server_repeats_it() -> None:
    told = "no account me with p%40ss or p@ss here, nor with p@ssage"
    hidden = "no account me with [hidden] or [hidden] here, nor with p@ssage"
    assert without_password(told, "http://me:p%40ss@host:5000") == hidden
    assert without_password(told, "http://host:5000") == told


def test_the_values_of_secret_variables_are_hidden_and_of_others_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/etc/token-file")
    monkeypatch.setenv("PIN_TOKEN", "1234")
    assert without_secret(f"{SECRET} in /etc/token-file 1234") == "[hidden] in /etc/token-file 1234"


@pytest.mark.parametrize("trial_id", ["../../etc", "a/b", "", ".hidden", "a" * 200])
def test_a_trial_whose_name_is_a_path_is_no_record(tmp_path: Path, trial_id: str) -> None:
    sweep = made_up_sweep([made_up_trial({"rank": 8})])
    folder = write_made_up(tmp_path / "sweep", sweep)
    text = folder.results_json.read_text().replace(sweep.trials[0].trial_id, trial_id)
    write_atomically(folder.results_json, text)
    with pytest.raises(FolderError, match="cannot be read"):
        read_sweep(folder)


@pytest.mark.parametrize("adapter", ["../../../secrets", "/etc", "adapter/../.."])
def test_an_adapter_outside_of_its_trial_is_no_record(tmp_path: Path, adapter: str) -> None:
    trial = made_up_trial({"rank": 8})
    folder = SweepFolder(tmp_path)
    text = trial.model_dump_json().replace('"adapter":"adapter"', f'"adapter":"{adapter}"')
    write_atomically(folder.trial(trial.trial_id).result, text)
    results, (damaged,) = read_trial_results(folder)
    assert not results
    assert "adapter" in damaged.why


def test_a_sweeps_id_that_would_change_what_mlflow_is_asked_is_no_record(tmp_path: Path) -> None:
    folder = write_made_up(tmp_path / "sweep", made_up_sweep([made_up_trial({"rank": 8})]))
    write_atomically(folder.results_json, folder.results_json.read_text().replace("abc123", "x' or tags.a = 'b"))
    with pytest.raises(FolderError, match="cannot be read"):
        read_sweep(folder)


def test_weights_behind_a_link_out_of_the_sweep_are_not_exported(tmp_path: Path) -> None:
    trial = made_up_trial({"rank": 8})
    folder = write_made_up(tmp_path / "sweep", made_up_sweep([trial]))
    adapter = folder.trial(trial.trial_id).adapter
    adapter.mkdir(exist_ok=True)
    # A header without tensors.
    (adapter / "adapter_model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    assert weights_of(folder, trial) == adapter
    private = tmp_path / "private.json"
    private.write_text("{}")
    (adapter / "adapter_config.json").symlink_to(private)
    with pytest.raises(InputError, match="leads out of the sweep's folder"):
        weights_of(folder, trial)


def test_a_planted_secret_is_in_nothing_that_a_sweep_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.sweep.folder_lock import Tenure
    from orchestrator.sweep.recorder import Recorder

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("HF_TOKEN", HF_TOKEN)
    said = f"no answer from https://me:{SECRET}@mlflow.example with {HF_TOKEN}, X={SECRET}"
    sweep = SweepConfig.model_validate(
        {
            "name": "planted",
            "model": "builtin:tiny-llama",
            "data": {"train": "builtin:python-docs"},
            "storage": str(tmp_path),
            "tracking": {"uri": f"https://me:{SECRET}@mlflow.example"},
        }
    )
    folder = sweep_folder(sweep.storage, sweep.name)
    write_atomically(folder.sweep_file, without_secret(to_yaml(sweep)))
    recorder = Recorder(
        folder, {}, 0.0, None, {}, lambda config: 0, lambda trial_id: True, ObjectiveConfig(), Tenure(""), ()
    )
    failed = made_up_trial({"rank": 8}, status=TrialStatus.FAILED, reason=said)
    recorder.save(failed.model_copy(update={"notes": (said,)}))
    write_sweep(folder, made_up_sweep(list(recorder.records.values())))
    for command in (["report"], ["report", "--json"], ["status"]):
        result = CliRunner().invoke(app, [command[0], str(folder.root), *command[1:]])
        assert result.exit_code == 0
        assert "no answer from https://mlflow.example" in result.output
        assert SECRET not in result.output
    files = [file for file in folder.root.rglob("*") if file.is_file()]
    assert folder.report in files
    for file in files:
        assert SECRET not in file.read_text()
        assert HF_TOKEN not in file.read_text()
