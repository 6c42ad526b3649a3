"""The device that a worker computes on: what it can do, what it holds, and how it says that it is full."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator.errors import TemplateError
from orchestrator.planning.hardware import cpu_flags, cpu_half_precision, cpu_name
from orchestrator.training import cpu_adam
from orchestrator.training.deepspeed_config import HalfPrecision

_ALLOCATION_FAILED = re.compile(
    r"out of memory|can't allocate memory|not enough memory|bad_alloc|cannot allocate memory|ALLOC_FAILED", re.I
)
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", re.I)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD


@dataclass(frozen=True, slots=True)
class Peak:
    """What this worker held at most since `start_measuring`."""

    held_bytes: int
    reserved_bytes: int | None


def has_gpu() -> bool:
    """Whether a GPU is visible, asked so that a process that forks keeps no CUDA context."""
    # Read by torch.cuda.is_available: NVML, which survives a fork, and not the CUDA runtime, which does not.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return torch.cuda.is_available()


def choose(local_rank: int, gpu_memory_fraction: float | None, limit_bytes: int | None) -> torch.device:
    """This worker's device; no more may be allocated than the fraction of a shared GPU, nor than the limit."""
    if not has_gpu():
        if limit_bytes is not None:
            _limit_resident(limit_bytes)
        return torch.device("cpu")
    if torch.cuda._is_in_bad_fork():
        raise TemplateError(
            "a library touched CUDA while the template imported it, and processes forked after that cannot use a GPU: "
            "let nvidia-smi answer on this node, and install the versions in docker/constraints.txt"
        )
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    fraction = 1.0 if gpu_memory_fraction is None else gpu_memory_fraction
    if limit_bytes is not None:
        fraction = min(fraction, limit_bytes / torch.cuda.get_device_properties(device).total_memory)
    if fraction < 1:
        torch.cuda.set_per_process_memory_fraction(fraction, device)
    return device


def _limit_resident(limit_bytes: int) -> None:
    """Let this process grow to so many resident bytes: setrlimit(2), RLIMIT_DATA, counts private writable memory."""
    growth_bytes = max(0, limit_bytes - _status_bytes("VmRSS"))
    soft_bytes = _status_bytes("VmData") + growth_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (soft_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))


@contextlib.contextmanager
def giving_back_what_is_freed() -> Iterator[None]:
    """Blocks of 128 KiB and more go back to the system at once, rather than to glibc's heap, which keeps its holes.

    That size is where glibc starts; it raises it to that of any block that is freed, up to 32 MiB, and what the heap
    keeps at its end to twice as much (mallopt(3)). Work goes on with these ends, which do not ask the system for pages
    again and again. Where the C library has no such call nothing is done, and where jemalloc takes the heap's place it
    changes nothing.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is None:
        yield
        return
    tune(_MMAP_THRESHOLD, 128 * 2**10)
    try:
        yield
    finally:
        tune(_MMAP_THRESHOLD, 32 * 2**20)
        tune(_TRIM_THRESHOLD, 64 * 2**20)


def half_precision(device: torch.device) -> HalfPrecision:
    """What the device computes in hardware."""
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return HalfPrecision(bf16=major >= 8, fp16=major >= 6)
    bf16, fp16 = cpu_half_precision(cpu_flags())
    return HalfPrecision(bf16=bf16, fp16=fp16)


def has_cpu_adam(device: torch.device) -> bool:
    """Whether DeepSpeed's AdamW for CPUs is here, built ahead for trials on this kind of device."""
    return cpu_adam.is_here(device.type, torch.__version__)


def describe(device: torch.device) -> str:
    """As a person names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def start_measuring(device: torch.device) -> None:
    """Forget earlier peaks."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # proc(5): 5 resets the peak resident set size; where that is forbidden the peak is the process's whole life's.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(device: torch.device) -> Peak:
    """The largest memory since `start_measuring`."""
    if device.type == "cuda":
        return Peak(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
    return Peak(_status_bytes("VmHWM"), None)


def held_bytes(device: torch.device) -> int:
    """What is held now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    with contextlib.suppress(OSError), Path("/proc/self/status").open(encoding="utf-8") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch has no class of its own for that on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_ALLOCATION_FAILED.search(str(error)))


def asked_bytes(error: BaseException) -> int | None:
    """How much the failed allocation asked for, where the message says."""
    found = _ASKED.search(str(error))
    return int(float(found.group(1)) * _UNITS[found.group(2).lower()]) if found else None
