"""How a trial can end, and what the sweep hears of it."""

from __future__ import annotations

import errno
import json
import os
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError, distributed_c10d

from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import ModelError, StorageError
from orchestrator.results.records import TrialStatus
from orchestrator.training import device as devices
from orchestrator.training import trial_log
from orchestrator.training.ledger import Ledger, Speed
from orchestrator.training.task import START_LIMIT_S, TrialEnd, TrialTask, WorkerPlace
from orchestrator.training.training_loop import learning_rate
from orchestrator.training.worker_process import ended_by, run
from tests.training.conftest import tiny
from tests.training.launch import in_workers, make_task, run_trial


def test_a_trial_reports_every_evaluation_and_its_end(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    outcome = run_trial(make_task(tiny(max_steps=5, eval_every=2), tiny_model, tiny_data, tmp_path / "trial"), 2)
    assert [report.last.step for report in outcome.reports if report.last] == [2, 4, 5]
    assert [point.step for point in outcome.points] == [1, 2, 3, 4, 5]
    assert [point.step for point in outcome.points if point.eval_loss is not None] == [2, 4, 5]
    first, second = outcome.ends
    assert (first.status, first.reason) == (TrialStatus.COMPLETED, None)
    assert second == TrialEnd(TrialStatus.COMPLETED, None, None)
    progress = first.progress
    assert progress
    assert progress.last
    assert progress.last.tokens_per_s
    assert progress.peak_memory_bytes > 50 * 2**20
    assert (progress.memory_kind, progress.has_adapter) == ("resident", True)
    assert min(progress.data_s, progress.model_s, progress.training_s, progress.evaluation_s, progress.saving_s) > 0
    settings = json.loads(outcome.folder.deepspeed.read_text())
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert outcome.folder.worker_log(1).exists()


def test_a_trial_of_one_step_has_a_step_time(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    outcome = run_trial(make_task(tiny(max_steps=1), tiny_model, tiny_data, tmp_path / "trial"))
    assert outcome.points[0].step_time_s
    assert outcome.points[0].tokens_per_s


@pytest.mark.parametrize("changes", [{"zero_stage": 2}, {"zero_stage": 3}, {"engine": "ddp"}], ids=str)
def test_a_loss_that_is_no_number_ends_every_worker_as_diverged(
    changes: dict[str, object], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny(learning_rate=10.0, max_grad_norm=1e9, optimizer="sgd", rank="full", max_steps=60, **changes)
    outcome = run_trial(make_task(config, tiny_model, tiny_data, tmp_path / "trial"), workers=2)
    assert [end.status for end in outcome.ends] == [TrialStatus.DIVERGED] * 2, outcome.log
    assert "lower learning_rate" in (outcome.end.reason or "")
    assert outcome.end.progress, "the steps before it are not lost"


def _overflowing(place: WorkerPlace, pipe: Connection, task: TrialTask) -> None:
    from deepspeed.accelerator import get_accelerator

    from orchestrator.training import training_loop, worker_process

    # DeepSpeed asks for AVX512-FP16; torch computes fp16 on any CPU, slowly.
    get_accelerator().is_fp16_supported = lambda: True
    summed_loss = training_loop.summed_loss

    def with_infinite_gradients(*arguments: Any) -> torch.Tensor:
        loss = summed_loss(*arguments)
        loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    training_loop.summed_loss = with_infinite_gradients
    worker_process.run(task, place, pipe.send)


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": "ddp", "precision": "amp_fp16"},
        {"zero_stage": 0, "precision": "amp_fp16"},
        {"zero_stage": 0, "precision": "fp16"},
        {"zero_stage": 2, "precision": "fp16"},
    ],
    ids=str,
)
def test_fp16_gradients_that_overflow_at_every_scale_end_as_diverged_under_every_engine(
    changes: dict[str, object], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    task = make_task(tiny(max_steps=40, eval_every=40, **changes), tiny_model, tiny_data, tmp_path / "trial")
    ((*_, end),) = in_workers(1, _overflowing, task)
    assert end.status is TrialStatus.DIVERGED, end.reason
    assert "the gradient norm became inf at step" in end.reason


def test_memory_that_runs_out_is_told_as_such(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    # 512 rows × 512 tokens × 1024 words in fp32 are 1 GiB of logits, several times over.
    config = tiny(micro_batch_size=512, global_batch_size=512, sequence_length=512)
    task = make_task(config, tiny_model, tiny_data, tmp_path / "trial")
    roomy = run_trial(make_task(tiny(), tiny_model, tiny_data, tmp_path / "roomy"), more_address_space_bytes=2**30)
    assert roomy.end.status == TrialStatus.COMPLETED, roomy.log
    outcome = run_trial(task, more_address_space_bytes=700 * 2**20)
    assert outcome.end.status == TrialStatus.OUT_OF_MEMORY, outcome.log
    assert "lower micro_batch_size (now 512)" in (outcome.end.reason or "")


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), int(2.5 * 2**30)),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 96 bytes."),
            96,
        ),
        (MemoryError(), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
    ],
)
def test_every_way_of_running_out_of_memory_is_known(error: Exception, asked: int | None, tmp_path: Path) -> None:
    task = make_task(tiny(), tmp_path, tmp_path, tmp_path)
    end = ended_by(error, task, Ledger(torch.device("cpu"), 0.0))
    assert end.status == TrialStatus.OUT_OF_MEMORY
    assert devices.asked_bytes(error) == asked


