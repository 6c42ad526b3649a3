"""A trial that was cut off goes on as if it had not been."""

from __future__ import annotations

import os
import re
import shutil
import signal
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from orchestrator.results.folders import TrialFolder, checkpoint_part
from orchestrator.training.checkpoint import is_due
from orchestrator.training.task import TrialEnd, TrialProgress, TrialTask, WorkerPlace
from tests.training.conftest import tiny
from tests.training.launch import Outcome, in_workers, make_task, run_trial

ENGINES = [
    pytest.param({"zero_stage": 0}, id="zero0"),
    pytest.param({"zero_stage": 1}, id="zero1"),
    pytest.param({"zero_stage": 2}, id="zero2"),
    pytest.param({"zero_stage": 3}, id="zero3"),
    pytest.param({"engine": "ddp"}, id="ddp"),
]


def curve(outcome: Outcome) -> list[tuple[Any, ...]]:
    return [(p.step, p.tokens, p.loss, p.eval_loss, p.grad_norm, p.learning_rate) for p in outcome.points]


def trial(model: Path, data: Path, folder: Path, **changes: Any) -> TrialTask:
    """Seven steps with an evaluation, and hence a checkpoint, at the third; dropout draws random numbers."""
    config = tiny(**{"lora_dropout": 0.1, "max_steps": 7, "eval_every": 3, "warmup_steps": 2, **changes})
    return make_task(config, model, data, folder / "trial")


def completed(task: TrialTask, workers: int = 1) -> Outcome:
    outcome = run_trial(task, workers)
    assert [end.status for end in outcome.ends] == ["completed"] * workers, outcome.log
    return outcome


