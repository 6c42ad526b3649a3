"""The loss of a step depends on what it learns from, and on nothing else."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from safetensors.torch import load_file

from orchestrator.config.trial_config import TrialConfig
from orchestrator.results.folders import TrialFolder
from orchestrator.training.task import TrialTask, WorkerPlace
from tests.training.conftest import TINY, tiny
from tests.training.launch import Outcome, in_workers, make_task, run_trial

ENGINES = [
    pytest.param({"zero_stage": 0}, id="zero0"),
    pytest.param({"zero_stage": 1}, id="zero1"),
    pytest.param({"zero_stage": 2}, id="zero2"),
    pytest.param({"zero_stage": 3}, id="zero3"),
    pytest.param({"engine": "ddp"}, id="ddp"),
]


@pytest.fixture(scope="module")
def reference(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Plain data parallelism with one worker and one micro-batch a step."""
    config = tiny(engine="ddp", micro_batch_size=8)
    outcome = run_trial(make_task(config, tiny_model, tiny_data, tmp_path_factory.mktemp("trial") / "reference"))
    assert outcome.end.status == "completed", outcome.log
    return outcome


def _outcome(config: TrialConfig, model: Path, data: Path, folder: Path, workers: int = 1) -> Outcome:
    outcome = run_trial(make_task(config, model, data, folder), workers)
    assert [end.status for end in outcome.ends] == ["completed"] * workers, outcome.log
    return outcome


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_with_any_workers_and_micro_batch_has_the_same_losses_in_fp32(
    engine: dict[str, object],
    workers: int,
    micro_batch_size: int,
    reference: Outcome,
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    config = tiny(**engine, micro_batch_size=micro_batch_size)
    outcome = _outcome(config, tiny_model, tiny_data, tmp_path / "trial", workers)
    for seen, expected in zip(outcome.points, reference.points, strict=True):
        assert seen.loss == pytest.approx(expected.loss, rel=2e-6)
        assert (seen.eval_loss or 0) == pytest.approx(expected.eval_loss or 0, rel=2e-6)
        assert seen.grad_norm == pytest.approx(expected.grad_norm, rel=2e-5)
        assert (seen.tokens, seen.learning_rate) == (expected.tokens, expected.learning_rate)


@pytest.mark.parametrize("engine", ENGINES)
def test_clipping_is_the_same_under_every_engine(
    engine: dict[str, object], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    # SGD, since Adam's steps do not depend on the gradients' scale.
    changes = {"max_grad_norm": 0.05, "optimizer": "sgd", "learning_rate": 1.0, "micro_batch_size": 2}
    plain = _outcome(tiny(engine="ddp", **changes), tiny_model, tiny_data, tmp_path / "plain")
    outcome = _outcome(tiny(**{**changes, **engine}), tiny_model, tiny_data, tmp_path / "trial", workers=2)
    assert outcome.losses == pytest.approx(plain.losses, rel=2e-6)
    assert min(point.grad_norm or 0 for point in outcome.points) > 0.05


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 1, "offload": "optimizer"},
        {"zero_stage": 2, "offload": "optimizer"},
        {"zero_stage": 3, "offload": "optimizer"},
        {"zero_stage": 3, "offload": "optimizer_and_parameters"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "zero_stage": 3},
        {"attention": "eager"},
    ],
    ids=str,
)
def test_what_only_saves_memory_or_time_leaves_the_losses_alone(
    changes: dict[str, object], reference: Outcome, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    outcome = _outcome(tiny(**changes), tiny_model, tiny_data, tmp_path / "trial")
    assert outcome.losses == pytest.approx(reference.losses, rel=5e-6)


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
def test_an_evaluation_changes_nothing_of_the_training_after_it(
    precision: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    curves = []
    for eval_every in (1, 3, 6):
        config = tiny(precision=precision, max_steps=6, eval_every=eval_every)
        outcome = _outcome(config, tiny_model, tiny_data, tmp_path / str(eval_every))
        curves.append([(point.loss, point.grad_norm) for point in outcome.points])
    assert curves[0] == curves[1] == curves[2]


def test_what_its_gpus_cost_is_told_with_every_step(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    task = make_task(tiny(max_steps=2), tiny_model, tiny_data, tmp_path / "priced")
    points = run_trial(replace(task, cost_per_s=0.5)).points
    assert [point.cost for point in points] == [pytest.approx(0.5 * point.seconds) for point in points]
    assert points[1].cost > points[0].cost > 0
    assert {point.cost for point in run_trial(replace(task, trial_folder=str(tmp_path / "free"))).points} == {None}


HALF = ["bf16", "amp_bf16"]


@pytest.mark.parametrize("precision", [*HALF, "int8", "nf4"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_precision_learns_and_stays_near_fp32(
    precision: str, engine: dict[str, object], reference: Outcome, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    if precision == "int8" and engine.get("zero_stage") == 3:
        pytest.skip("int8 weights cannot be sharded: compatibility refuses it")
    outcome = _outcome(tiny(precision=precision, **engine), tiny_model, tiny_data, tmp_path / "trial")
    evaluations = [point.eval_loss for point in outcome.points if point.eval_loss is not None]
    assert evaluations[-1] < evaluations[0]
    assert outcome.losses == pytest.approx(reference.losses, abs=0.02)


def _in_fp16(place: WorkerPlace, pipe: Connection, task: TrialTask) -> None:
    from deepspeed.accelerator import get_accelerator

    from orchestrator.training import worker_process

    # DeepSpeed asks for AVX512-FP16; torch computes fp16 on any CPU, slowly.
    get_accelerator().is_fp16_supported = lambda: True
    worker_process.run(task, place, pipe.send)


@pytest.mark.parametrize("stage", [0, 2])
def test_fp16_takes_the_steps_that_fp32_takes(stage: int, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    # SGD, since Adam's steps do not depend on the gradients' scale; some of the norms are clipped and some are not.
    changes = {"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.45, "zero_stage": stage, "max_steps": 6}
    plain = _outcome(tiny(**changes), tiny_model, tiny_data, tmp_path / "plain", workers=2)
    task = make_task(tiny(**changes, precision="fp16"), tiny_model, tiny_data, tmp_path / "trial")
    ends = [messages[-1] for messages in in_workers(2, _in_fp16, task)]
    assert [end.status for end in ends] == ["completed"] * 2, ends
    points = TrialFolder(Path(task.trial_folder)).read_metrics()
    assert [point.loss for point in points] == pytest.approx(plain.losses, abs=5e-4)
    assert [point.grad_norm for point in points] == pytest.approx([p.grad_norm for p in plain.points], rel=1e-3)
    assert points[-1].loss < points[0].loss - 0.05


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_at_a_rate_of_zero_leaves_half_precision_weights_as_they_were(
    optimizer: str, stage: int, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny(
        rank="full",
        precision="bf16",
        zero_stage=stage,
        optimizer=optimizer,
        learning_rate=0.1,
        weight_decay=1.0,
        warmup_steps=1,
        max_steps=1,
    )
    outcome = _outcome(config, tiny_model, tiny_data, tmp_path / "trial")
    before, after = (
        load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        for folder in (tiny_model, outcome.folder.adapter)
    )
    assert (after == before.bfloat16()).all()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_all_weights_are_trained_where_the_rank_is_full(
    stage: int, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    changes = {"rank": "full", "learning_rate": 1e-3}
    plain = _outcome(tiny(engine="ddp", **changes), tiny_model, tiny_data, tmp_path / "plain")
    outcome = _outcome(tiny(zero_stage=stage, **changes), tiny_model, tiny_data, tmp_path / "trial", workers=2)
    assert outcome.losses == pytest.approx(plain.losses, rel=2e-5)
    assert outcome.end.progress
    assert outcome.end.progress.trainable_parameters == 426_624


@pytest.mark.parametrize("changes", [{"rslora": True}, {"dora": True}, {"dora": True, "zero_stage": 3}], ids=str)
def test_every_kind_of_adapter_learns_otherwise(
    changes: dict[str, object], reference: Outcome, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    outcome = _outcome(tiny(**changes), tiny_model, tiny_data, tmp_path / "trial")
    assert outcome.losses[0] == pytest.approx(reference.losses[0], rel=1e-5)  # B is zero: no adapter changes it yet
    assert outcome.losses[-1] != pytest.approx(reference.losses[-1], rel=1e-5)


def test_the_same_seed_gives_identical_losses_and_a_repeat_gives_others(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny(lora_dropout=0.1)
    first, second = (_outcome(config, tiny_model, tiny_data, tmp_path / name) for name in ("first", "second"))
    repeat = _outcome(tiny(lora_dropout=0.1, seed=1), tiny_model, tiny_data, tmp_path / "repeat")
    assert first.losses == second.losses
    assert not set(first.losses) & set(repeat.losses)


def test_the_seed_reaches_the_adapter_and_not_only_the_order_of_the_data(tiny_model: Path) -> None:
    import torch

    from orchestrator.training import model as models

    def adapter(seed: int) -> torch.Tensor:
        config = tiny(seed=seed)
        built = models.build(config, tiny_model, "fp32", torch.device("cpu"), zero3=None)
        return next(weights for name, weights in built.named_parameters() if "lora_A" in name)

    assert torch.equal(adapter(3), adapter(3))
    assert not torch.equal(adapter(3), adapter(4))


def test_the_reference_is_what_the_tests_say_it_is() -> None:
    assert (TINY.precision, TINY.rank, TINY.zero_stage) == ("fp32", 8, 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_eight_bit_adamw_learns_on_a_cpu_as_adamw_does(
    engine: dict[str, object], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    # States of fewer than 4,096 weights stay in fp32 (bitsandbytes 0.50, optim/optimizer.py, min_8bit_size).
    losses = {
        optimizer: _outcome(
            tiny(**engine, micro_batch_size=8, rank=128, optimizer=optimizer),
            tiny_model,
            tiny_data,
            tmp_path / optimizer,
        ).losses
        for optimizer in ("adamw", "adamw_8bit")
    }
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=5e-3)
    assert losses["adamw_8bit"] != losses["adamw"]
