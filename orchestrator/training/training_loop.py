"""One worker's part of one trial, from its data to its last evaluation."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import AutoTokenizer

from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import ModelError, StorageError, TrialDivergedError
from orchestrator.results.folders import TrialFolder
from orchestrator.results.records import MetricPoint
from orchestrator.training import data as trial_data
from orchestrator.training import device as devices
from orchestrator.training import model as models
from orchestrator.training.agreement import all_say_yes, largest, sum_over_workers, told_by_first
from orchestrator.training.checkpoint import Checkpoints, random_states, set_random_states
from orchestrator.training.deepspeed_config import compute_dtype, deepspeed_config, scales_loss
from orchestrator.training.engine import DdpEngine, DeepSpeedEngine, Engine
from orchestrator.training.ledger import WARM_UP_STEPS, Ledger, Speed, open_metrics, require_own
from orchestrator.training.task import TrialProgress, TrialTask, WorkerPlace

log = logging.getLogger(__name__)
Report = Callable[[TrialProgress], None]
MAX_OVERFLOWS = 30
"""Steps in a row whose gradients overflow in fp16: each halves the scale, 65,536 at first and by then far below 1."""


@dataclass(frozen=True, slots=True)
class Run:
    """What every part of the loop needs and nothing changes."""

    task: TrialTask
    place: WorkerPlace
    device: torch.device
    model: torch.nn.Module
    engine: Engine
    train: trial_data.Dataset
    held_out: trial_data.Dataset
    pad_token: int
    scales_loss: bool
    alive: Callable[[], None]
    """Called at every micro-batch: whoever watches the process sees that it works."""

    @property
    def config(self) -> TrialConfig:
        """The trial's settings."""
        return self.task.config

    @property
    def micro_batch_size(self) -> int:
        """Planning has chosen a number."""
        assert self.config.micro_batch_size != "auto"
        return self.config.micro_batch_size


def train(task: TrialTask, place: WorkerPlace, ledger: Ledger, report: Report) -> TrialProgress:
    """Train the trial to its last step; `report` is called on every worker at every evaluation.

    Where an attempt of the trial was cut off, it goes on from that one's last checkpoint.

    Raises:
        TrialDivergedError: the loss became NaN or infinite; raised by all workers at the same step.
        ModelError, DataError: what planning could not see.
        CheckpointError: the checkpoint that it should begin with cannot be used.
        StorageError: the checkpoint that it should leave cannot be written.
    """
    models.seed_everything(task.config.seed)
    devices.start_measuring(ledger.device)
    run = set_up(task, place, ledger)
    # The adapter is the same on every worker; its dropout must not be.
    models.seed_everything(task.config.seed + 7919 * place.rank)
    checkpoints = Checkpoints(task, place, ledger.device)
    done = go_on(run, checkpoints, ledger)
    with _curve(task, place, done) as metrics:
        for step in range(done, task.until_step):
            if place.rank == 0:
                require_own(metrics, TrialFolder(Path(task.trial_folder)).metrics)
            point = optimizer_step(run, step, ledger)
            evaluated = evaluates(task.config, step + 1)
            if evaluated:
                point = evaluate_and_keep(run, point, ledger)
            ledger.last = point
            write_point(metrics, point)
            if evaluated:
                report(ledger.progress())
            is_left = step + 1 == task.last_step
            if is_left or (step + 1 < task.until_step and checkpoints.is_due(evaluated)):
                with ledger.saving():
                    written = checkpoints.save(step + 1, state_of(run, ledger), metrics.fileno())
                if is_left and not written:
                    raise StorageError(
                        f"the checkpoint of step {step + 1}, which the next generation begins with, cannot be written: "
                        "its log.txt says why"
                    )
    return ledger.progress()


def go_on(run: Run, checkpoints: Checkpoints, ledger: Ledger) -> int:
    """Take up the state of an earlier attempt, or of the trial that this one begins with; returns the steps done."""
    found = checkpoints.find()
    is_own = found is not None
    if found is None and run.task.parent_folder:
        found = checkpoints.of_parent()
    if found is None:
        return 0
    step, state = found
    run.engine.load_state(state["engine"])
    set_random_states(state["random"], run.device)
    take_up = ledger.go_on if is_own else ledger.begin_after
    take_up(step, state["ledger"])
    # The copies just read are no part of what the trial takes; the ledger remembers what the earlier attempt took.
    del found, state
    devices.start_measuring(run.device)
    log.warning("goes on from step %d%s", step, "" if is_own else f" of {run.task.parent_folder}")
    return step


