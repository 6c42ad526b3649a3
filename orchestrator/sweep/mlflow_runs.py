"""What a run in MLflow holds of a trial or a sweep, in MLflow's terms."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Run, RunTag

from orchestrator.errors import cut
from orchestrator.reporting.statistics import label
from orchestrator.results.records import MetricPoint, TrialResult
from orchestrator.results.secrets import without_secret
from orchestrator.sweep.delivered import TrialDelivery

METRICS = (
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "step_time_s",
    "peak_memory_bytes",
    "cost",
)


def has_all(run: Run, kept: TrialDelivery) -> bool:
    """Whether it holds the end that the trial was told with; one that could go on may have ended so twice."""
    if kept.status is None or not kept.status.is_final or run.info.status == "RUNNING":
        return False
    return bool(run.data.tags.get("status") == kept.status.value)


def started_from(result: TrialResult) -> list[RunTag]:
    """The tag of a trial that went on from another's checkpoint."""
    parent = result.started_from
    return [RunTag("started_from", f"trial {parent.trial_id}, step {parent.step}")] if parent else []


def metrics_of(point: MetricPoint) -> list[Metric]:
    """A line of metrics.jsonl with its own time stamp: logged twice it is still one point."""
    return [
        Metric(name, float(value), point.time_ms, point.step)
        for name in METRICS
        if (value := getattr(point, name)) is not None
    ]


def log_latest(client: MlflowClient, run_id: str, figures: Mapping[str, float]) -> None:
    """Log figures that have no curve, and may change between two runs of a sweep; what stands there is not told again.

    MLflow shows the one of the largest step, then of the latest time (3.17.2): all are of step 0, and of now.
    """
    there = client.get_run(run_id).data.metrics
    for name, value in figures.items():
        if there.get(name) != value:
            client.log_metric(run_id, name, value)


def run_name(result: TrialResult, searched: Sequence[str]) -> str:
    """`rank=8 precision=nf4 · 4d2d5056-0`: for people alone, since runs are found by their tags."""
    if not searched:
        return result.trial_id
    return f"{cut(without_secret(label(result, searched)))} · {result.trial_id}"


def key_of(metric: str) -> str:
    """A metric's name as MLflow takes it: a score of lm-eval may have its filter after a comma."""
    return metric.replace(",", "_")


def is_deleted(run: Run) -> bool:
    """Whether a person has deleted it, of which MLflow takes no more, and which it can restore."""
    return bool(run.info.lifecycle_stage == "deleted")


def deleted_words(run_id: str, uri: str) -> str:
    """What is said of it."""
    server = shlex.quote(without_secret(uri))
    return (
        f"its run {run_id} was deleted there: restore it (MLFLOW_TRACKING_URI={server} mlflow runs restore "
        f"--run-id {run_id}), and the next `run` of this sweep goes on in it"
    )
