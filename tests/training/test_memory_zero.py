"""What ZeRO leaves to each worker, counted in real DeepSpeed engines on two and four workers over gloo."""

from __future__ import annotations

import gc
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning.memory import _bytes_of, _step_bytes, offloaded_bytes
from orchestrator.training.task import TrialTask, WorkerPlace
from tests.training.conftest import tiny
from tests.training.launch import in_workers, make_task
from tests.training.test_memory_parts import parts_of, shape_in
from tests.training.test_memory_peak import AliveBytes


def stepped(place: WorkerPlace, task: TrialTask) -> tuple[Any, Any]:
    """This worker's run and its ledger, after the first optimizer step."""
    import torch

    from orchestrator.training import training_loop, worker_process
    from orchestrator.training.ledger import Ledger

    device = torch.device("cpu")
    worker_process._join(place, device)
    ledger = Ledger(device, 0.0)
    run = training_loop.set_up(task, place, ledger)
    training_loop.optimizer_step(run, 0, ledger)
    return run, ledger


def copies_and_moments(optimizer: Any, stage: int) -> tuple[list[Any], list[Any]]:
    """This worker's fp32 copies and AdamW's moments, of a ZeRO optimizer."""
    copies = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    states = optimizer.optimizer.state.values()
    return copies, [v for state in states for k, v in state.items() if k.startswith("exp_avg")]


def count_states(place: WorkerPlace, pipe: Connection, task: TrialTask) -> None:
    """Send the bytes of this worker's optimizer states with fp32 copies after a step, and of its weights."""
    run, _ = stepped(place, task)
    stage = task.config.zero_stage
    copies, states = copies_and_moments(run.engine._engine.optimizer, stage)
    held = [p.ds_tensor if stage == 3 else p for p in run.model.parameters()]
    pipe.send((_bytes([*copies, *states]), _bytes(held)))


def count_offloaded(place: WorkerPlace, pipe: Connection, task: TrialTask) -> None:
    """Send the bytes of what this worker offloads, after a step."""
    run, _ = stepped(place, task)
    optimizer, stage = run.engine._engine.optimizer, task.config.zero_stage
    copies, held = copies_and_moments(optimizer, stage)
    held += [*copies, *(copy.grad for copy in copies)]
    if stage == 3:
        held += [optimizer.grad_partitions_flat_buffer, *(p.ds_tensor for p in run.model.parameters())]
    else:
        held += optimizer.param_buffer_of_bit16_for_cpu_offload_groups
        held += optimizer.accumulated_grads_in_cpu.values()
    pipe.send(_bytes(held))


def count_step(place: WorkerPlace, pipe: Connection, task: TrialTask) -> None:
    """Send the bytes of gradients and of what the second optimizer step takes besides, at its peak."""
    import torch

    from orchestrator.training import training_loop

    run, ledger = stepped(place, task)
    engine, step, counted = run.engine._engine, run.engine._engine.step, []

    def count() -> None:
        own = [parameter.grad for parameter in run.model.parameters()]
        for gradients in engine.optimizer.averaged_gradients.values():
            own += gradients or ()
        storages = {g.untyped_storage()._cdata: g.untyped_storage().nbytes() for g in own if g is not None}
        alive = AliveBytes()
        for tensor in gc.get_objects():
            if isinstance(tensor, torch.Tensor):
                alive.add(tensor)
        without_gradients = alive.now - sum(storages.values())
        del own, gradients, tensor
        with alive:
            step()
        counted.append(alive.peak - without_gradients)

    engine.step = count
    training_loop.optimizer_step(run, 1, ledger)
    pipe.send(counted[0])


def _bytes(tensors: list) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_worker_holds_the_share_that_is_predicted(
    stage: int, workers: int, precision: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny(zero_stage=stage, precision=precision, micro_batch_size=1, target_modules="all-linear")
    task = make_task(config, tiny_model, tiny_data, tmp_path / "trial")
    parts = parts_of(config, shape_in(tiny_model), workers)
    for ((optimizer_bytes, weight_bytes),) in in_workers(workers, count_states, task):
        # Partitions are padded to whole elements of every worker: the tiny adapter shows it, a real one does not.
        assert optimizer_bytes == pytest.approx(parts.optimizer, rel=0.02)
        assert weight_bytes == pytest.approx(parts.weights + parts.adapter, rel=0.02)


@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "optimizer_and_parameters")])
@pytest.mark.parametrize("rank", [8, "full"])
def test_a_worker_offloads_what_is_predicted(
    rank: Any, stage: int, offload: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny(zero_stage=stage, offload=offload, rank=rank, precision="bf16", micro_batch_size=4)
    task = make_task(config, tiny_model, tiny_data, tmp_path / "trial")
    width = _bytes_of(config, "cuda", has_bf16=True)
    for (counted,) in in_workers(2, count_offloaded, task):
        assert counted == pytest.approx(offloaded_bytes(config, shape_in(tiny_model), 2, width), rel=0.03)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_takes_what_is_predicted_with_its_gradients(
    stage: int, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    workers, config = 2, tiny(zero_stage=stage, precision="bf16", micro_batch_size=4, rank="full")
    task = make_task(config, tiny_model, tiny_data, tmp_path / "trial")
    width, weights = _bytes_of(config, "cpu", has_bf16=True), shape_in(tiny_model).parameters
    for (peak,) in in_workers(workers, count_step, task):
        # A partition ends within a tiny model's embedding: the whole of its gradient is there.
        assert peak == pytest.approx(_step_bytes(config, width, weights / workers), rel=0.1)
