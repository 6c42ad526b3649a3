"""What doctor says: the words of plan, of hardware that is not here; storage, tracking and torch made to fail."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator import doctor
from orchestrator.cli import app
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.doctor import Answer, Check, Diagnosis, Node, Space
from orchestrator.planning import nvidia_smi
from orchestrator.planning.hardware import Hardware, named_gpu
from orchestrator.planning.model_shape import shape_of
from orchestrator.planning.plan import plan_sweep
from orchestrator.training import builtin_models
from tests.fast.cases import A100, CPU, CPU_WITH_HALF, V100

H100 = replace(named_gpu("H100", 8), has_flash_attention=True, has_bitsandbytes=True)
BARE = replace(H100, has_flash_attention=False, has_bitsandbytes=False)
MACHINES = {"cpu": CPU, "cpu-with-half": CPU_WITH_HALF, "v100": V100, "a100": A100, "h100": H100, "bare-h100": BARE}
NVIDIA_SMI = "NVIDIA H100 80GB HBM3, 81559, 9.0, 570.86.15, Disabled\n" * 2


def answer_of(hardware: Hardware, setting: str, value: str | int) -> Answer:
    found = doctor.answers(hardware, 2)
    return next(answer for answer in found if (answer.setting, answer.value) == (setting, value))


@pytest.mark.parametrize("hardware", MACHINES.values(), ids=MACHINES)
def test_doctor_and_plan_say_the_same(hardware: Hardware) -> None:
    shape = shape_of(builtin_models.CONFIGS["tiny-llama"])
    for answer in doctor.answers(hardware, 2):
        usual = doctor._usual_precision(hardware, 2)
        trial = TrialConfig.model_validate({**usual, **answer.together_with, answer.setting: answer.value})
        sweep = SweepConfig.model_validate(
            {
                "name": "x",
                "model": "builtin:tiny-llama",
                "data": {"train": "x"},
                "trial": trial,
                "resources": {"workers_per_trial": 2},
            }
        )
        (planned,) = plan_sweep(sweep, shape, hardware).trials
        assert (planned.reasons, planned.notes) == (answer.reasons, answer.notes), answer
        assert answer.runs == (not planned.reasons)


def test_every_value_of_every_setting_is_answered_once() -> None:
    found = [(answer.setting, answer.value) for answer in doctor.answers(CPU, 2)]
    assert len(set(found)) == len(found) == 7 + 2 + 4 + 3 + 3 + 3


@pytest.mark.parametrize(
    ("hardware", "setting", "value", "told"),
    [
        (CPU, "precision", "fp16", "use fp32"),
        (CPU, "attention", "flash_attention_2", "use sdpa"),
        (V100, "precision", "bf16", "use fp16"),
        (BARE, "attention", "flash_attention_2", "pip install --no-build-isolation flash-attn"),
        (BARE, "precision", "nf4", "pip install 'bitsandbytes>=0.50.2,<0.51'"),
    ],
    ids=str,
)
def test_a_no_has_its_reason_and_its_mend(hardware: Hardware, setting: str, value: str, told: str) -> None:
    answer = answer_of(hardware, setting, value)
    assert not answer.runs
    assert any(told in reason for reason in answer.reasons)


def test_a_device_without_fp16_is_sent_to_no_kind_of_it() -> None:
    (reason,) = answer_of(replace(CPU, has_bf16=True), "precision", "amp_fp16").reasons
    assert "does not compute fp16" in reason
    assert reason.endswith("use bf16 or fp32")


def test_an_old_gpu_is_not_refused_all_settings_for_its_precision() -> None:
    assert answer_of(V100, "engine", "ddp").runs
    assert answer_of(V100, "zero_stage", 3).runs


def test_a_gpu_that_torch_has_no_kernels_for_is_told_so_of_every_setting() -> None:
    found = doctor.answers(replace(V100, torch_knows_volta=False), 2)
    assert not any(answer.runs for answer in found)
    assert all(any("install torch for CUDA 12.6" in reason for reason in answer.reasons) for answer in found)


def test_what_runs_slowly_or_with_another_setting_says_so() -> None:
    assert "emulated" in answer_of(CPU, "precision", "bf16").notes[0]
    assert answer_of(H100, "offload", "optimizer_and_parameters").together_with == {"zero_stage": 3}
    assert answer_of(H100, "precision", "bf16").notes == ()
    assert answer_of(H100, "precision", "amp_fp16").together_with == {"zero_stage": 0}


def test_what_replaces_bf16_on_an_old_gpu_runs_there_with_all_else_as_it_is() -> None:
    (reason,) = answer_of(V100, "precision", "bf16").reasons
    named = re.split(r", | or ", reason.rpartition("; use ")[2])
    found = [answer_of(V100, "precision", value) for value in named]
    assert [(answer.runs, answer.together_with) for answer in found] == [(True, {})] * len(named)


@pytest.mark.parametrize("uri", ["http://localhost:5000x", "http://localhost:99999", "http://[::1"])
def test_a_tracking_address_that_is_none_is_the_checks_problem(uri: str, tmp_path: Path) -> None:
    check = doctor.tracking_check(uri, tmp_path)
    assert not check.ok
    assert "it is no address: " in check.detail


def test_a_tracking_host_that_can_be_none_is_the_checks_problem(tmp_path: Path) -> None:
    check = doctor.tracking_check("http://a..b/", tmp_path)
    assert not check.ok
    assert "cannot be used" in check.detail


def test_gpus_that_ray_hides_from_a_task_without_any_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    monkeypatch.setattr(doctor, "look", lambda *_: seen.append("CUDA_VISIBLE_DEVICES" in os.environ))
    for value in ("", "0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        doctor.look_from_a_task(str(tmp_path), None)
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("torch", "told"),
    [
        ({"cuda": None, "gpus": 0, "broken": {}}, "built for CPUs only: run scripts/setup"),
        ({"cuda": "13.0", "gpus": 0, "broken": {}}, "driver 570.86.15: update the driver"),
        ({"cuda": "13.0", "gpus": 2, "broken": {"flash-attn": "ImportError: undefined symbol"}}, "undefined symbol"),
    ],
    ids=["cpu-build", "old-driver", "broken-package"],
)
def test_a_torch_that_does_not_fit_the_machine_is_named(torch: dict[str, Any], told: str) -> None:
    (problem,) = doctor.torch_problems(torch, {"torch": "2.13.0"}, tuple(nvidia_smi.parse(NVIDIA_SMI)))
    assert told in problem


def a_node(host: str, hardware: Hardware = CPU, **fields: Any) -> Node:
    known: dict[str, Any] = {"gpus": (), "versions": {"torch": "2.13.0"}, "models": {"builtin:tiny-llama": "cached"}}
    return Node(host=host, hardware=hardware, **{**known, **fields})


@pytest.mark.parametrize(
    ("nodes", "said"), [(1, "1 node, 1 CPU, 1 GPU"), (2, "2 nodes, 2 CPUs, 2 GPUs")], ids=["one", "two"]
)
def test_a_cluster_is_told_by_its_nodes_and_what_they_have(
    nodes: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = pytest.importorskip("orchestrator.sweep.cluster")
    answers = [({"Resources": {"CPU": 1.0, "GPU": 1.0}}, a_node(f"node-{number}")) for number in range(nodes)]
    monkeypatch.setattr(cluster, "connect", lambda address: None)
    monkeypatch.setattr(cluster, "ask_every_node", lambda *asked: answers)
    found, check = doctor._cluster_nodes("auto", "sweeps", None)
    assert (check.ok, check.detail) == (True, said)
    assert [node.hardware.gpus for node in found] == [1] * nodes


def test_other_packages_on_a_node_are_told() -> None:
    here = {"python": "3.11.7", "torch": "2.13.0"}
    nodes = [a_node("one", versions=here), a_node("two", versions={"python": "3.12.1"})]
    check = doctor.versions_check(nodes, here)
    assert not check.ok
    assert "two has python 3.12.1 (here 3.11.7), torch missing (here 2.13.0)" in check.detail
    assert doctor.versions_check(nodes[:1], here).ok


def test_alike_nodes_are_told_once_and_a_head_without_work_says_so() -> None:
    gpus = tuple(nvidia_smi.parse(NVIDIA_SMI))
    h100 = replace(H100, gpus=2)
    workers = [a_node(f"worker-{i}", replace(h100, host_memory_bytes=2**36 + i), gpus=gpus) for i in (1, 2)]
    nodes = tuple(doctor._with_settings([*workers, a_node("head", replace(CPU, cpus=0))]))
    checks = (Check(what="storage /x", ok=False, asked=True, detail="cannot be written: name another"),)
    text = doctor.render(Diagnosis(cluster="auto", nodes=nodes, checks=checks))
    assert "worker-1, worker-2: 128 CPUs" in text
    assert "2 × NVIDIA H100 80GB HBM3 with 79.65 GiB, compute capability 9.0" in text
    assert "head: 0 CPUs" in text
    assert "no trial would run here" in text
    assert "storage /x  no     cannot be written: name another" in text
    assert text.count("attention flash_attention_2") == 1


def test_the_storage_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    where = tmp_path / "new" / "sweeps"
    found = doctor.examine(None, str(where), None)
    (check,) = (check for check in found.checks if check.what.startswith("storage"))
    assert check.ok
    assert check.detail.startswith("writable, ")
    assert list(tmp_path.iterdir()) == []
    where.mkdir(parents=True)
    (where / "mine").touch()
    doctor.examine(None, str(where), None)
    assert [file.name for file in where.iterdir()] == ["mine"]


def test_a_storage_that_nodes_do_not_share_is_found_out(tmp_path: Path) -> None:
    nodes = [a_node("one", storage=doctor._space(str(tmp_path / "other"), "token")), a_node("two", storage=None)]
    check = doctor._storage_check(str(tmp_path), True, nodes, "token", None)
    assert not check.ok
    assert "on one it is another folder than where the command runs" in check.detail
    # The mark was seen, and what the node wrote is not here: two folders that were copied from each other.
    check = doctor._storage_check(
        str(tmp_path), True, [a_node("one", storage=Space(free_bytes=1, total_bytes=2))], "t", None
    )
    assert "of 1 node that wrote there, 0 can be read" in check.detail


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        # Bound and not listening: refused at once, and nobody else can take it.
        yield int(taken.getsockname()[1])


def test_what_was_asked_for_and_cannot_be_reached_ends_with_3(tmp_path: Path, closed_port: int) -> None:
    (tmp_path / "file").touch()
    uri = f"http://user:secret@127.0.0.1:{closed_port}"
    words = ["doctor", "--json", "--storage", str(tmp_path / "file" / "sweeps"), "--tracking-uri", uri]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 3
    checks = {check["what"].split()[0]: check for check in json.loads(result.stdout)["checks"]}
    assert [check["ok"] for check in checks.values()] == [False, False]
    assert "name another with --storage" in checks["storage"]["detail"]
    assert "cannot be used" in checks["tracking"]["detail"]
    assert "secret" not in result.stdout + result.stderr


def test_a_machine_without_gpus_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert "precision fp32 " in result.stdout
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_a_built_in_model_says_whether_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    assert doctor._model_state("tiny-llama") == "made at first use"
    builtin_models.folder_of("tiny-llama", tmp_path).mkdir(parents=True)
    assert doctor._model_state("tiny-llama") == "cached"
    monkeypatch.setattr(builtin_models, "_SMOLLM2_PACKAGE", "no_such_package")
    assert "pip install" in doctor._model_state("smollm2-135m")