def goes_on_from(outcome: Outcome) -> int | None:
    assert outcome.end.progress
    return outcome.end.progress.went_on_from


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_curve_that_went_on_equals_one_without_interruption_bit_for_bit(
    engine: dict[str, Any], workers: int, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    task = trial(tiny_model, tiny_data, tmp_path, **engine)
    first = completed(task, workers)
    uninterrupted = curve(first)
    # What a trial leaves that was killed in its last step: all of its curve, and a checkpoint of the middle.
    (step,) = first.folder.checkpoint_steps()
    assert step in (3, 6)
    kept = first.folder.checkpoint(step)
    assert {file.stat().st_mode & 0o777 for file in kept.iterdir()} == {kept.stat().st_mode & 0o666}
    again = completed(task, workers)
    assert goes_on_from(again) == step
    assert curve(again) == uninterrupted


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16", "zero_stage": 0},
        {"precision": "bf16", "zero_stage": 2},
        {"precision": "bf16", "zero_stage": 3},
        {"precision": "nf4", "zero_stage": 3, "offload": "optimizer_and_parameters"},
        {"rank": "full", "zero_stage": 1, "optimizer": "sgd", "lora_dropout": 0},
    ],
    ids=str,
)
def test_every_kind_of_weights_and_optimizer_goes_on_bit_for_bit(
    changes: dict[str, Any], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    task = trial(tiny_model, tiny_data, tmp_path, **changes)
    uninterrupted = curve(completed(task))
    again = completed(task)
    assert goes_on_from(again)
    assert curve(again) == uninterrupted


def _killed_after_step(place: WorkerPlace, pipe: Connection, task: TrialTask, step: int) -> None:
    from orchestrator.training import training_loop, worker_process

    def send(message: TrialProgress | TrialEnd) -> None:
        pipe.send(message)

    # The moment at which a kill finds the process: in the step after the checkpoint, its line half written.
    optimizer_step = training_loop.optimizer_step

    def until(run: Any, done: int, ledger: Any) -> Any:
        if done > step:
            if place.rank == 0:
                with (Path(task.trial_folder) / "metrics.jsonl").open("a") as metrics:
                    metrics.write('{"step": 5, "tok')
            os.kill(os.getpid(), signal.SIGKILL)
        return optimizer_step(run, done, ledger)

    training_loop.optimizer_step = until
    worker_process.run(task, place, send)


def _moved_away_in_step(place: WorkerPlace, pipe: Connection, task: TrialTask, step: int, saves_adapter: bool) -> None:
    from orchestrator.training import model as models
    from orchestrator.training import training_loop, worker_process

    folder = Path(task.trial_folder)
    optimizer_step, save = training_loop.optimizer_step, models.save

    def move(run: Any, done: int, ledger: Any) -> Any:
        if done == step:
            folder.parents[1].rename(folder.parents[1].with_name("moved"))
        return optimizer_step(run, done, ledger)

    training_loop.optimizer_step = move
    models.save = lambda *whole, **named: save(*whole, **named) if saves_adapter or folder.exists() else None
    worker_process.run(task, place, pipe.send)


@pytest.mark.parametrize("saves_adapter", [True, False], ids=["its adapter", "its checkpoint"])
def test_a_trial_begins_nothing_in_the_place_of_a_sweep_that_was_moved_away(
    saves_adapter: bool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    task = trial(tiny_model, tiny_data, tmp_path / "sweep" / "trials")
    # It is evaluated after the step in which it is moved.
    messages = in_workers(1, _moved_away_in_step, task, 2, saves_adapter)
    end = messages[0][-1]
    assert (end.status, ("bring it back" if saves_adapter else "it was removed") in end.reason) == ("preempted", True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved"]


def test_a_killed_trial_goes_on_from_its_last_checkpoint_and_no_step_is_there_twice(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    reference = completed(trial(tiny_model, tiny_data, tmp_path / "reference"), 2)
    task = trial(tiny_model, tiny_data, tmp_path)
    messages = in_workers(2, _killed_after_step, task, 3)
    told = [message for message in messages[0] if isinstance(message, TrialProgress)]
    assert [progress.last and progress.last.step for progress in told] == [3]
    again = completed(task, 2)
    assert goes_on_from(again) == 3
    assert curve(again) == curve(reference)
    first_life, second_life = told[0], again.end.progress
    assert second_life
    assert second_life.training_s > first_life.training_s
    assert second_life.best == min((p for p in again.points if p.eval_loss), key=lambda point: point.eval_loss or 0)


def _given_up_for_dead_after_step(place: WorkerPlace, pipe: Connection, task: TrialTask, step: int) -> None:
    from orchestrator.training import training_loop, worker_process

    folder = TrialFolder(Path(task.trial_folder))
    optimizer_step = training_loop.optimizer_step

    def until(run: Any, done: int, ledger: Any) -> Any:
        if done == step:
            # On another node, the next attempt begins meanwhile.
            training_loop.open_metrics(folder.metrics, folder.curve_bytes(3) or 0)
        return optimizer_step(run, done, ledger)

    training_loop.optimizer_step = until
    worker_process.run(task, place, pipe.send)


def test_an_attempt_that_was_given_up_for_dead_ends_and_writes_nothing_into_the_next_ones_curve(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    task = trial(tiny_model, tiny_data, tmp_path)
    (messages,) = in_workers(1, _given_up_for_dead_after_step, task, 4)
    assert (messages[-1].status, "another goes on with the trial" in messages[-1].reason) == ("preempted", True)
    folder = TrialFolder(Path(task.trial_folder))
    assert [point.step for point in folder.read_metrics()] == [1, 2, 3]
    again = completed(task)
    assert goes_on_from(again) == 3
    assert [point.step for point in again.points] == list(range(1, 8))


def test_what_is_of_another_trial_or_damaged_is_not_gone_on_with(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    task = trial(tiny_model, tiny_data, tmp_path)
    first = completed(task)
    (step,) = first.folder.checkpoint_steps()
    assert (first.folder.checkpoint(step) / checkpoint_part(0, 1)).exists()
    other = completed(trial(tiny_model, tiny_data, tmp_path, micro_batch_size=2))
    assert goes_on_from(other) is None
    (step,) = other.folder.checkpoint_steps()
    file = other.folder.checkpoint(step) / checkpoint_part(0, 1)
    file.write_bytes(file.read_bytes()[:-100])
    again = completed(trial(tiny_model, tiny_data, tmp_path, micro_batch_size=2))
    assert goes_on_from(again) is None
    assert [point.step for point in again.points] == list(range(1, 8))


def test_a_checkpoint_that_lacks_a_workers_part_gives_way_to_the_one_before(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    task = trial(tiny_model, tiny_data, tmp_path)
    first = completed(task, 2)
    uninterrupted = curve(first)
    (step,) = first.folder.checkpoint_steps()
    shutil.copytree(first.folder.checkpoint(step), first.folder.checkpoint(7))
    (first.folder.checkpoint(7) / checkpoint_part(1, 2)).unlink()
    again = completed(task, 2)
    assert goes_on_from(again) == step
    assert curve(again) == uninterrupted
    assert 7 not in again.folder.checkpoint_steps()


def on_own_node(place: WorkerPlace, pipe: Connection, task: TrialTask) -> None:
    from orchestrator.training import worker_process

    worker_process.run(
        replace(task, trial_folder=node_folder(task, place.rank)), replace(place, local_rank=0), pipe.send
    )


def node_folder(task: TrialTask, rank: int) -> str:
    return f"{task.trial_folder}-on-node{rank}"


def test_nodes_that_share_no_folder_keep_each_its_part_of_the_last_checkpoint_and_go_on_from_it(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    task = trial(tiny_model, tiny_data, tmp_path)

    def run() -> tuple[list[TrialProgress], list[list[str]]]:
        sent = in_workers(2, on_own_node, task)
        ends = [end for messages in sent for end in messages if isinstance(end, TrialEnd)]
        assert [end.status for end in ends] == ["completed"] * 2
        # What a node has made is stored when it tells of an evaluation.
        told = [[one.last.step for one in messages if isinstance(one, TrialProgress)] for messages in sent]
        assert told[0] == told[1]
        folders = [TrialFolder(Path(node_folder(task, rank))) for rank in (0, 1)]
        found = [
            sorted(entry.relative_to(f.root).as_posix() for entry in f.root.glob("*checkpoint*/*")) for f in folders
        ]
        assert folders[0].checkpoint_steps() == folders[1].checkpoint_steps()
        return [end.progress for end in ends if end.progress], found

    _, found = run()
    (step,) = TrialFolder(Path(node_folder(task, 0))).checkpoint_steps()
    assert found == [[f"checkpoint-{step}/{checkpoint_part(rank, 2)}"] for rank in (0, 1)]
    (again,), _ = run()
    assert again.went_on_from == step


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_trial(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    task = trial(tiny_model, tiny_data, tmp_path)
    for step in (3, 6):
        blocked = Path(task.trial_folder) / f".checkpoint-{step}"
        blocked.parent.mkdir(exist_ok=True)
        blocked.write_text("a file where the folder should be")
    outcome = completed(task)
    assert outcome.folder.checkpoint_steps() == []
    assert "no checkpoint at step 3" in outcome.log


def stopped_parent(model: Path, data: Path, folder: Path, **changes: Any) -> TrialTask:
    """A trial of a population whose generation ends at its third step, in the middle of its schedule."""
    parent = replace(trial(model, data, folder / "parent", **changes), last_step=3)
    outcome = run_trial(parent)
    assert outcome.end.status == "stopped", outcome.log
    assert outcome.folder.checkpoint_steps() == [3]
    assert [point.step for point in outcome.points] == [1, 2, 3]
    return parent


def child_of(parent: TrialTask, model: Path, data: Path, folder: Path, **changes: Any) -> TrialTask:
    task = trial(model, data, folder, **changes)
    return replace(task, parent_folder=parent.trial_folder, first_step=3)


def as_if_trained_for(seconds: float, checkpoint: Path) -> None:
    for file in checkpoint.iterdir():
        with safe_open(file, framework="pt") as opened:
            metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata["state"], found = re.subn(r'\["training", [^]]*\]', f'["training", {seconds}]', metadata["state"])
        assert found == 1
        save_file(tensors, file, metadata)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trial_that_begins_with_anothers_checkpoint_continues_its_curve_bit_for_bit(
    engine: dict[str, Any], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    whole = completed(trial(tiny_model, tiny_data, tmp_path / "whole", **engine))
    parent = stopped_parent(tiny_model, tiny_data, tmp_path, **engine)
    as_if_trained_for(3600.0, TrialFolder(Path(parent.trial_folder)).checkpoint(3))
    child = child_of(parent, tiny_model, tiny_data, tmp_path / "child", **engine)
    first = completed(child)
    assert curve(first) == curve(whole)[3:]
    # Its own times, and nothing of its parent's.
    assert first.points[-1].seconds < 3600.0
    # Cut off itself, it goes on from its own checkpoint.
    assert goes_on_from(first) is None
    again = completed(child)
    assert goes_on_from(again) == 6
    assert curve(again) == curve(whole)[3:]


def test_what_it_changes_holds_from_its_first_step_on_under_every_engine(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    changes = {"learning_rate": 2e-3, "weight_decay": 0.5, "max_grad_norm": 0.05, "lora_dropout": 0}
    losses = {}
    for name, engine in {"zero0": {"zero_stage": 0}, "zero2": {"zero_stage": 2}, "ddp": {"engine": "ddp"}}.items():
        parent = stopped_parent(tiny_model, tiny_data, tmp_path / name, lora_dropout=0, **engine)
        same, other = (
            completed(child_of(parent, tiny_model, tiny_data, tmp_path / name / word, **kept, **engine))
            for word, kept in (("same", {"lora_dropout": 0}), ("other", changes))
        )
        # Its first step's loss is that of the weights it began with; what follows is its own.
        assert other.losses[0] == same.losses[0]
        assert abs(other.losses[-1] - same.losses[-1]) > 1e-4
        assert other.points[0].learning_rate == pytest.approx(same.points[0].learning_rate / 5)
        losses[name] = other.losses
    assert losses["zero0"] == pytest.approx(losses["ddp"], abs=1e-5)
    assert losses["zero2"] == pytest.approx(losses["ddp"], abs=1e-5)


def test_a_checkpoint_of_other_settings_or_none_is_nothing_to_begin_with(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    parent = stopped_parent(tiny_model, tiny_data, tmp_path)
    for changes, gone, told in (({"rank": 4}, False, "of another trial: config"), ({}, True, "No such file")):
        task = child_of(parent, tiny_model, tiny_data, tmp_path / f"child{gone}", **changes)
        task = replace(task, parent_folder=str(tmp_path / "nowhere")) if gone else task
        end = run_trial(task).end
        assert end.status == "failed"
        assert "it cannot begin with" in (end.reason or "")
        assert told in (end.reason or "")


def test_a_generation_whose_checkpoint_cannot_be_written_has_not_ended(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    task = replace(trial(tiny_model, tiny_data, tmp_path), last_step=3)
    blocked = Path(task.trial_folder) / ".checkpoint-3"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the folder should be")
    end = run_trial(task).end
    assert end.status == "preempted"
    assert "the next generation begins with" in (end.reason or "")


@pytest.mark.parametrize(
    ("evaluated", "since_s", "cost_s", "due"),
    [
        (True, 0.1, 0.0, True),
        (False, 59, 0.1, False),
        (False, 60, 0.1, True),
        (True, 10, 1, False),
        (True, 20, 1, True),
        (False, 100, 10, False),
        (False, 200, 10, True),
    ],
)
def test_a_checkpoint_is_due_at_evaluations_and_every_minute_but_takes_a_twentieth_of_the_time_at_most(
    evaluated: bool, since_s: float, cost_s: float, due: bool
) -> None:
    assert is_due(evaluated, since_s, cost_s) is due
