"""doctor asks the nodes of a real cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ray.clusters import free_port
from tests.ray.test_address import head  # noqa: F401

pytestmark = pytest.mark.timeout(300)


def doctor(*arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "orchestrator", "doctor", "--json", *arguments]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    return done.returncode, json.loads(done.stdout)


def test_every_node_is_asked_and_the_storage_tried_from_it(head: str, tmp_path: Path) -> None:  # noqa: F811
    exit_code, found = doctor("--address", head, "--storage", str(tmp_path))
    assert exit_code == 0
    (node,) = found["nodes"]
    assert node["hardware"]["cpus"] == 2
    assert next(a for a in node["settings"] if a["value"] == "fp32")["runs"]
    assert {check["what"].split()[0]: check["ok"] for check in found["checks"]} == {
        "cluster": True,
        "storage": True,
        "tracking": True,
        "packages": True,
    }
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_does_not_answer_ends_with_3_and_one_document(tmp_path: Path) -> None:
    exit_code, found = doctor("--address", f"127.0.0.1:{free_port()}", "--storage", str(tmp_path))
    assert exit_code == 3
    assert found["nodes"] == []
    assert not found["checks"][0]["ok"]
    assert "no Ray cluster answers" in found["checks"][0]["detail"]
