"""ZeRO-3 as a large model has it: weights are gathered for a layer, let go of behind it, and nothing else changes."""

from __future__ import annotations

import gc
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.training import model as models
from orchestrator.training import training_loop
from orchestrator.training.task import TrialTask, WorkerPlace
from tests.training.conftest import tiny
from tests.training.launch import in_workers, make_task


def gather_all_weights() -> None:
    """The tiny model's are all below DeepSpeed's threshold, and so stay gathered from step to step."""
    settings_of: Any = training_loop.deepspeed_config

    def without_threshold(*arguments: Any, **more: Any) -> dict[str, Any]:
        settings: dict[str, Any] = settings_of(*arguments, **more)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    training_loop.deepspeed_config = without_threshold


def train(place: WorkerPlace, pipe: Connection, task: TrialTask) -> None:
    """Save the adapter of four steps; send their losses, the bytes of packed weights before the first backward pass,
    and those of all."""
    from orchestrator.training import worker_process
    from orchestrator.training.ledger import Ledger

    if task.config.zero_stage == 3:
        gather_all_weights()
    device = torch.device("cpu")
    worker_process._join(place, device)
    ledger = Ledger(device, 0.0)
    run = training_loop.set_up(task, place, ledger)
    backward, alive = run.engine.backward, []

    def count_and_go_back(loss: torch.Tensor) -> None:
        packed = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.dim() == 2 and t.shape[1] == 1]
        alive.append(sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in packed}.values()))
        del packed
        backward(loss)

    run.engine.backward = count_and_go_back  # type: ignore[method-assign]
    losses = [training_loop.optimizer_step(run, step, ledger).loss for step in range(4)]
    models.save(run.model, Path(task.trial_folder), writes=place.rank == 0)
    packed = (p for p in run.model.parameters() if type(p).__name__ == "Params4bit")
    pipe.send((losses, alive[0], sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in packed)))


@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", False), ("nf4", False), ("nf4", True)])
def test_gathered_weights_are_let_go_of_and_train_the_same_adapter(
    precision: str, checkpointing: bool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    losses, saved = {}, {}
    for stage in (2, 3):
        config = tiny(precision=precision, zero_stage=stage, gradient_checkpointing=checkpointing)
        task = make_task(config, tiny_model, tiny_data, tmp_path / str(stage))
        ((losses[stage], alive, whole),) = in_workers(2, train, task)[0]
        saved[stage] = load_file(tmp_path / str(stage) / "adapter_model.safetensors")
    assert losses[3] == pytest.approx(losses[2], rel=1e-4)
    assert saved[3].keys() == saved[2].keys()
    if precision == "nf4":
        assert whole > 0
        assert alive < whole / 10
        return
    for name, weights in saved[2].items():
        torch.testing.assert_close(saved[3][name], weights, rtol=1e-3, atol=1e-4)
