"""This machine's GPUs, as NVIDIA's driver tells of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

ASK_LIMIT_S = 10.0
MIG_SLICES = 7
"""Of a GPU's compute units (NVIDIA's Multi-Instance GPU user guide, partitioning)."""
MIG_MEMORY_SHARE = 0.95
"""Of the gigabytes in an instance's name, what it has in GiB at least: 1g.5gb of an A100 has 4,864 MiB, 2g.10gb 9,984
(the same guide's listings)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one MIG instance of it."""

    name: str
    memory_bytes: int | None
    """None: it shares the host's."""
    compute_capability: str
    driver: str
    compute_share: float = 1.0
    """Of the GPU's compute units."""

    @property
    def capability(self) -> tuple[int, int] | None:
        """As numbers, where the driver tells it."""
        found = re.fullmatch(r"(\d+)\.(\d+)", self.compute_capability)
        return (int(found[1]), int(found[2])) if found else None


def local_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """The GPUs that CUDA_VISIBLE_DEVICES does not hide, and why a driver that is there does not answer."""
    # The driver tells of all of them; Ray and torch see only these.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or shutil.which("nvidia-smi") is None:
        return (), None
    fields = "name,memory.total,compute_cap,driver_version,mig.mode.current"
    try:
        told = _ask(f"--query-gpu={fields}", "--format=csv,noheader,nounits")
        needs_listing = re.search(r"\bEnabled\s*$", told, re.MULTILINE) or re.search("[A-Z]", visible or "")
        listing = _ask("-L") if needs_listing else ""
    except subprocess.CalledProcessError as error:
        return (), f"nvidia-smi: {' '.join((error.stdout + error.stderr).split())}: check the driver"
    except (OSError, subprocess.SubprocessError) as error:
        return (), f"nvidia-smi does not answer ({error}): check the driver"
    return tuple(parse(told, listing, visible)), None


def _ask(*arguments: str) -> str:
    command = ["nvidia-smi", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=ASK_LIMIT_S).stdout


def parse(told: str, listing: str = "", visible: str | None = None) -> Iterator[Gpu]:
    """The lines of its query (name, MiB, compute capability, driver, MIG mode), and of `nvidia-smi -L`, which alone
    names MIG instances, which stand in place of their GPU, and UUIDs; `visible` is CUDA_VISIBLE_DEVICES."""
    listed = re.split(r"(?m)^(?=GPU \d+:)", listing)[1:]
    for number, line in enumerate(told.splitlines()):
        name, mebibytes, capability, driver = [part.strip() for part in line.split(",")][:4]
        # GPUs that share the host's memory say [N/A].
        memory_bytes = int(mebibytes) * 2**20 if mebibytes.isdecimal() else None
        whole = Gpu(name, memory_bytes, capability, driver)
        own, *instances = listed[number].splitlines() if number < len(listed) else [""]
        profiles = [found for instance in instances if (found := re.match(r"\s+MIG (\S+)", instance))]
        for profile in profiles:
            if _is_visible(visible, number, own, profile.string):
                yield _instance(whole, profile[1])
        if not profiles and _is_visible(visible, number, own):
            yield whole


def _is_visible(visible: str | None, number: int, *listed: str) -> bool:
    """By number or by the beginning of a UUID; CUDA looks no further than the first that is neither."""
    if visible is None:
        return True
    named = takewhile(re.compile("[0-9]|GPU-|MIG-").match, map(str.strip, visible.split(",")))
    return any(entry == str(number) or any(f"(UUID: {entry}" in line for line in listed) for entry in named)


def _instance(whole: Gpu, profile: str) -> Gpu:
    """Such as 3g.40gb: three slices of the compute units, and 40 GB."""
    slices, gigabytes = re.search(r"(\d+)g\.", profile), re.search(r"(\d+)gb", profile)
    return Gpu(
        f"{whole.name} MIG {profile}",
        int(int(gigabytes[1]) * MIG_MEMORY_SHARE * 2**30) if gigabytes else whole.memory_bytes,
        whole.compute_capability,
        whole.driver,
        int(slices[1]) / MIG_SLICES if slices else 1.0,
    )
