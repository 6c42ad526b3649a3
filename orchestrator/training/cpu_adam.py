"""Whether DeepSpeed's AdamW for CPUs, which steps offloaded weights, was built ahead here.

Nothing is compiled in a trial: where it is not here, or is for another machine, torch's fused AdamW steps them.
"""

from __future__ import annotations

import importlib.util
import runpy
from dataclasses import dataclass
from pathlib import Path

from orchestrator.planning.hardware import cpu_flags

INSTRUCTIONS = frozenset({"avx2", "fma", "f16c"})
"""What the Dockerfile builds it with, as /proc/cpuinfo names them on x86-64; it is built for no other architecture."""


@dataclass(frozen=True, slots=True)
class BuiltAhead:
    """What an installation of DeepSpeed says of its ops."""

    has_cpu_adam: bool
    device: str
    """`cuda` or `cpu`. Where trials compute on another kind DeepSpeed compiles anew (0.19.8, op_builder/builder.py)."""
    torch: str
    """Major and minor version; with another one DeepSpeed refuses to load it."""


def can_load(built: BuiltAhead | None, device: str, torch_version: str, flags: frozenset[str]) -> bool:
    """Whether DeepSpeed loads it without compiling, and this CPU computes it.

    device: the kind that trials compute on.
    flags: what the CPU says of itself.
    """
    return (
        built is not None
        and built.has_cpu_adam
        and built.device == device
        and torch_version.split(".")[:2] == built.torch.split(".")
        and flags >= INSTRUCTIONS
    )


def is_here(device: str, torch_version: str) -> bool:
    """See `can_load`; without loading DeepSpeed or torch."""
    return can_load(_built_ahead(), device, torch_version, cpu_flags())


def _built_ahead() -> BuiltAhead | None:
    deepspeed = importlib.util.find_spec("deepspeed")
    if deepspeed is None or deepspeed.origin is None:
        return None
    try:
        # Assignments alone, which DeepSpeed's setup.py writes.
        told = runpy.run_path(str(Path(deepspeed.origin).with_name("git_version_info_installed.py")))
    except OSError:
        return None
    return BuiltAhead(
        has_cpu_adam=bool(told["installed_ops"].get("cpu_adam")),
        device=told["accelerator_name"],
        torch=told["torch_info"]["version"],
    )
