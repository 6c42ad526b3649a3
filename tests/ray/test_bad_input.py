from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.ray.sweeps import start

pytestmark = pytest.mark.timeout(400)


@pytest.mark.parametrize(
    ("keys", "arguments", "exit_code", "told"),
    [
        ({"model": "no/such-folder"}, (), 2, "model"),
        ({"model": "builtin:tiny-lama"}, (), 2, "did you mean"),
        ({"trial": {"target_modules": ["q_prj"]}}, (), 2, "q_proj"),
        ({"data": {"train": "no/such.jsonl"}}, (), 2, "no/such.jsonl"),
        ({"resources": {"cpus_per_worker": 512}}, (), 2, "lower resources"),
        ({"trial": {"rnk": 3}}, (), 2, "did you mean rank?"),
        ({}, ("--address", "127.0.0.1:1"), 3, "no Ray cluster answers"),
        ({"tracking": {"uri": "http://127.0.0.1:1"}}, (), 3, "does not answer"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_ends_with_one_message_its_exit_code_and_nothing_left(
    tmp_path: Path, keys: dict[str, object], arguments: tuple[str, ...], exit_code: int, told: str
) -> None:
    run = start(tmp_path, *arguments, **{"space": {"rank": [2]}, **keys})
    code, out, err = run.wait()
    assert code == exit_code, err
    assert told in err
    assert "Traceback" not in err
    assert out == ""
    assert not run.folder.root.exists()


def test_a_storage_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    run = start(tmp_path, "--storage", str(tmp_path / "file" / "below"))
    code, _, err = run.wait()
    assert code == 3
    assert "another --storage" in err


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    import filelock

    (tmp_path / "test").mkdir()
    with filelock.FileLock(tmp_path / "test" / ".lock"):
        code, _, err = start(tmp_path).wait()
    assert code == 2
    assert "another run is at work" in err


def test_another_model_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    from orchestrator.config.sweep_file import load, to_yaml

    run = start(tmp_path, space={"rank": [2]})
    run.process.kill()
    run.wait()
    run.folder.root.mkdir(exist_ok=True)
    saved = to_yaml(load(tmp_path / "sweep.yaml")).replace("tiny-llama", "smollm2-135m")
    run.folder.sweep_file.write_text(saved)
    code, _, err = start(tmp_path, space={"rank": [2]}).wait()
    assert code == 2
    assert "model was builtin:smollm2-135m, now builtin:tiny-llama" in err


def test_a_data_file_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "a", "answer": "b"}\n' * 5)
    code, _, err = start(tmp_path, data={"train": str(data)}).wait()
    assert code == 2
    assert "question" in err
    assert "answer" in err


def test_a_port_that_listens_and_says_nothing_does_not_hang(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "2"
        try:
            code, _, err = start(tmp_path, tracking={"uri": uri}).wait()
        finally:
            del os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    assert code == 3
    assert "does not answer" in err
