"""What a job is made of: its package, its command, its environment, its id, its end."""

from __future__ import annotations

import socket
import threading
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray")

from ray.runtime_env import RuntimeEnv
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config.sweep_file import load, text_of
from orchestrator.errors import ClusterUnreachableError, InputError, OrchestratorError
from orchestrator.results.provenance import git_state
from orchestrator.results.records import GitState
from orchestrator.submit import server
from orchestrator.submit.job import (
    MINIMUM_PYTHON,
    Job,
    entrypoint,
    exit_code_of,
    job_for,
    pinned,
    runtime_env,
    version_problem,
)
from orchestrator.submit.package import SWEEP_FILE, Package, pack, require_room
from tests.checkout import committed

ROOT = Path(__file__).parent.parent.parent
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with the shell in it: data, and what must stay at home."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in (
        "data/train.jsonl",
        "data/eval.csv",
        "data/notes.md",
        ".venv/lib.py",
        "sweeps/old/adapter.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")
    return folder


def packed(folder: Path, *overrides: str, **keys: object) -> Package:
    raw = {"name": "s", "model": "org/model", "data": {"train": "org/data"}, "space": {"rank": [2]}, **keys}
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(raw))
    return pack(load(file, overrides), text_of(file, overrides))


def names(package: Package) -> set[str]:
    return {name for name, _ in package.files if not name.startswith("orchestrator/")}


def test_data_that_is_named_relatively_goes_along_and_nothing_else_of_the_folder(folder: Path) -> None:
    package = packed(folder, data={"train": "data/train.jsonl", "eval": "./data/eval.csv"})
    assert names(package) == {"data/train.jsonl", "data/eval.csv"}
    assert names(packed(folder, data={"train": "data"})) == {"data/train.jsonl", "data/eval.csv"}


def test_absolute_paths_builtins_and_hub_ids_are_the_clusters(folder: Path) -> None:
    assert names(packed(folder, data={"train": str(folder / "data" / "train.jsonl")}, model="/models/mine")) == set()
    assert names(packed(folder, data={"train": "builtin:python-docs", "eval": "~/eval.jsonl"})) == set()


def test_the_package_runs_the_same_code_and_the_sweep_with_its_overrides(folder: Path, tmp_path: Path) -> None:
    package = packed(folder, "trial.max_steps=7", "storage=/mnt/sweeps")
    inside = {name for name, _ in package.files}
    assert {"orchestrator/__main__.py", "orchestrator/reporting/report.html.jinja"} <= inside
    assert not any("pycache" in name for name in inside)
    out = tmp_path / "out"
    out.mkdir()
    package.write(out)
    sweep = load(out / SWEEP_FILE)
    assert (sweep.trial.max_steps, sweep.storage) == (7, "/mnt/sweeps")
    # What a default is depends on the hardware of the cluster: none is written down here.
    assert sweep.trial.model_fields_set == {"max_steps"}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"data": {"train": "data/trian.jsonl"}}, "no such file"),
        ({"data": {"train": "builtin:python-dosc"}}, "did you mean builtin:python-docs"),
        ({"data": {"train": "../elsewhere/train.jsonl"}}, "lies outside of"),
        ({"data": {"train": "data/notes.md"}}, "write one of"),
        ({"evaluate": {"tasks": ["mine"], "task_folder": "tasks"}}, "name an absolute path that all nodes see"),
        ({"model": "builtin:tiny-lama"}, "did you mean builtin:tiny-llama"),
        ({"model": "./no/such/model"}, "no such folder"),
        ({"model": "data"}, "config.json"),
    ],
    ids=str,
)
def test_what_cannot_be_packed_is_told_before_anything_is_sent(
    folder: Path, keys: dict[str, object], told: str
) -> None:
    (folder / "../elsewhere").mkdir()
    (folder / "../elsewhere/train.jsonl").write_text("{}")
    with pytest.raises(InputError, match=told):
        packed(folder, **keys)


