from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import ray
from ray._private import services

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.errors import ClusterUnreachableError, InputError
from orchestrator.planning.model_shape import shape_of
from orchestrator.planning.plan import plan_sweep
from orchestrator.submit.job import INSTALL_LIMIT_S, runtime_env
from orchestrator.sweep import cluster
from orchestrator.sweep.cluster import LOCAL, NODE_LIMIT_S, connect, node_limit_s, not_joined, placed, room_for
from orchestrator.sweep.preparation import rows_words, sequence_lengths, slots_for
from orchestrator.sweep.worker import GroupShape
from orchestrator.training.data import DataSummary
from tests.fast.cases import A100, LLAMA_2_7B
from tests.made_up_sweep import made_up_plan, made_up_sweep, made_up_trial

TWO_GPU_NODES = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}]


def test_a_run_says_at_its_start_that_few_rows_are_evaluated() -> None:
    few = DataSummary(28, 1, 500, (("a.txt:3", "empty"),), 1, "hash", "inputs")
    rows, told, left_out = rows_words(few)
    assert rows == "28 rows to train on, 1 to evaluate on"
    assert told.startswith("only 1 row to evaluate on: other rows may change the answer")
    assert left_out == "1 of the rows could not be read, left out (a.txt:3: empty)"
    assert len(list(rows_words(replace(few, eval_rows=30, skipped_count=0)))) == 1


@pytest.mark.parametrize(
    ("shape", "nodes", "groups"),
    [
        (GroupShape(1, 0, 1), [{"CPU": 2.0}], 2),
        (GroupShape(2, 0, 1), [{"CPU": 2.0}], 1),
        (GroupShape(1, 1, 4), TWO_GPU_NODES, 8),
        (GroupShape(4, 1, 8), TWO_GPU_NODES, 1),
        (GroupShape(1, 0.4, 1), TWO_GPU_NODES, 16),
        (GroupShape(1, 0.5, 1), [{"CPU": 3.0, "GPU": 4.0}], 3),
        (GroupShape(1, 1, 1, "A100"), [*TWO_GPU_NODES, {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0}], 2),
    ],
)
def test_as_many_groups_run_at_a_time_as_fit(shape: GroupShape, nodes: list[dict[str, float]], groups: int) -> None:
    assert room_for(shape, nodes) == groups


@pytest.mark.parametrize(
    ("workers", "nodes", "on_one_node", "groups"),
    [
        (2, TWO_GPU_NODES, True, 4),
        (3, TWO_GPU_NODES, True, 2),
        (5, TWO_GPU_NODES, False, 1),
        (8, [{"CPU": 8.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}], True, 1),
    ],
)
def test_a_trial_stays_on_one_node_where_one_has_room_for_it(
    workers: int, nodes: list[dict[str, float]], on_one_node: bool, groups: int
) -> None:
    shape = placed(GroupShape(workers, 1, 1), nodes)
    assert shape.on_one_node is on_one_node
    assert room_for(shape, nodes) == groups


@pytest.mark.parametrize(
    ("max_concurrent", "gpus", "slots"), [("auto", 0, 2), (5, 0, 5), ("auto", 1, 4)], ids=["cpus", "asked for", "gpus"]
)
def test_trials_that_share_the_hosts_memory_run_as_many_at_a_time_as_it_was_planned_for(
    monkeypatch: pytest.MonkeyPatch, max_concurrent: Any, gpus: int, slots: int
) -> None:
    monkeypatch.setattr(cluster, "nodes", lambda: [{"CPU": 8.0, "GPU": 4.0}])
    made = made_up_sweep([made_up_trial({"rank": 8})])
    planned = made_up_plan(made).model_copy(update={"concurrent": 2})
    raw = {"name": "s", "model": "m", "data": {"train": "t"}, "resources": {"max_concurrent": max_concurrent}}
    assert slots_for(SweepConfig.model_validate(raw), planned, GroupShape(1, gpus, 1)) == slots


