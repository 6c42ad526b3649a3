"""MLflow's pods on Kubernetes, as processes: what each runs before its server, and the server, on a real PostgreSQL."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import requests
import sqlalchemy
from alembic import command
from mlflow.server.auth.db import utils as users
from mlflow.store.db import utils as runs
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialTables

from tests import tracking_servers
from tests.k8s.manifests import K8S, of_kind, render
from tests.tracking_servers import PostgreSQL
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(600)
README = (K8S / "README.md").read_text()
LOGIN = ("admin", "a-long-password-of-this-test")
THERE = "postgresql+psycopg2://mlflow@postgres:5432/mlflow"
# In the middle of MLflow's history, and of that of its users.
OLDER_RUNS, OLDER_USERS = "534353b11cbc", "8606fa83a998"


@dataclass(frozen=True, slots=True)
class Pods:
    """What `production` says of MLflow, with a database here and files in a folder of ours."""

    spec: dict[str, Any]
    folder: Path
    database: PostgreSQL

    @contextmanager
    def started(self, container: dict[str, Any], log: Path, port: int = 5000) -> Iterator[subprocess.Popen[bytes]]:
        own = str(self.folder)
        command = [word.replace("/etc/mlflow", own).replace("=5000", f"={port}") for word in container["command"]]
        program = Path(sys.executable).with_name(command[0])
        environment = {v["name"]: v.get("value", LOGIN[1]).replace(THERE, self.database.uri) for v in container["env"]}
        environment |= {"MLFLOW_AUTH_ADMIN_USERNAME": LOGIN[0], "HOME": own, "PATH": os.environ["PATH"]}
        environment["MLFLOW_AUTH_CONFIG_PATH"] = environment["MLFLOW_AUTH_CONFIG_PATH"].replace("/etc/mlflow", own)
        # A Service named mlflow gives every pod of its namespace this one, which is an option of MLflow's too.
        environment["MLFLOW_PORT"] = "tcp://10.0.0.1:5000"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program, *command[1:]], env=environment, cwd=own, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)

    def prepare(self, log: Path, servers: int = 1, **more: str) -> list[int]:
        """How it ended for each of the servers, which start at once; `more` is what `kubectl set env` adds."""
        (container,) = self.spec["initContainers"]
        added = [{"name": name, "value": value} for name, value in more.items()]
        asked = {**container, "env": [*container["env"], *added]}
        logs = [log.with_name(f"{log.name}.{number}") for number in range(servers)]
        with ExitStack() as all_of_them:
            ended = [all_of_them.enter_context(self.started(asked, one)).wait for one in logs]
            codes = [wait(300) for wait in ended]
        log.write_text("".join(one.read_text() for one in logs))
        return codes

    def found(self, query: str) -> list[tuple[Any, ...]]:
        with psycopg2.connect(self.database.uri.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()

    def schema(self) -> list[tuple[Any, ...]]:
        columns = "SELECT table_name, column_name, data_type FROM information_schema.columns"
        return self.found(f"{columns} WHERE table_schema = 'public' ORDER BY 1, 2")

    def written_by_another(self, of_runs: str, of_users: str) -> None:
        """An MLflow whose newest revisions are these makes the tables, an experiment and a user."""
        engine = sqlalchemy.create_engine(self.database.uri)
        InitialTables.metadata.create_all(engine)
        config = runs._get_alembic_config(self.database.uri)
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, of_runs)
        users.migrate(engine, of_users)
        with engine.begin() as connection:
            for table, row in {
                "experiments (name, artifact_location, lifecycle_stage)": "'older', 'mlflow-artifacts:/1', 'active'",
                "users (username, password_hash, is_admin)": "'somebody', 'hash', false",
            }.items():
                connection.execute(sqlalchemy.text(f"INSERT INTO {table} VALUES ({row})"))
        engine.dispose()


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Pods]:
    manifests = render(K8S / "overlays" / "production")
    (deployment,) = of_kind(manifests, "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    (settings,) = (volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume)
    with tracking_servers.made_postgresql() as database, database.running():
        for config in of_kind(manifests, "ConfigMap"):
            if config["metadata"]["name"] == settings:
                for name, text in config["data"].items():
                    (tmp_path / name).write_text(text.replace(THERE, database.uri))
        yield Pods(spec, tmp_path, database)


def test_two_servers_that_start_at_once_on_an_empty_database_both_come_up(pods: Pods, tmp_path: Path) -> None:
    (server,), log = pods.spec["containers"], tmp_path / "prepare.log"
    assert pods.prepare(log, servers=2) == [0, 0], log.read_text()
    assert pods.found("SELECT experiment_id, artifact_location FROM experiments") == [(0, "mlflow-artifacts:/0")]
    assert pods.found("SELECT username, is_admin FROM users") == [(LOGIN[0], True)]
    with ExitStack() as both:
        ports = [tracking_servers.free_port() for _ in range(2)]
        for port in ports:
            both.enter_context(pods.started(server, tmp_path / f"server-{port}.log", port))
        for port in ports:
            log = tmp_path / f"server-{port}.log"
            wait_until(lambda port=port: _experiments(port), lambda names: names == ["Default"], 300)
            assert "Creating initial MLflow database tables" not in log.read_text()


def test_a_database_of_an_older_mlflow_is_refused_and_upgraded_where_its_words_are_followed(
    pods: Pods, tmp_path: Path
) -> None:
    (container,), (server,) = pods.spec["initContainers"], pods.spec["containers"]
    pods.written_by_another(OLDER_RUNS, OLDER_USERS)
    before, log = pods.schema(), tmp_path / "prepare.log"

    assert pods.prepare(log, servers=2) == [1, 1]
    assert "written by an older MLflow" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert pods.schema() == before
    (advised,) = set(re.findall(r"^  kubectl set env .*", log.read_text(), re.MULTILINE))
    assert f"\n$ {advised.strip()}\n" in README
    *_, containers, variable = advised.split()
    assert containers == f"--containers={container['name']}"

    assert pods.prepare(log, servers=2, **dict([variable.split("=")])) == [0, 0], log.read_text()
    after = pods.schema()
    assert {"alembic_version_auth", "role_permissions", "webhooks"} <= {table for table, *_ in after}
    assert pods.prepare(log, **dict([variable.split("=")])) == [0], log.read_text()
    assert pods.schema() == after
    assert pods.found("SELECT username FROM users ORDER BY 1") == [(LOGIN[0],), ("somebody",)]
    port = tracking_servers.free_port()
    with pods.started(server, tmp_path / "server.log", port):
        wait_until(lambda: _experiments(port), lambda names: sorted(names) == ["Default", "older"], 300)


def test_a_database_whose_upgrade_was_cut_off_before_its_users_is_refused_as_an_older_one(
    pods: Pods, tmp_path: Path
) -> None:
    pods.written_by_another("heads", OLDER_USERS)
    before, log = pods.schema(), tmp_path / "prepare.log"
    assert pods.prepare(log) == [1]
    assert "written by an older MLflow" in log.read_text()
    assert pods.schema() == before


def test_a_database_of_a_newer_mlflow_is_refused_as_such_even_where_an_upgrade_is_asked_for(
    pods: Pods, tmp_path: Path
) -> None:
    pods.written_by_another("heads", "head")
    run_on(pods.database, "psql", "--command=UPDATE alembic_version SET version_num = 'of-next-year'")
    log = tmp_path / "prepare.log"
    assert pods.prepare(log, UPGRADE_DATABASE="1") == [1]
    assert "written by a newer MLflow" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_the_dump_of_before_an_upgrade_brings_the_older_database_back(pods: Pods, tmp_path: Path) -> None:
    pods.written_by_another(OLDER_RUNS, OLDER_USERS)
    before, dump = pods.schema(), tmp_path / "before.dump"
    (restore,) = re.findall(r"pg_restore .*", README)
    run_on(pods.database, "pg_dump", "--format=custom", f"--file={dump}")
    assert pods.prepare(tmp_path / "prepare.log", UPGRADE_DATABASE="1") == [0]
    assert pods.schema() != before
    run_on(pods.database, *shlex.split(restore.replace("/backups/mlflow-....dump", str(dump))))
    assert pods.schema() == before
    assert pods.found("SELECT name FROM experiments") == [("older",)]


def run_on(database: PostgreSQL, program: str, *options: str) -> None:
    """As the job of the backup does."""
    where = {"PGHOST": "127.0.0.1", "PGPORT": str(database.port), "PGUSER": "mlflow", "PGDATABASE": "mlflow"}
    subprocess.run([database.binaries / program, *options], env=where, check=True, timeout=120)


def _experiments(port: int) -> list[str] | str:
    """What somebody who has logged in finds, or what came in place of it."""
    query = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=10"
    try:
        answer = requests.get(query, auth=LOGIN, headers={"Host": "mlflow:5000"}, timeout=30)
    except requests.RequestException as error:
        return str(error)
    return [one["name"] for one in answer.json()["experiments"]] if answer.ok else answer.text
