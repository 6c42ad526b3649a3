"""GPUs by name, memory as people write it, and what a CPU computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import InputError
from orchestrator.planning.hardware import (
    GIB,
    GPUS,
    LARGEST_MEMORY,
    MOST_CPUS,
    container_limit_bytes,
    container_limit_cpus,
    cpu_half_precision,
    hardware_for,
    named_gpu,
    parse_memory,
    this_machine,
    torch_knows_volta,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GiB", 80 * GIB),
        ("24GB", 24 * 10**9),
        ("1.5 GiB", 3 * GIB // 2),
        ("512MiB", 2**29),
        ("1TiB", 2**40),
        ("1000", 1000),
        ("16B", 16),
    ],
)
def test_a_size_of_memory_is_read_as_written(text: str, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "0GiB", "-1GiB", "GiB", "80 gibs", "nan", "1e3GiB", "8O", "99999999999TiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write it as 80GiB"):
        parse_memory(text)


@pytest.mark.parametrize("name", ["H100", "h100", "NVIDIA H100", "RTX-4090", "rtx4090", "NVIDIA GeForce RTX 4090"])
def test_a_gpu_is_known_by_any_spelling(name: str) -> None:
    assert named_gpu(name, 1).gpu_name in GPUS


@pytest.mark.parametrize(
    ("driver", "ours"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("A100-40G", "A100-40GB"),
        ("A100-80G", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("Tesla V100-PCIE-16GB", "V100-PCIe"),
        ("Tesla T4", "T4"),
        ("NVIDIA A30", "A30"),
        ("NVIDIA GeForce RTX 5090", "RTX-5090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX-PRO-6000"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GH200 144G HBM3e", "GH200-144GB"),
        ("NVIDIA H20-3e", "H20-3e"),
        ("NVIDIA H20", "H20"),
    ],
)
def test_a_gpu_is_known_by_the_drivers_name_or_rays(driver: str, ours: str) -> None:
    assert named_gpu(driver, 1).gpu_name == ours


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("Tesla V100-SXM2-16GB", 16),
        ("V100", 32),
        ("NVIDIA GH200 480GB", 96),
        ("NVIDIA GH200 120GB", 96),
        ("NVIDIA GH200 144G HBM3e", 142.5),
        ("NVIDIA H20-3e", 141),
        ("H100-SXM5-96GB", 96),
        ("A100-40G", 40),
        ("NVIDIA A10G", 22.5),
        ("H100 NVL 94GB", 94),
        ("L4 24GB", 22.5),
        ("A10", 22.5),
    ],
)
def test_a_name_that_tells_its_memory_has_that(name: str, gib: float) -> None:
    # A card that the driver shows with a little less is not taken for another.
    assert named_gpu(name, 1).gpu_memory_bytes == gib * 2**30


@pytest.mark.parametrize("name", ["H100 NVL", "RTX 4090 Laptop GPU", "A100-9999GB", "A100-0GB", "GH200 9999GB"])
def test_a_namesake_with_another_memory_or_an_absurd_one_is_asked_for_it(name: str) -> None:
    with pytest.raises(InputError, match="say how much, as --gpu-memory"):
        named_gpu(name, 1)
    assert named_gpu(name, 1, 16 * 2**30).gpu_memory_bytes == 16 * 2**30


def test_one_gpu_is_named_and_not_two_or_how_many() -> None:
    with pytest.raises(InputError, match="say how many with --gpus"):
        named_gpu("2x H100", 1)
    with pytest.raises(InputError, match="is not known"):
        named_gpu("H100,A100", 1)


def test_a_gpu_without_a_name_or_of_80_bytes_is_refused() -> None:
    with pytest.raises(InputError, match=r"'' .--gpu.* is not known"):
        hardware_for("", None, None)
    with pytest.raises(InputError, match="80 bytes, less than any GPU has: write it as 80GiB"):
        hardware_for("H100", None, "80")


def test_an_unknown_gpu_is_answered_with_the_nearest_and_all_that_are_known() -> None:
    with pytest.raises(InputError) as told:
        named_gpu("H1000", 1)
    assert "did you mean H100?" in str(told.value)
    assert all(known in str(told.value) for known in GPUS)


@pytest.mark.parametrize("name", GPUS)
def test_the_table_holds_no_absurd_figure(name: str) -> None:
    gpu = named_gpu(name, 16)
    assert gpu.nodes == 2
    assert gpu.has_bf16 == (gpu.compute_capability is not None and gpu.compute_capability >= (8, 0))
    assert 10 * GIB < (gpu.gpu_memory_bytes or 0) < 300 * GIB
    assert 5e13 < gpu.half_flops < 3e15
    assert 5e12 < gpu.fp32_flops < 1.3e14
    assert 2e11 < gpu.bandwidth_bytes_per_s < 1e13
    # A multiprocessor has 64 or 128 lanes that add and multiply in a cycle, of 1.2 to 2.8 GHz.
    per_cycle = gpu.fp32_flops / 2 / GPUS[name].multiprocessors
    assert 64 * 1.2e9 < per_cycle < 128 * 2.8e9
    assert gpu.resident_threads / GPUS[name].multiprocessors in {1024, 1536, 2048}


@pytest.mark.parametrize("name", ["V100", "A100", "A100-40GB", "H100"])
def test_a_card_in_a_slot_reaches_others_no_faster_than_the_slot(name: str) -> None:
    board, card = named_gpu(name, 2), named_gpu(name.replace("100", "100-PCIe"), 2)
    assert card.interconnect_bytes_per_s < board.interconnect_bytes_per_s / 4
    assert card.half_flops <= board.half_flops
    assert card.gpu_memory_bytes == board.gpu_memory_bytes


def test_named_memory_takes_the_place_of_the_tables() -> None:
    assert hardware_for("A100", 4, "40GiB").gpu_memory_bytes == 40 * GIB


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2"}, (False, False)),
        ({"avx512_bf16"}, (True, False)),
        ({"amx_bf16", "avx512_fp16"}, (True, True)),
        ({"asimdhp"}, (False, True)),
    ],
)
def test_a_cpus_flags_say_what_it_computes(flags: set[str], expected: tuple[bool, bool]) -> None:
    assert cpu_half_precision(frozenset(flags)) == expected


@pytest.mark.parametrize(
    ("file", "text", "limit_bytes"),
    [
        ("memory.max", "2147483648\n", 2**31),
        ("memory.max", "max\n", LARGEST_MEMORY),
        ("memory/memory.limit_in_bytes", "1073741824\n", 2**30),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", LARGEST_MEMORY),
        ("other", "1", LARGEST_MEMORY),
    ],
)
def test_a_containers_limit_is_its_memory(tmp_path: Path, file: str, text: str, limit_bytes: int) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert container_limit_bytes(tmp_path) == limit_bytes


@pytest.mark.parametrize(
    ("text", "knows"),
    [
        ("cuda: Optional[str] = '12.6'\n", True),
        ("cuda = '13.0'\n", False),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", False),
        ("", False),
    ],
)
def test_torch_built_for_cuda_12_knows_older_gpus(tmp_path: Path, text: str, knows: bool) -> None:
    (tmp_path / "version.py").write_text(text)
    assert torch_knows_volta(tmp_path / "version.py") is knows
    assert not torch_knows_volta(tmp_path / "missing.py")


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, MOST_CPUS),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, MOST_CPUS),
        ({"cpu.max": "much\n"}, MOST_CPUS),
        ({}, MOST_CPUS),
    ],
)
def test_a_containers_limit_is_its_cpus(tmp_path: Path, files: dict[str, str], limit: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert container_limit_cpus(tmp_path) == limit


def test_a_container_is_planned_for_the_cpus_that_it_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setattr("orchestrator.planning.hardware.CGROUP", tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert this_machine().cpus == 1


def test_an_accelerator_that_is_not_known_is_told_as_what_the_sweep_file_calls_it() -> None:
    with pytest.raises(InputError, match=r"MI250X \(--gpu, or else resources.accelerator\) is not known"):
        hardware_for("MI250X", None, None)


@pytest.mark.parametrize("flags", [{"avx2"}, {"avx512_bf16"}, {"avx512_fp16"}, {"asimdhp"}])
def test_a_worker_computes_what_the_plan_takes_its_cpu_to_compute(
    flags: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from orchestrator.training import device

    monkeypatch.setattr(device, "cpu_flags", lambda: frozenset(flags))
    found = device.half_precision(torch.device("cpu"))
    assert (found.bf16, found.fp16) == cpu_half_precision(frozenset(flags))
