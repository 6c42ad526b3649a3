"""The template touches no GPU, or the processes forked from it could not use one. Torch's CUDA is a fake here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orchestrator.results.records import TrialStatus
from orchestrator.training import device as devices
from orchestrator.training import trial_log
from orchestrator.training.task import TrialEnd, WorkerPlace
from orchestrator.training.worker_process import run
from tests.training.conftest import tiny
from tests.training.launch import make_task

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


def test_a_trial_forked_from_a_process_that_touched_cuda_says_so_and_gets_another_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(trial_log, "redirect_output", lambda file: None)
    sent: list[object] = []
    run(
        make_task(tiny(), tmp_path, tmp_path, tmp_path / "trial"),
        WorkerPlace(0, 1, 0, "127.0.0.1", 0, "t"),
        sent.append,
    )
    (end,) = sent
    assert isinstance(end, TrialEnd)
    assert "let nvidia-smi answer on this node" in (end.reason or "")
    # Upon which its slot closes its group, and the next one's template asks nvidia-smi again.
    assert end.status is TrialStatus.PREEMPTED


LIBRARY_IS_MISSING = """
import gc, sys, torch

def state():
    return torch.cuda.get_device_capability, torch.cuda.device_count, gc.isenabled(), "mlflow" in sys.modules

before = state()
sys.modules["peft"] = None
try:
    import orchestrator.training.template
except ImportError:
    assert state() == before, state()
"""


def test_a_template_whose_imports_fail_leaves_torch_and_python_as_they_were() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "MIG-1"}
    command = [sys.executable, "-c", LIBRARY_IS_MISSING]
    done = subprocess.run(command, env=environment, timeout=100, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
