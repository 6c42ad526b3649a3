"""What every trial imports, for a process that trials are forked from: 6 s once in place of 6 s a trial.

Imports only: a template that computes leaves threads behind on which its children hang, and one that touches CUDA
leaves them a context that they cannot use.
"""

from __future__ import annotations

import contextlib
import os

from orchestrator.training import device

# Told, DeepSpeed does not look for itself, through CUDA.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.has_gpu() else "cpu")

import deepspeed
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import transformers.integrations.bitsandbytes
import transformers.integrations.deepspeed
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

from orchestrator.training import worker_process

with contextlib.suppress(ImportError):
    import bitsandbytes  # noqa: F401

worker_process.compile_no_ops()