def test_another_error_fails_the_trial_and_its_traceback_is_in_the_log(tiny_model: Path, tmp_path: Path) -> None:
    outcome = run_trial(make_task(tiny(), tiny_model, tmp_path / "nowhere", tmp_path / "trial"), workers=2)
    assert [end.status for end in outcome.ends] == [TrialStatus.FAILED] * 2
    assert "FileNotFoundError" in (outcome.end.reason or "")
    assert "Traceback" in outcome.log


def test_a_trial_whose_log_lies_on_a_full_disk_still_says_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trial_log, "redirect_output", full)
    monkeypatch.setattr(traceback, "print_exc", full)
    sent: list[object] = []
    task = make_task(tiny(), tmp_path, tmp_path, tmp_path / "trial")
    run(task, WorkerPlace(0, 1, 0, "127.0.0.1", 0, "t"), sent.append)
    (end,) = sent
    assert isinstance(end, TrialEnd)
    assert (end.status, "free some space" in (end.reason or "")) == (TrialStatus.PREEMPTED, True)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            DistBackendError(
                "NCCL error in: NCCLUtils.cpp:94, unhandled system error, NCCL version 2.28.9\nLast error:\n"
                "Error while creating shared memory segment /dev/shm/nccl-A1 (size 9637888), error: "
                "No space left on device (28)"
            ),
            "No space left on device (28): enlarge /dev/shm",
        ),
        (DistNetworkError("The client socket has failed to connect to node-1:29500: Host is down"), "node-1:29500"),
        (RuntimeError("[/pytorch/gloo/gloo/transport/tcp/pair.cc:1] Host is down"), "Host is down"),
    ],
)
def test_a_network_that_fails_is_not_told_as_the_storage(error: Exception, told: str, tmp_path: Path) -> None:
    end = ended_by(error, make_task(tiny(), tmp_path, tmp_path, tmp_path), None)
    assert end.status is TrialStatus.FAILED
    assert told in (end.reason or "")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StorageError("metrics.jsonl is this attempt's no more"), "metrics.jsonl is this attempt's no more"),
        (
            OSError(errno.EIO, os.strerror(errno.EIO)),
            "the storage failed ([Errno 5] Input/output error): free some space, or mend the mount",
        ),
        (
            ModelError("the model cannot be loaded: Stale file handle"),
            "the storage failed (the model cannot be loaded: Stale file handle): free some space, or mend the mount",
        ),
    ],
)
def test_a_storage_that_fails_is_told_in_its_own_words_where_it_has_some(
    error: Exception, told: str, tmp_path: Path
) -> None:
    end = ended_by(error, make_task(tiny(), tmp_path, tmp_path, tmp_path), None)
    assert (end.status, end.reason) == (TrialStatus.PREEMPTED, told)


def _joined(place: WorkerPlace, pipe: Connection) -> None:
    from orchestrator.training import worker_process

    worker_process._join(place, torch.device("cpu"))
    groups = torch.distributed.group.WORLD, torch.distributed.new_group()
    limits = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    limits.append(distributed_c10d._get_default_store().timeout.total_seconds())
    settings = os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"], os.environ.get("NCCL_MAX_NCHANNELS")
    pipe.send((settings, limits, distributed_c10d.default_pg_nccl_timeout))


