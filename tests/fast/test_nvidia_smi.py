"""This machine's GPUs, by a stand-in for the driver's command that prints what NVIDIA's prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.planning import nvidia_smi
from orchestrator.planning.hardware import GIB, is_named, named_gpu, this_machine

H100 = "NVIDIA H100 80GB HBM3, 81559, 9.0, 570.86.15, Disabled\n"
Driver = Callable[..., None]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Puts an `nvidia-smi` in front of PATH."""

    def install(told: str, listing: str = "", exit_code: int = 0) -> None:
        (tmp_path / "told").write_text(told)
        (tmp_path / "listing").write_text(listing)
        command = tmp_path / "nvidia-smi"
        command.write_text(
            f"#!/bin/sh\ncase $1 in -L) cat {tmp_path}/listing ;; *) cat {tmp_path}/told ;; esac\nexit {exit_code}\n"
        )
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_each_gpu_has_its_memory_capability_and_driver(driver: Driver) -> None:
    driver(H100 * 2)
    gpus, problem = nvidia_smi.local_gpus()
    assert (len(gpus), problem) == (2, None)
    assert (gpus[0].name, gpus[0].memory_bytes) == ("NVIDIA H100 80GB HBM3", 81559 * 2**20)
    assert (gpus[0].compute_capability, gpus[0].capability, gpus[0].driver) == ("9.0", (9, 0), "570.86.15")


def test_a_machine_with_gpus_is_planned_for_them(driver: Driver) -> None:
    driver(H100 * 2)
    here = this_machine()
    assert (here.device, here.gpus, here.gpu_memory_bytes) == ("cuda", 2, 81559 * 2**20)
    assert here.half_flops == named_gpu("H100", 1).half_flops


def test_a_gpu_without_memory_of_its_own_has_the_hosts(driver: Driver) -> None:
    driver("NVIDIA GB10, [N/A], 12.1, 580.1, [N/A]\n")
    assert nvidia_smi.local_gpus()[0][0].memory_bytes is None
    here = this_machine()
    assert here.gpu_memory_bytes == here.host_memory_bytes
    assert here.compute_capability == (12, 1)


def test_mig_instances_stand_in_place_of_their_gpu(driver: Driver) -> None:
    """The listing's form is that of NVIDIA's Multi-Instance GPU user guide."""
    driver(
        "".join(f"NVIDIA A100-SXM4-80GB, 81920, 8.0, 570.86.15, {mode}\n" for mode in ("Enabled", "Disabled")),
        "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-5d5ba0d6)\n"
        "  MIG 3g.40gb     Device  0: (UUID: MIG-6a2ad8b4)\n"
        "  MIG 1g.10gb+me  Device  1: (UUID: MIG-b56a8b0c)\n"
        "GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-1b0c1f6e)\n",
    )
    gpus, _ = nvidia_smi.local_gpus()
    assert [gpu.name.removeprefix("NVIDIA A100-SXM4-80GB") for gpu in gpus] == [" MIG 3g.40gb", " MIG 1g.10gb+me", ""]
    assert [round((gpu.memory_bytes or 0) / GIB, 1) for gpu in gpus] == [38.0, 9.5, 80.0]
    here, whole = this_machine(), named_gpu("A100", 1)
    assert here.half_flops == pytest.approx(whole.half_flops * 3 / 7)
    assert here.bandwidth_bytes_per_s == pytest.approx(whole.bandwidth_bytes_per_s * 38 / 80)
    assert here.resident_threads == whole.resident_threads * 3 // 7
    assert not is_named("NVIDIA A100-SXM4-80GB", here)
    assert is_named("NVIDIA A100-SXM4-80GB MIG 3g.40gb", here)


def test_a_mig_gpu_that_tells_no_memory_of_its_own_has_its_instances(driver: Driver) -> None:
    driver(
        "NVIDIA A100-SXM4-40GB, [Insufficient Permissions], 8.0, 570.86.15, Enabled\n",
        "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6)\n  MIG 1g.5gb      Device  0: (UUID: MIG-6a2ad8b4)\n",
    )
    assert this_machine().gpu_memory_bytes == int(4.75 * GIB)


def test_a_driver_that_does_not_answer_is_told_and_leaves_a_machine_of_cpus(driver: Driver) -> None:
    driver("Failed to initialize NVML: Driver/library version mismatch\n", exit_code=18)
    gpus, problem = nvidia_smi.local_gpus()
    assert gpus == ()
    assert problem is not None
    assert "version mismatch: check the driver" in problem
    assert this_machine().device == "cpu"


def test_no_driver_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi.local_gpus() == ((), None)


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles", "7"])
def test_gpus_that_are_hidden_are_not_planned_for(hidden: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(H100 * 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert nvidia_smi.local_gpus() == ((), None)
    assert this_machine().device == "cpu"


@pytest.mark.parametrize(
    ("visible", "left"),
    [
        ("2", ["T4"]),
        ("0, 2", ["H100", "T4"]),
        ("GPU-1b0c", ["3g.40gb", "1g.10gb"]),
        ("MIG-b56a8b0c,GPU-77", ["1g.10gb", "T4"]),
        ("0,-1,2", ["H100"]),
        ("GPU-5d5ba0d6-2", []),
    ],
)
def test_of_gpus_that_are_visible_in_part_only_those_are_there(
    visible: str, left: list[str], driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(
        "H100, 81559, 9.0, 570.86.15, Disabled\n"
        "A100, 81920, 8.0, 570.86.15, Enabled\n"
        "T4, 15360, 7.5, 570.86.15, [N/A]\n",
        "GPU 0: H100 (UUID: GPU-5d5ba0d6)\n"
        "GPU 1: A100 (UUID: GPU-1b0c1f6e)\n"
        "  MIG 3g.40gb     Device  0: (UUID: MIG-6a2ad8b4)\n"
        "  MIG 1g.10gb     Device  1: (UUID: MIG-b56a8b0c)\n"
        "GPU 2: T4 (UUID: GPU-77b0c1f6)\n",
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus, _ = nvidia_smi.local_gpus()
    assert [gpu.name.rpartition(" ")[2] for gpu in gpus] == left
