"""What every trial imports, for a process that trials are forked from: 6 s once in place of 6 s a trial.

Imports only: a template that computes leaves threads behind on which its children hang, and one that touches CUDA
leaves them a context that they cannot use.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

import torch

from orchestrator.planning.nvidia_smi import local_gpus
from orchestrator.training import device


@contextlib.contextmanager
def _as_fast_as_can_be() -> Iterator[None]:
    # DeepSpeed's autotuner, imported with it and not used, would import MLflow: a quarter of all time here (0.19.8).
    blocks_mlflow = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]
    # The collector would go over what is here to stay, again and again, and write to pages that trials share.
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if blocks_mlflow:
            del sys.modules["mlflow"]


@contextlib.contextmanager
def _without_cuda() -> Iterator[None]:
    """Answer what the libraries ask torch about the GPUs as they are imported, which it would make a context for."""
    kept = torch.cuda.get_device_capability, torch.cuda.device_count
    gpus, _ = local_gpus()
    if capabilities := [gpu.capability for gpu in gpus if gpu.capability]:
        # bitsandbytes asks, and takes its library for CPUs where nobody answers (0.50.2, cuda_specs.py).
        torch.cuda.get_device_capability = lambda device=None: min(capabilities)  # noqa: ARG005
    if os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-"):
        # Of MIG instances torch asks the CUDA runtime (2.13.0, cuda/__init__.py, _device_count_nvml); a process sees
        # one of them (NVIDIA's Multi-Instance GPU user guide, CUDA device enumeration).
        torch.cuda.device_count = lambda: 1
    try:
        yield
    finally:
        torch.cuda.get_device_capability, torch.cuda.device_count = kept


with _without_cuda(), _as_fast_as_can_be():
    # Told, DeepSpeed does not look for itself, through CUDA.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.has_gpu() else "cpu")
    import deepspeed
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
    import peft  # noqa: F401
    import transformers.integrations.bitsandbytes
    import transformers.integrations.deepspeed
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    from orchestrator.training import worker_process

    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401

worker_process.compile_no_ops()
