"""What the trials would run on: this machine, a cluster's, or a GPU that is only named."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal

import psutil

from orchestrator.errors import InputError, cut, shown
from orchestrator.planning.nvidia_smi import Gpu, local_gpus

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
NAMED_HOST_BYTES = 128 * GIB
"""Host memory for each GPU that is only named."""
NAMED_NODE_GPUS = 8
"""Of a node whose GPUs are only named, as an HGX board has."""
LARGEST_MEMORY = 2**50
"""Bytes; more than any device has."""
MOST_CPUS = 2**20
"""More than any node has."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One worker's device, and how much of it the cluster has."""

    device: Literal["cuda", "cpu"]
    gpus: int
    cpus: int
    nodes: int
    host_memory_bytes: int
    """Of one node."""
    has_bf16: bool
    """The device computes it; emulated does not count."""
    has_fp16: bool
    cpu_name: str | None = None
    gpu_name: str | None = None
    gpu_memory_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    resident_threads: int = 108 * 2048
    """That its multiprocessors hold at once; an A100's where nobody knows the GPU."""
    half_flops: float = 0.0
    """Dense half-precision matrix FLOP/s of one GPU, as its data sheet says."""
    fp32_flops: float = 0.0
    bandwidth_bytes_per_s: float = 0.0
    interconnect_bytes_per_s: float = 0.0
    """Between two GPUs of a node, one way."""
    is_assumed: bool = False
    """Nobody has looked at it: its CPUs and host memory are assumed."""
    full_node_gpus: int | None = None
    """GPUs of each node but the last, which has the rest; None: CPUs and GPUs lie as evenly as they can."""
    has_flash_attention: bool | None = None
    """None: unknown, as of a GPU that is only named."""
    has_bitsandbytes: bool | None = None
    torch_knows_volta: bool | None = None
    """torch is built with kernels for GPUs before Turing, as that of PyPI is not."""

    @property
    def each_node(self) -> tuple[tuple[int, int], ...]:
        """CPUs and GPUs of each node."""
        if self.full_node_gpus is None:
            cpus, gpus = (_evenly(there, self.nodes) for there in (self.cpus, self.gpus))
        else:
            full = [self.full_node_gpus] * (self.nodes - 1)
            gpus = [*full, self.gpus - sum(full)]
            cpus = [self.cpus * held // self.gpus for held in gpus]
        return tuple(zip(cpus, gpus, strict=True))

    @property
    def is_before_turing(self) -> bool:
        """Whether it has a GPU of a compute capability below 7.5, as Volta's."""
        return self.compute_capability is not None and self.compute_capability < (7, 5)

    @property
    def is_before_ampere(self) -> bool:
        """Whether it has a GPU of a compute capability below 8.0, as Volta's and Turing's."""
        return self.compute_capability is not None and self.compute_capability < (8, 0)

    @property
    def has_nvlink(self) -> bool:
        """Whether GPUs of a node reach each other faster than by PCIe; taken for granted where nobody knows."""
        return not 0 < self.interconnect_bytes_per_s <= PCIE_BYTES_PER_S


def _evenly(there: int, nodes: int) -> list[int]:
    return [there // nodes + (node < there % nodes) for node in range(nodes)]


@dataclass(frozen=True, slots=True)
class _Gpu:
    memory_gib: float
    capability: tuple[int, int]
    multiprocessors: int
    half_tflops: float
    fp32_tflops: float
    bandwidth_gb_per_s: float
    link_gb_per_s: float


# NVIDIA's data sheets: memory, compute capability, multiprocessors, dense half-precision tensor TFLOP/s, fp32 TFLOP/s,
# GB/s of memory, and GB/s one way to another GPU: half of what is printed for NVLink; 16, 32 or 64 for PCIe 3, 4 or 5
# with 16 lanes.
GPUS = {
    "T4": _Gpu(15, (7, 5), 40, 65, 8.1, 300, 16),
    "V100": _Gpu(32, (7, 0), 80, 125, 15.7, 900, 150),
    "V100-PCIe": _Gpu(32, (7, 0), 80, 112, 14, 900, 16),
    "A10": _Gpu(22.5, (8, 6), 72, 125, 31.2, 600, 32),
    "A10G": _Gpu(22.5, (8, 6), 80, 70, 35, 600, 32),
    "A100-40GB": _Gpu(40, (8, 0), 108, 312, 19.5, 1555, 300),
    "A100": _Gpu(80, (8, 0), 108, 312, 19.5, 2039, 300),
    "A100-PCIe-40GB": _Gpu(40, (8, 0), 108, 312, 19.5, 1555, 32),
    "A100-PCIe": _Gpu(80, (8, 0), 108, 312, 19.5, 1935, 32),
    "A30": _Gpu(24, (8, 0), 56, 165, 10.3, 933, 32),
    "A6000": _Gpu(48, (8, 6), 84, 155, 38.7, 768, 32),
    "RTX-3090": _Gpu(24, (8, 6), 82, 71, 35.6, 936, 32),
    "RTX-4080": _Gpu(16, (8, 9), 76, 97, 48.7, 717, 32),
    "RTX-4090": _Gpu(24, (8, 9), 128, 165, 82.6, 1008, 32),
    "RTX-5090": _Gpu(32, (12, 0), 170, 209.5, 104.8, 1792, 64),
    "RTX-6000-Ada": _Gpu(48, (8, 9), 142, 364, 91.1, 960, 32),
    "RTX-PRO-6000": _Gpu(96, (12, 0), 188, 504, 125, 1792, 64),
    "L4": _Gpu(22.5, (8, 9), 58, 121, 30.3, 300, 32),
    "L40S": _Gpu(45, (8, 9), 142, 362, 91.6, 864, 32),
    "H100": _Gpu(80, (9, 0), 132, 989, 67, 3350, 450),
    "H100-PCIe": _Gpu(80, (9, 0), 114, 756, 51, 2000, 64),
    "H20": _Gpu(96, (9, 0), 78, 148, 44, 4000, 450),
    # Its faster memory's speed is not printed.
    "H20-3e": _Gpu(141, (9, 0), 78, 148, 44, 4000, 450),
    "GH200": _Gpu(96, (9, 0), 132, 989, 67, 4000, 450),
    # 153,008,209,920 bytes by the driver.
    "GH200-144GB": _Gpu(142.5, (9, 0), 132, 989, 67, 4900, 450),
    "H200": _Gpu(141, (9, 0), 132, 989, 67, 4800, 450),
    "B200": _Gpu(180, (10, 0), 148, 2250, 80, 8000, 900),
}


THREADS = {(7, 5): 1024, (8, 6): 1536, (8, 9): 1536, (12, 0): 1536}
"""That a multiprocessor holds at once; 2048 by other capabilities (CUDA programming guide, compute capabilities)."""
PCIE_BYTES_PER_S = 64e9
"""One way, of the fastest here, with 16 lanes."""
OTHER_SIZES = frozenset({"laptop", "mobile", "nvl"})
"""Words of a name by which a GPU has another memory than its namesake."""
LEAST_SHARE, LARGEST_SHARE = 1 / 4, 2
"""Of a GPU's memory in the table, what a namesake may have by its own name: a V100 half, an H100 a fifth more."""
GRACE_GB = frozenset({120, 480})
"""The memory of its CPU, by which the driver names a GH200 of 96 GB; one of 144 it names by the GPU's own."""


def hardware_for(gpu: str | None, gpus: int | None, memory: str | None) -> Hardware:
    """The named GPU so many times, or this machine where none is named.

    Raises:
        InputError: the name or the size of memory is not understood.
    """
    if gpu is not None:
        memory_bytes = None if memory is None else parse_memory(memory)
        if memory_bytes is not None and memory_bytes < GIB:
            raise InputError(
                f"--gpu-memory {shown(memory)} is {memory_bytes:,} bytes, less than any GPU has: write it as 80GiB"
            )
        return named_gpu(gpu, gpus or 1, memory_bytes)
    if gpus or memory:
        raise InputError("--gpus and --gpu-memory describe the GPU that --gpu names: name one, as --gpu H100")
    return this_machine()


def named_gpu(name: str, count: int, memory_bytes: int | None = None) -> Hardware:
    """A cluster of `count` GPUs of this name, ours or the driver's.

    Raises:
        InputError: the name is not known.
    """
    by_spelling = {_plain(known): known for known in GPUS}
    if re.search(r"(?i)\b\d+ ?x\b|\bx ?\d+\b", name):
        raise InputError(f"--gpu {cut(name)} names more than the GPU: name it alone, and say how many with --gpus")
    found = by_spelling.get(_plain(name)) or _meant(name)
    if found is None:
        near = get_close_matches(_plain(name), by_spelling, n=1)
        hint = f"; did you mean {by_spelling[near[0]]}?" if near else ""
        told = f"{cut(name) or repr(name)} (--gpu, or else resources.accelerator) is not known{hint}"
        raise InputError(f"{told}; known: {', '.join(GPUS)}: name the nearest with --gpu")
    gpu = GPUS[found]
    memory_bytes = memory_bytes or _named_bytes(name, gpu)
    if memory_bytes is None:
        raise InputError(f"--gpu {cut(name)} has another memory than the {found}: say how much, as --gpu-memory 16GiB")
    return Hardware(
        device="cuda",
        gpus=count,
        cpus=16 * count,
        nodes=-(-count // NAMED_NODE_GPUS),
        host_memory_bytes=NAMED_HOST_BYTES * min(count, NAMED_NODE_GPUS),
        is_assumed=True,
        full_node_gpus=NAMED_NODE_GPUS,
        has_bf16=gpu.capability >= (8, 0),
        has_fp16=True,
        gpu_name=found,
        gpu_memory_bytes=memory_bytes,
        compute_capability=gpu.capability,
        resident_threads=_threads(gpu, gpu.capability),
        half_flops=gpu.half_tflops * 1e12,
        fp32_flops=gpu.fp32_tflops * 1e12,
        bandwidth_bytes_per_s=gpu.bandwidth_gb_per_s * 1e9,
        interconnect_bytes_per_s=gpu.link_gb_per_s * 1e9,
    )


def _named_bytes(name: str, gpu: _Gpu) -> int | None:
    """The known size, or another that the name holds (V100-SXM2-16GB); None where it is known to be another, or the
    name holds one that no such GPU has."""
    sizes = [int(size) for size in re.findall(r"(?i)(?<![a-z0-9])(\d+) ?G(?:I?B)?\b", name)]
    if "gh200" in _words(name):
        sizes = [size for size in sizes if size not in GRACE_GB]
    if not sizes:
        return None if _words(name) & OTHER_SIZES else int(gpu.memory_gib * GIB)
    share = sizes[0] / gpu.memory_gib
    # Drivers show up to a sixteenth less than is printed, for error correction.
    if abs(share - 1) <= 1 / 8:
        return int(gpu.memory_gib * GIB)
    return sizes[0] * GIB if LEAST_SHARE <= share <= LARGEST_SHARE else None


def _like(name: str) -> str:
    """The known GPU whose speed stands for that of a driver's name: the one that is meant, or the nearest."""
    name = name.partition(" MIG ")[0]
    near = get_close_matches(_plain(name), [_plain(known) for known in GPUS], n=1, cutoff=0.3)
    return _meant(name) or next((known for known in GPUS if near and _plain(known) == near[0]), "A10G")


def _meant(name: str) -> str | None:
    """A100 by NVIDIA A100-SXM4-80GB; a MIG instance is another device than its GPU."""
    words = _words(name)
    if "mig" in words:
        return None
    named = [known for known in GPUS if _words(known) <= words]
    most = [known for known in named if not any(_words(known) < _words(other) for other in named)]
    return most[0] if len(most) == 1 else None


def is_named(device: str, hardware: Hardware) -> bool:
    """Whether a device that a trial named is this hardware's."""
    if hardware.gpu_name is None:
        return device == hardware.cpu_name
    return device == hardware.gpu_name or _meant(device) == _meant(hardware.gpu_name) is not None


def _words(name: str) -> set[str]:
    """Ray says 40G where the driver says 40GB."""
    return {re.sub(r"^(\d+)g$", r"\1gb", word) for word in re.split(r"[^a-z0-9]+", name.lower())}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|nvidia|geforce|tesla", "", name.lower())


def parse_memory(text: str) -> int:
    """`80GiB`, `24GB` or a number of bytes.

    Raises:
        InputError: it is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B?)\s*", text)
    if not found or float(found[1]) <= 0:
        raise InputError(f"{shown(text)} is no size of memory: write it as 80GiB")
    power = " KMGT".index(found[2][0]) if found[2] not in ("", "B") else 0
    size = float(found[1]) * (1024 if "i" in found[2] else 1000) ** power
    if not 1 <= size <= LARGEST_MEMORY:
        raise InputError(f"{shown(text)} is no memory that a GPU has: write it as 80GiB")
    return int(size)


def this_machine() -> Hardware:
    """What is here, asked without loading torch."""
    cpus = min(os.cpu_count() or 1, container_limit_cpus(CGROUP))
    memory = min(psutil.virtual_memory().total, container_limit_bytes(CGROUP))
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    gpus, _ = local_gpus()
    if not gpus:
        has_bf16, has_fp16 = cpu_half_precision(cpu_flags())
        return Hardware(
            "cpu", 0, cpus, 1, memory, has_bf16, has_fp16, cpu_name=cpu_name(), has_bitsandbytes=has_bitsandbytes
        )
    return _driven(gpus[0], len(gpus), cpus, memory, has_bitsandbytes)


def _driven(gpu: Gpu, count: int, cpus: int, host_memory_bytes: int, has_bitsandbytes: bool) -> Hardware:
    """A node with so many of them; the data sheet of the GPU that is meant tells their speed."""
    like = GPUS[_like(gpu.name)]
    torch = importlib.util.find_spec("torch")
    capability = gpu.capability or like.capability
    memory_bytes = host_memory_bytes if gpu.memory_bytes is None else gpu.memory_bytes
    # An instance has a part of the memory's channels, as of the memory.
    channels = min(1.0, memory_bytes / (like.memory_gib * GIB)) if gpu.compute_share < 1 else 1.0
    return Hardware(
        device="cuda",
        gpus=count,
        cpus=cpus,
        nodes=1,
        host_memory_bytes=host_memory_bytes,
        has_bf16=capability >= (8, 0),
        has_fp16=True,
        gpu_name=gpu.name,
        gpu_memory_bytes=memory_bytes,
        compute_capability=capability,
        resident_threads=int(_threads(like, capability) * gpu.compute_share),
        half_flops=like.half_tflops * gpu.compute_share * 1e12,
        fp32_flops=like.fp32_tflops * gpu.compute_share * 1e12,
        bandwidth_bytes_per_s=like.bandwidth_gb_per_s * channels * 1e9,
        interconnect_bytes_per_s=like.link_gb_per_s * 1e9,
        has_flash_attention=importlib.util.find_spec("flash_attn") is not None,
        has_bitsandbytes=has_bitsandbytes,
        torch_knows_volta=torch is not None and torch_knows_volta(Path(torch.origin or "").with_name("version.py")),
    )


def _threads(gpu: _Gpu, capability: tuple[int, int]) -> int:
    return gpu.multiprocessors * THREADS.get(capability, 2048)


def torch_knows_volta(version_file: Path) -> bool:
    """Whether torch is built for a CUDA before 13, as its version file says: importing it takes seconds."""
    try:
        found = re.search(r"(?m)^cuda\b.*['\"](\d+)\.", version_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return found is not None and int(found[1]) < 13


def container_limit_bytes(cgroup: Path) -> int:
    """What the container's control group may hold (version 2, then 1), beyond which the kernel kills; LARGEST_MEMORY
    where there is no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (cgroup / name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        return min(LARGEST_MEMORY, int(text)) if text.isdigit() else LARGEST_MEMORY
    return LARGEST_MEMORY


def container_limit_cpus(cgroup: Path) -> int:
    """CPUs that the container's control group may use (version 2, then 1), whole and one at least, as Ray counts them
    (2.60.0, _private/utils.py, `get_num_cpus`); MOST_CPUS where there is no limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text(encoding="ascii") for name in names).split()
        except (OSError, ValueError):
            continue
        # No limit is `max` in version 2, and -1 in version 1.
        limited = quota.isdigit() and period.isdigit() and int(period) > 0
        return max(1, int(quota) // int(period)) if limited else MOST_CPUS
    return MOST_CPUS


@cache
def cpu_flags() -> frozenset[str]:
    """What this machine's CPU says of itself; empty where it says nothing."""
    return frozenset(_of_the_cpu("flags|Features").split())


@cache
def cpu_name() -> str:
    """This machine's CPU, as its maker names it, or its architecture."""
    return _of_the_cpu("model name") or platform.processor() or platform.machine()


def _of_the_cpu(field: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^(?:{field})\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def cpu_half_precision(flags: frozenset[str]) -> tuple[bool, bool]:
    """Whether a CPU with these flags computes bf16 and fp16, rather than emulating them.

    Source: oneDNN's ISA dispatch (avx512_core_bf16, avx512_core_fp16, avx10_1_512_amx_fp16), which torch asks.
    """
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}), bool(flags & {"avx512_fp16", "amx_fp16", "asimdhp"})
