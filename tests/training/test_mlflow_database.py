"""What Kubernetes runs before each of MLflow's servers, on a real PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg2
import pytest

from tests import tracking_servers
from tests.k8s.manifests import K8S, name_of, of_kind, render

pytestmark = pytest.mark.timeout(600)


def test_two_servers_that_start_at_once_on_an_empty_database_make_it_in_turn(tmp_path: Path) -> None:
    manifests = render(K8S / "overlays" / "production")
    (server,) = of_kind(manifests, "Deployment")
    container = server["spec"]["template"]["spec"]["initContainers"][0]
    (settings,) = (m["data"] for m in of_kind(manifests, "ConfigMap") if name_of(m) == "ConfigMap/mlflow")
    program, script = container["command"]
    assert (program, Path(script).parent) == ("python", Path("/etc/mlflow"))
    with tracking_servers.made_postgresql() as database, database.running():
        there = "postgresql+psycopg2://mlflow@postgres:5432/mlflow"
        for name, text in settings.items():
            (tmp_path / name).write_text(text.replace(there, database.uri))
        environment = {variable["name"]: variable.get("value", "of-this-test") for variable in container["env"]}
        assert environment["MLFLOW_BACKEND_STORE_URI"] == there
        environment |= {"MLFLOW_BACKEND_STORE_URI": database.uri, "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        environment["MLFLOW_AUTH_CONFIG_PATH"] = str(tmp_path / Path(environment["MLFLOW_AUTH_CONFIG_PATH"]).name)
        command = [sys.executable, str(tmp_path / Path(script).name)]

        def start() -> subprocess.Popen[str]:
            return subprocess.Popen(
                command, env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )

        for process in (start(), start()):
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said
        again, _ = (process := start()).communicate(timeout=300)
        assert process.returncode == 0, again
        assert "Creating initial MLflow database tables" not in again
        with psycopg2.connect(database.uri.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT experiment_id, artifact_location FROM experiments")
            assert cursor.fetchall() == [(0, "mlflow-artifacts:/0")]
            cursor.execute("SELECT username, is_admin FROM users")
            assert cursor.fetchall() == [("of-this-test", True)]