def test_an_nccl_error_leaves_no_signal_that_later_trials_look_for() -> None:
    assert [dump for (((dump, _), *_),) in in_workers(2, _joined)] == ["0"] * 2


@pytest.mark.parametrize(("workers", "channels"), [(1, "1"), (2, None)])
def test_a_worker_alone_keeps_no_channels_to_others(workers: int, channels: str | None) -> None:
    assert [most for (((_, most), *_),) in in_workers(workers, _joined)] == [channels] * workers


def test_a_worker_waits_for_the_others_as_long_as_a_trial_may_take_to_start() -> None:
    for ((_, limits, nccl_limit),) in in_workers(2, _joined):
        assert limits == [START_LIMIT_S] * 3
        assert nccl_limit.total_seconds() == START_LIMIT_S


def _saved_slowly(place: WorkerPlace, pipe: Connection, task: TrialTask) -> None:
    from orchestrator.training import ledger as ledgers
    from orchestrator.training import training_loop, worker_process

    def slow(*_: Any, writes: bool) -> None:
        time.sleep(0.5 * writes)

    ledgers.SIGN_OF_LIFE_S, training_loop.models.save = 0.1, slow  # type: ignore[assignment]
    worker_process._join(place, torch.device("cpu"))
    ledger = Ledger(torch.device("cpu"), 0.0)
    trial = training_loop.set_up(task, place, ledger)
    point = training_loop.optimizer_step(trial, 0, ledger)
    told: list[float] = []
    ledger.alive = lambda: told.append(time.monotonic())
    training_loop.evaluate_and_keep(trial, point, ledger)
    count = len(told)
    time.sleep(0.3)
    pipe.send((ledger.seconds["saving"], count, len(told)))


def test_a_worker_lives_while_it_or_another_saves_and_no_longer(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    task = make_task(tiny(), tiny_model, tiny_data, tmp_path / "trial")
    for ((saving_s, told, told_later),) in in_workers(2, _saved_slowly, task):
        assert saving_s >= 0.4
        assert 2 <= told == told_later


def test_saving_that_takes_longer_than_a_start_may_is_silent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.training import ledger as ledgers

    monkeypatch.setattr(ledgers, "SIGN_OF_LIFE_S", 0.01)
    monkeypatch.setattr(ledgers, "START_LIMIT_S", 0.1)
    ledger, told = Ledger(torch.device("cpu"), 0.0), []
    ledger.alive = lambda: told.append(time.monotonic())
    with ledger.saving():
        began_s = time.monotonic()
        time.sleep(0.5)
    assert told
    assert told[-1] - began_s < 0.4


def test_an_error_of_ours_is_told_in_its_own_words(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny(target_modules=("c_attn",))
    outcome = run_trial(make_task(config, tiny_model, tiny_data, tmp_path / "trial"))
    assert outcome.end.status == TrialStatus.FAILED
    assert (outcome.end.reason or "").startswith("target_modules: the model has no c_attn; it has ")


def test_the_best_evaluation_is_kept_and_not_the_last(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    # With the objective turned round the first evaluation is the best, since the loss falls.
    task = make_task(tiny(max_steps=6), tiny_model, tiny_data, tmp_path / "trial")
    import dataclasses

    outcome = run_trial(dataclasses.replace(task, best_mode="max"))
    assert outcome.end.progress
    assert outcome.end.progress.best
    assert outcome.end.progress.best.step == 2


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_is_the_one_of_transformers(schedule: str, warmup_steps: int) -> None:
    from transformers import get_scheduler

    config = TrialConfig.model_validate(
        {"lr_schedule": schedule, "warmup_steps": warmup_steps, "max_steps": 30, "learning_rate": 3e-3}
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=30)
    for step in range(30):
        assert learning_rate(config, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_the_median_of_two_steps_lies_between_them() -> None:
    speed = Speed(warm_up_steps=1)
    for step_s in (9.0, 1.0, 3.0):
        speed.add(step_s, tokens=10)
    assert (speed.step_time_s, speed.tokens_per_s) == (2.0, 5.0)
    speed.add(2.5, tokens=10)
    assert speed.step_time_s == 2.5