def state_of(run: Run, ledger: Ledger) -> dict[str, Any]:
    """All that the next step depends on; the data's position and the learning rate follow from the step's number."""
    return {"engine": run.engine.state(), "random": random_states(run.device), "ledger": ledger.state()}


def _curve(task: TrialTask, place: WorkerPlace, steps: int) -> TextIO:
    """metrics.jsonl with so many steps in it, to write on; worker 0 alone writes one."""
    if place.rank:
        return Path(os.devnull).open("w", encoding="utf-8")
    folder = TrialFolder(Path(task.trial_folder))
    return open_metrics(folder.metrics, folder.curve_bytes(steps, task.first_step) or 0)


def write_point(metrics: TextIO, point: MetricPoint) -> None:
    """One line; it is in the file when this returns."""
    metrics.write(point.model_dump_json(exclude_none=True) + "\n")


def evaluates(config: TrialConfig, steps_done: int) -> bool:
    """Whether an evaluation follows this step."""
    return steps_done % config.eval_every == 0 or steps_done == config.max_steps


def set_up(task: TrialTask, place: WorkerPlace, ledger: Ledger) -> Run:
    """Data, model and engine."""
    config, folder = task.config, Path(task.model_folder)
    with ledger.phase("data"):
        train_data, held_out = (
            trial_data.load(Path(task.data_folder), split, config.sequence_length, config.packing)
            for split in ("train", "eval")
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = compute_dtype(config.precision, devices.half_precision(ledger.device))
    on_gpu, has_cpu_adam = ledger.device.type == "cuda", devices.has_cpu_adam(ledger.device)
    settings = deepspeed_config(config, place.world_size, dtype, on_gpu, has_cpu_adam)
    with ledger.phase("model"):
        zero3 = settings if config.engine == "deepspeed" and config.zero_stage == 3 else None
        model = models.build(config, folder, dtype, ledger.device, zero3)
        if config.packing and not models.keeps_packed_rows_apart(model):
            raise ModelError(
                "this model takes no position_ids, so packed rows would see each other: set packing: false"
            )
        ledger.trainable_parameters = models.trainable_parameters(model)
        engine: Engine = (
            DeepSpeedEngine(model, config, settings)
            if config.engine == "deepspeed"
            else DdpEngine(model, config, dtype, ledger.device, place.world_size)
        )
    ledger.speed = Speed(min(WARM_UP_STEPS, task.until_step - task.first_step - 1))
    scales = scales_loss(config.precision, dtype)
    pad_token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return Run(task, place, ledger.device, model, engine, train_data, held_out, pad_token, scales, ledger.alive)


def optimizer_step(run: Run, step: int, ledger: Ledger) -> MetricPoint:
    """Learn from one global batch; `step` counts from 0."""
    config, workers = run.config, run.place.world_size
    ledger.step = step + 1
    started = time.monotonic()
    rate = learning_rate(config, step)
    with ledger.phase("training"):
        sequences = trial_data.global_batch(run.train, step, config.global_batch_size, config.seed)
        # Every worker knows the whole batch's count, so that each label token weighs alike however the batch is cut.
        label_tokens = int(run.train.sequence_labels[sequences].sum())
        micro_batches = trial_data.worker_slice(sequences, run.place.rank, workers, run.micro_batch_size)
        loss_sum = torch.zeros((), dtype=torch.float64, device=run.device)
        for index, micro_batch in enumerate(micro_batches):
            with run.engine.micro_batch(is_last=index == len(micro_batches) - 1):
                loss = summed_loss(run, micro_batch)
                # Engines average over workers: times their number makes it the sum that it should be.
                run.engine.backward(loss * (workers / label_tokens))
            loss_sum += loss.detach()
        mean_loss = sum_over_workers(loss_sum, workers).item() / label_tokens
        if not math.isfinite(mean_loss):
            raise TrialDivergedError(step + 1, mean_loss)
        grad_norm = run.engine.step(rate)
        ledger.overflows = ledger.overflows + 1 if grad_norm is None else 0
        if ledger.overflows > (MAX_OVERFLOWS if run.scales_loss else 0):
            # The engine skipped the step and would skip every one that follows: the loss would stand still.
            raise TrialDivergedError(step + 1, math.inf, "gradient norm")
    tokens = int(run.train.sequence_tokens[sequences].sum())
    ledger.tokens += tokens
    ledger.speed.add(time.monotonic() - started, tokens)
    return MetricPoint(
        step=step + 1,
        tokens=ledger.tokens,
        seconds=ledger.seconds["training"],
        cost=ledger.seconds["training"] * per_s if (per_s := run.task.cost_per_s) else None,
        loss=mean_loss,
        learning_rate=rate,
        grad_norm=grad_norm,
        tokens_per_s=ledger.speed.tokens_per_s,
        step_time_s=ledger.speed.step_time_s,
        time_ms=int(time.time() * 1000),
    )


def summed_loss(run: Run, sequences: trial_data.Ints) -> torch.Tensor:
    """Cross entropy of a batch, summed over its label tokens: (), fp32."""
    batch = trial_data.collate(run.train, sequences, run.config.packing, run.pad_token)
    return _cross_entropy(run, batch)


def _cross_entropy(run: Run, batch: trial_data.Batch) -> torch.Tensor:
    run.alive()
    input_ids = torch.from_numpy(batch.input_ids).to(run.device)  # (sequences, longest)
    labels = torch.from_numpy(batch.labels).to(run.device)
    inputs = {"input_ids": input_ids}
    if batch.position_ids is not None:
        inputs["position_ids"] = torch.from_numpy(batch.position_ids).to(run.device)
        if run.config.attention == "flash_attention_2":
            # Its variable-length kernel keeps packed rows apart in one line only (transformers 5.23,
            # modeling_flash_attention_utils.py, _is_packed_sequence).
            inputs = {name: tensor.reshape(1, -1) for name, tensor in inputs.items()}
            labels = labels.reshape(1, -1)
    logits = run.engine.forward(**inputs)  # (sequences, longest, vocabulary)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def learning_rate(config: TrialConfig, step: int) -> float:
    """The rate of optimizer step `step`, counted from 0; the same as transformers' get_scheduler."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    left = 1 - done if config.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * max(0.0, left)


def evaluate_and_keep(run: Run, point: MetricPoint, ledger: Ledger) -> MetricPoint:
    """Evaluate; keep the adapter where this is the best so far."""
    with ledger.phase("evaluation"):
        eval_loss = evaluate(run)
    if not math.isfinite(eval_loss):
        raise TrialDivergedError(point.step, eval_loss)
    held, reserved = largest_peak(run.device, run.place.world_size)
    ledger.peak_bytes = max(ledger.peak_bytes, held)
    ledger.reserved_bytes = reserved and max(ledger.reserved_bytes or 0, reserved)
    point = point.model_copy(update={"eval_loss": eval_loss, "peak_memory_bytes": ledger.peak_bytes})
    improves = point.improves(ledger.best, run.task.best_metric, run.task.best_mode)
    # Clocks differ between workers, and saving takes all of them: worker 0 decides.
    if told_by_first(int(improves), run.device, run.place.world_size):
        with ledger.saving():
            models.save(run.model, TrialFolder(Path(run.task.trial_folder)).adapter, writes=run.place.rank == 0)
            # The one that writes: the others would wait for it in the next step, where silence is a hang.
            all_say_yes(True, run.device, run.place.world_size)
        ledger.best = point
        ledger.has_adapter = True
    return point


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss over the label tokens of the evaluation data."""
    run.model.eval()
    sums = torch.zeros((), dtype=torch.float64, device=run.device)
    batches = trial_data.evaluation_batches(run.held_out, run.place.rank, run.place.world_size, run.micro_batch_size)
    for sequences, counts in batches:
        batch = trial_data.collate(run.held_out, sequences, run.config.packing, run.pad_token)
        loss = _cross_entropy(run, batch)
        if counts:
            sums += loss
    run.model.train()
    return sum_over_workers(sums, run.place.world_size).item() / int(run.held_out.sequence_labels.sum())


def largest_peak(device: torch.device, workers: int) -> tuple[int, int | None]:
    """The worker that holds most decides whether a trial fits."""
    own = devices.peak(device)
    held, reserved = largest([own.held_bytes, own.reserved_bytes or 0], device, workers)
    return held, reserved if own.reserved_bytes is not None else None