def test_a_package_that_is_too_large_names_its_largest_file_and_what_to_do(folder: Path) -> None:
    with (folder / "data/train.jsonl").open("wb") as file:
        file.truncate(3 * 2**20)
    files = [("data/train.jsonl", folder / "data/train.jsonl"), ("data/eval.csv", folder / "data/eval.csv")]
    require_room(files)
    with pytest.raises(InputError, match=r"data/train\.jsonl has 3 MiB.*at most 2 MiB.*absolute path"):
        require_room(files, limit_bytes=2**21)


def test_a_package_is_known_again_until_anything_in_it_changes(folder: Path) -> None:
    data = {"train": "data/train.jsonl"}
    digest = packed(folder, data=data).digest
    assert packed(folder, data=data).digest == digest
    assert packed(folder, "trial.max_steps=7", data=data).digest != digest
    (folder / "data/train.jsonl").write_text('{"text": "more"}\n')
    assert packed(folder, data=data).digest != digest


def test_nothing_of_the_sweep_file_reaches_the_command_or_the_environment(folder: Path) -> None:
    package = packed(folder, "tracking.uri=https://me:secret@mlflow.example.org")
    assert "secret" in package.sweep
    environment = runtime_env(folder, [], None)
    assert "secret" not in entrypoint("warm", notifies=True) + str(environment)
    assert entrypoint("fresh", notifies=False) == "python -m orchestrator run sweep.yaml --isolation fresh"
    assert "pip" not in environment


@pytest.mark.parametrize("is_dirty", [False, True])
def test_a_jobs_records_have_the_commit_that_it_was_submitted_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_dirty: bool
) -> None:
    commit = committed(folder)
    if is_dirty:
        (folder / "data/train.jsonl").write_text("changed\n")
    told = runtime_env(folder, [], git_state(folder))["env_vars"]
    package = tmp_path / "package"
    package.mkdir()
    assert git_state(package) is None
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert git_state(package) == GitState(commit=commit, dirty=is_dirty)


def test_the_webhook_goes_along_in_a_file_and_not_in_the_command(folder: Path, tmp_path: Path) -> None:
    url = "https://example.com/hook/secret-token"
    package = replace(packed(folder), webhook=url)
    assert package.digest != packed(folder).digest
    out = tmp_path / "out"
    out.mkdir()
    package.write(out)
    command = entrypoint("warm", notifies=True)
    assert "secret-token" not in command
    named = command.split()[-1]
    assert named.startswith("@")
    assert (out / named[1:]).read_text() == url


