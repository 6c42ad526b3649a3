"""The template touches no GPU, or the processes forked from it could not use one. Torch's CUDA is a fake here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orchestrator.errors import TrialError
from orchestrator.training import device as devices

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

TEMPLATE_ON_A_GPU = """
import json
import torch

touched, loaded = [], []

def touch(*_):
    touched.append("cuda")
    raise RuntimeError("touched CUDA")

torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: True
torch.cuda._lazy_init = touch
torch.cuda._raw_device_count_nvml = lambda: 2
torch._C._cuda_getDeviceCount = touch
torch._C._cuda_getCurrentRawStream = None  # imported by torch._dynamo where torch is built with CUDA

import ctypes
load = ctypes.cdll.LoadLibrary
ctypes.cdll.LoadLibrary = lambda name: loaded.append(name) or load(name)

before = torch.cuda.get_device_capability, torch.cuda.device_count
import orchestrator.training.template
assert (torch.cuda.get_device_capability, torch.cuda.device_count) == before
print(json.dumps([touched, [name for name in loaded if "libbitsandbytes" in name]]))
"""

NVIDIA_SMI = """#!/bin/sh
case "$1" in
-L) echo "GPU 0: NVIDIA A100 (UUID: GPU-1)"; echo "  MIG 1g.5gb Device 0: (UUID: MIG-1)" ;;
*) echo "NVIDIA A100, 40960, 8.0, 580.65, Enabled" ;;
esac
"""


@pytest.mark.parametrize("visible", ["0", "0,1", "MIG-1"])
def test_a_template_on_gpus_makes_no_cuda_context_and_bitsandbytes_has_its_library_for_them(
    visible: str, tmp_path: Path
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(NVIDIA_SMI)
    smi.chmod(0o755)
    answer = subprocess.run(
        [sys.executable, "-c", TEMPLATE_ON_A_GPU],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": visible},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    touched, loaded = json.loads(answer.stdout.splitlines()[-1])
    assert touched == []
    assert [Path(name).name for name in loaded] == ["libbitsandbytes_cuda130.so"]


def test_a_trial_forked_from_a_process_that_touched_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(TrialError, match="let nvidia-smi answer on this node"):
        devices.choose(0, None, None)