@pytest.mark.parametrize(
    ("searched", "search", "lengths"),
    [
        ([32, 64, 128, 512], {"algorithm": "grid"}, {32, 64, 128, 512}),
        ([32, 64, 128, 512], {"algorithm": "tpe"}, {32, 64, 128, 512}),
        ({"log_int": [32, 512]}, {"algorithm": "tpe"}, {32, 512}),
        ({"choice": [32, 512], "when": {"rank": [8]}}, {"algorithm": "tpe"}, {32, 96, 512}),
        (None, {"algorithm": "tpe"}, {96}),
    ],
)
def test_the_lengths_of_a_search_are_those_of_its_space_and_not_of_its_first_examples(
    searched: Any, search: dict[str, str], lengths: set[int]
) -> None:
    space = {"rank": [8, 16], "sequence_length": searched} if searched else {"rank": [8, 16]}
    trial = {} if isinstance(searched, list) else {"sequence_length": 96}
    raw = {"name": "s", "model": "m", "data": {"train": "t"}, "trial": trial, "space": space, "search": search}
    sweep = SweepConfig.model_validate(raw | ({"budget": {"trials": 2}} if search["algorithm"] == "tpe" else {}))
    assert sequence_lengths(sweep, plan_sweep(sweep, shape_of(LLAMA_2_7B), A100)) == lengths


def test_a_trial_that_fits_nowhere_is_refused_with_what_the_cluster_has() -> None:
    with pytest.raises(InputError, match=r"4 CPUs and 0 GPUs.*lower resources"):
        room_for(GroupShape(1, 1, 1), [{"CPU": 4.0}])


def test_a_node_that_installs_the_jobs_packages_is_waited_for_as_long_as_that_may_take() -> None:
    def limit_s(*requirements: str) -> float:
        return node_limit_s(json.dumps({"runtime_env": runtime_env(Path(), requirements, None), "metadata": {}}))

    assert limit_s("torch==2.13") == INSTALL_LIMIT_S
    assert limit_s() == node_limit_s(json.dumps({"runtime_env": None})) == node_limit_s(None) == NODE_LIMIT_S


def test_a_cluster_that_does_not_answer_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(ClusterUnreachableError, match=f"127.0.0.1:{port}"):
        connect(f"127.0.0.1:{port}")


def test_a_killed_heads_address_that_auto_stands_for_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        left_behind = f"127.0.0.1:{taken.getsockname()[1]}"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(left_behind)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked, which tries for minutes"))
    for given, from_environment in (("auto", None), (None, "auto"), ("auto", left_behind)):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if from_environment:
            monkeypatch.setenv("RAY_ADDRESS", from_environment)
        with pytest.raises(
            ClusterUnreachableError, match=rf"{left_behind}.*auto stands for it.*name its host and port"
        ):
            connect(given)


def test_auto_without_any_cluster_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)
    with pytest.raises(ClusterUnreachableError, match=r"answers at auto.*ray start --head"):
        connect("auto")


@pytest.mark.parametrize("address", ["ray://head", "head"])
def test_an_address_without_a_port_is_told_so(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked, which tries for minutes"))
    with pytest.raises(ClusterUnreachableError, match=rf"{address} \(it names no port\)"):
        connect(address)


def test_a_cluster_of_another_version_is_not_told_to_be_absent() -> None:
    told = str(
        not_joined("head:6379", RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n"))
    )
    assert "Ray: 2.59.0" in told
    assert "orchestrator submit" in told
    assert "no Ray cluster answers" not in told


def test_a_home_that_is_no_folder_is_not_blamed_on_a_busy_machine() -> None:
    # What Ray raises where HOME is a file (2.60.0).
    told = str(not_joined(LOCAL, NotADirectoryError(20, "Not a directory", "/etc/passwd/.ray")))
    assert "/etc/passwd/.ray cannot be had (Not a directory)" in told
    assert "HOME" in told
    assert "busy" not in told
