"""The data as MLflow datasets: what was trained on and what was held out, by the hash of their tokens."""

from __future__ import annotations

import json
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag

from orchestrator.config.local_path import local_path
from orchestrator.config.sweep_config import DataConfig
from orchestrator.training.data import DataSummary

# mlflow 3.17.2, utils/mlflow_tags.py, MLFLOW_DATASET_CONTEXT
_CONTEXT = "mlflow.data.context"


def dataset_inputs(data: DataConfig, summary: DataSummary) -> list[DatasetInput]:
    """One for training and one for evaluation; one that is a share of the other has its name and source."""
    train = {"num_rows": summary.train_rows, "num_tokens": summary.train_tokens}
    held_out = {"num_rows": summary.eval_rows}
    eval_source = data.eval if isinstance(data.eval, str) else data.train
    return [
        _input(data, data.train, "training", train, summary.hash),
        _input(data, eval_source, "evaluation", held_out, summary.hash),
    ]


def _input(data: DataConfig, source: str, context: str, profile: dict[str, int], digest: str) -> DatasetInput:
    kind, where = _source(source)
    share = {} if isinstance(data.eval, str) else {"eval_share": data.eval}
    dataset = Dataset(
        name=f"{_name(source)} ({context})",
        # mlflow 3.17.2, utils/validation.py: a digest has 36 characters at most.
        digest=digest[:32],
        source_type=kind,
        source=json.dumps(where),
        schema=None,
        profile=json.dumps({**profile, "format": data.format, **share}),
    )
    return DatasetInput(dataset, [InputTag(_CONTEXT, context)])


def _name(source: str) -> str:
    return source if source.startswith("builtin:") or not local_path(source).exists() else Path(source).name


def _source(source: str) -> tuple[str, dict[str, object]]:
    """MLflow's own kinds of source (mlflow 3.17.2, data/), with what each of them is found by."""
    if source.startswith("builtin:"):
        return "code", {"tags": {"mlflow.source.name": source}}
    if (path := local_path(source)).exists():
        return "local", {"uri": str(path.absolute())}
    return "hugging_face", {"path": source}