def test_requirements_are_ours_as_they_are_pinned_without_ray(folder: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        f'{line}; extra == "{extra}"' for extra, lines in project["optional-dependencies"].items() for line in lines
    ]
    wanted = pinned([*project["dependencies"], *extras])
    assert not any(line.startswith("ray") for line in wanted)
    assert {"torch<2.14,>=2.13", "bitsandbytes<0.51,>=0.50.2"} <= set(wanted)
    assert not any(line.startswith(("pytest", "flash-attn")) for line in wanted)
    assert RuntimeEnv(**runtime_env(folder, wanted, None))["pip"]["packages"] == wanted
    assert project["requires-python"] == ">=" + ".".join(map(str, MINIMUM_PYTHON))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"model": "builtin:smollm2-135m"}, "weights of builtin:smollm2-135m: name another model"),
        ({"evaluate": {"tasks": ["hellaswag"]}}, "lm-eval, which evaluate.tasks needs: leave tasks out"),
    ],
    ids=["model", "tasks"],
)
def test_what_needs_more_than_the_requirements_that_are_installed_is_told_before_anything_is_sent(
    folder: Path, keys: dict[str, object], told: str
) -> None:
    raw = {"name": "s", "model": "org/model", "data": {"train": "org/data"}, "space": {"rank": [2]}, **keys}
    Path("mine.yaml").write_text(yaml.safe_dump(raw))
    result = CliRunner().invoke(app, ["submit", "mine.yaml", "--address", NOBODY, "--install-requirements"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr


@pytest.mark.parametrize(
    ("ray", "python", "told"),
    [
        ("2.60.0", "3.11.7", None),
        ("2.60.3", "3.12.1", None),
        ("2.60.0", None, None),
        ("2.59.0", "3.11.7", "Ray 2.59.0"),
        ("3.0.0.dev0", "3.11.7", "Ray 3.0.0.dev0"),
        ("2.60.0", "3.10.12", "Python 3.10.12, and 3.11"),
    ],
)
def test_a_cluster_of_other_versions_is_refused_where_we_cannot_run(
    ray: str, python: str | None, told: str | None
) -> None:
    problem = version_problem(ray, "2.60.0", python)
    assert problem is None if told is None else problem is not None and told in problem


AT = "http://head:8265"


def test_the_sweeps_name_is_the_jobs_id_and_later_jobs_are_counted() -> None:
    assert job_for("s", "p", [], AT) == ("s", False)
    assert job_for("s", "p", [Job("s", True, "s", "p"), Job("s-2", True, "s", "q")], AT) == ("s-3", False)
    # A job of somebody else's has the name already.
    assert job_for("s", "p", [Job("s", False)], AT) == ("s-2", False)


def test_a_job_that_is_at_work_is_found_and_not_started_twice() -> None:
    known = [Job("s", True, "s", "old"), Job("s-2", False, "s", "p"), Job("t", False, "t", "p")]
    assert job_for("s", "p", known, AT) == ("s-2", True)
    with pytest.raises(InputError, match=r"s-2 is at work.*ray job stop s-2 --address http://head:8265`.*--name"):
        job_for("s", "changed", known, AT)


@pytest.mark.parametrize(
    ("status", "driver", "exit_code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 3, 3),
        ("FAILED", 130, 130),
        ("FAILED", 70, 70),
        ("FAILED", 137, None),
        ("FAILED", -9, None),
        ("STOPPED", None, 130),
        ("FAILED", None, None),
    ],
)
def test_a_job_ends_with_the_contracts_exit_codes(status: str, driver: int | None, exit_code: int | None) -> None:
    assert exit_code_of(status, driver) == exit_code


@pytest.mark.parametrize(
    ("words", "exit_code", "told"),
    [
        (["no-such.yaml", "--address", NOBODY], 2, "cannot be read"),
        (["search_spaces/smoke.yaml", "--address", NOBODY, "--set", "trial.rnk=3"], 2, "did you mean rank"),
        (["search_spaces/smoke.yaml", "--address", "10.0.0.1:6379"], 2, "http://HEAD:8265"),
        (["search_spaces/smoke.yaml"], 2, "--address"),
        (["search_spaces/smoke.yaml", "--address", "http://head:eighty"], 2, "http://HEAD:8265"),
        (["search_spaces/smoke.yaml", "--address", "http://head:99999"], 2, "http://HEAD:8265"),
        (["search_spaces/smoke.yaml", "--address", "http://:8265"], 2, "http://HEAD:8265"),
        (["search_spaces/smoke.yaml", "--address", "http://exa mple:8265"], 2, "http://HEAD:8265"),
        (["search_spaces/smoke.yaml", "--address", NOBODY, "--follow", "--no-wait"], 2, "give one of them"),
        (["search_spaces/smoke.yaml", "--address", NOBODY], 3, "no Ray dashboard answers"),
        (["search_spaces/smoke.yaml", "--address", "http://no-such-host.invalid:8265"], 3, "no Ray dashboard answers"),
    ],
    ids=str,
)
def test_wrong_input_and_an_absent_cluster_have_their_exit_codes(words: list[str], exit_code: int, told: str) -> None:
    result = CliRunner().invoke(app, ["submit", *words])
    assert result.exit_code == exit_code, result.stderr
    assert told in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("given", ["http://head:8265/", "http://head:8265/#/jobs/s", " HTTP://head:8265"])
def test_the_address_may_be_copied_from_a_browser(given: str) -> None:
    assert server.dashboard_address(given) == "http://head:8265"


def test_something_that_does_not_speak_http_is_told() -> None:
    def answer(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"-ERR unknown command\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer, args=[listening])
        thread.start()
        with pytest.raises(ClusterUnreachableError, match=r"no Ray dashboard answers .*unknown command\): check host"):
            server.JobServer(f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread.join(10)


def test_a_port_that_listens_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECT_LIMIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterUnreachableError, match="timed out") as caught:
            server.JobServer(address)
    error: OrchestratorError = caught.value
    assert "secret" not in str(error)
