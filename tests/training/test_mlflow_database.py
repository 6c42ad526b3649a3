"""MLflow's pods on Kubernetes, as processes: what each runs before its server, and the server, on a real PostgreSQL."""

from __future__ import annotations

import os
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

from tests import tracking_servers
from tests.k8s.manifests import K8S, of_kind, render
from tests.tracking_servers import PostgreSQL
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(600)
LOGIN = ("admin", "a-long-password-of-this-test")
THERE = "postgresql+psycopg2://mlflow@postgres:5432/mlflow"


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
    (prepare,), (server,) = pods.spec["initContainers"], pods.spec["containers"]
    with ExitStack() as both:
        logs = [tmp_path / f"prepare-{number}.log" for number in (1, 2)]
        for process in [both.enter_context(pods.started(prepare, log)) for log in logs]:
            process.wait(300)
            assert process.returncode == 0, [log.read_text() for log in logs]
    with psycopg2.connect(pods.database.uri.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT experiment_id, artifact_location FROM experiments")
        assert cursor.fetchall() == [(0, "mlflow-artifacts:/0")]
        cursor.execute("SELECT username, is_admin FROM users")
        assert cursor.fetchall() == [(LOGIN[0], True)]
    with ExitStack() as both:
        ports = [tracking_servers.free_port() for _ in range(2)]
        for port in ports:
            both.enter_context(pods.started(server, tmp_path / f"server-{port}.log", port))
        for port in ports:
            log = tmp_path / f"server-{port}.log"
            wait_until(lambda port=port: _experiments(port), lambda names: names == ["Default"], 300)
            assert "Creating initial MLflow database tables" not in log.read_text()


def _experiments(port: int) -> list[str] | str:
    """What somebody who has logged in finds, or what came in place of it."""
    query = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=10"
    try:
        answer = requests.get(query, auth=LOGIN, headers={"Host": "mlflow:5000"}, timeout=30)
    except requests.RequestException as error:
        return str(error)
    return [one["name"] for one in answer.json()["experiments"]] if answer.ok else answer.text
