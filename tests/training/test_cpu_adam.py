"""Offloaded weights stepped by DeepSpeed's AdamW for CPUs, as where it was built ahead, and by torch's."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from orchestrator.results.folders import TrialFolder
from orchestrator.training.task import TrialTask, WorkerPlace
from tests.training.conftest import tiny
from tests.training.launch import in_workers, make_task

# Two large C++ files, where other tests run beside.
pytestmark = pytest.mark.timeout(900)
STAGES = [
    pytest.param({"zero_stage": 2, "offload": "optimizer"}, id="zero2"),
    pytest.param({"zero_stage": 3, "offload": "optimizer_and_parameters"}, id="zero3"),
]
STEPS, FIRST_STEPS = 40, 30


# In a process of its own, which loads what trials must not.
COMPILE = """
import sys
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch.utils import cpp_extension

builder = CPUAdamBuilder()
sources = [builder.deepspeed_src_path(source) for source in builder.sources()]
headers = [builder.deepspeed_src_path(folder) for folder in builder.include_paths()]
# What is compared takes no time: without the optimizations and symbols that take long to compile.
flags = [{"-O3": "-O1", "-g": "-g0"}.get(flag, flag) for flag in builder.cxx_args()]
cpp_extension.load("cpu_adam_op", sources, flags, extra_include_paths=headers, build_directory=sys.argv[1])
"""


@pytest.fixture(scope="session")
def cpu_adam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The op as a library: built ahead as in the image, or compiled for this machine."""
    if (installed := importlib.util.find_spec("deepspeed.ops.adam.cpu_adam_op")) and installed.origin:
        return Path(installed.origin)
    if missing := [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]:
        pytest.skip(f"DeepSpeed's op is not built ahead here, and compiling it takes {' and '.join(missing)}")
    folder = tmp_path_factory.mktemp("cpu_adam")
    subprocess.run([sys.executable, "-c", COMPILE, str(folder)], check=True, capture_output=True)
    return folder / "cpu_adam_op.so"


def _trial(place: WorkerPlace, pipe: Connection, task: TrialTask, library: Path | None) -> None:
    """Run it with the op in this library, or with torch's AdamW; and send which one goes on, and whether fused."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    from orchestrator.training import device, engine, worker_process

    device.has_cpu_adam = lambda _: library is not None

    def no_compiler(*_: object) -> None:
        raise AssertionError("a trial compiles nothing")

    OpBuilder.jit_load = no_compiler
    if library is not None:
        # As where DeepSpeed finds it installed.
        spec = importlib.util.spec_from_file_location("cpu_adam_op", library)
        assert spec
        assert spec.loader
        OpBuilder._loaded_ops["cpu_adam"] = op = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(op)
    load_state = engine.DeepSpeedEngine.load_state

    def load(self: engine.DeepSpeedEngine, state: dict[str, Any]) -> None:
        load_state(self, state)
        stepping = self._engine.basic_optimizer
        pipe.send((type(stepping).__name__, stepping.param_groups[0].get("fused")))

    engine.DeepSpeedEngine.load_state = load
    worker_process.run(task, place, pipe.send)


def _ran(task: TrialTask, library: Path | None) -> tuple[list[tuple[float | None, ...]], list[Any]]:
    """The whole curve, and what the worker sent."""
    (messages,) = in_workers(1, _trial, task, library)
    assert messages[-1].status == "completed", messages[-1]
    points = TrialFolder(Path(task.trial_folder)).read_metrics()
    return [(point.loss, point.grad_norm) for point in points], messages


def _losses(curve: list[tuple[float | None, ...]]) -> list[float]:
    return [loss for loss, _ in curve if loss is not None]


def _task(model: Path, data: Path, folder: Path, **changes: Any) -> TrialTask:
    # All weights, a decay and a warm-up: what an optimizer can get wrong.
    settings = {"rank": "full", "learning_rate": 1e-3, "weight_decay": 0.1, "warmup_steps": 4}
    config = tiny(**{**settings, "max_steps": STEPS, "eval_every": FIRST_STEPS, **changes})
    return make_task(config, model, data, folder)


def test_both_take_the_same_steps(cpu_adam: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    stage = {"zero_stage": 2, "offload": "optimizer"}
    torchs, _ = _ran(_task(tiny_model, tiny_data, tmp_path / "torch", **stage), None)
    ours = _task(tiny_model, tiny_data, tmp_path / "ours", **stage)
    deepspeeds, _ = _ran(ours, cpu_adam)
    assert deepspeeds != torchs
    assert _losses(deepspeeds) == pytest.approx(_losses(torchs), rel=1e-5)
    settings = json.loads(TrialFolder(Path(ours.trial_folder)).deepspeed.read_text())
    assert "torch_adam" not in settings["optimizer"]["params"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("before", "after"), [("torch", "deepspeed"), ("deepspeed", "torch")])
def test_a_trial_goes_on_where_the_other_one_steps(
    before: str, after: str, stage: dict[str, Any], cpu_adam: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    libraries = {"torch": None, "deepspeed": cpu_adam}
    task = _task(tiny_model, tiny_data, tmp_path / "trial", **stage)
    first, _ = _ran(task, libraries[before])
    again, messages = _ran(task, libraries[after])
    assert messages[-1].progress.went_on_from == FIRST_STEPS
    assert ("AdamW", True) in messages if after == "torch" else ("DeepSpeedCPUAdam", None) in messages
    assert again[:FIRST_STEPS] == first[:FIRST_STEPS]
    assert _losses(again) == pytest.approx(_losses(first), rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_curve_that_went_on_equals_one_without_interruption_bit_for_bit(
    stage: dict[str, Any], cpu_adam: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    task = _task(tiny_model, tiny_data, tmp_path / "trial", **stage)
    first, _ = _ran(task, cpu_adam)
    again, messages = _ran(task, cpu_adam)
    assert messages[-1].progress.went_on_from == FIRST_STEPS
    assert again == first
