"""The tiny model and its data, built once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.config.sweep_config import DataConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.training import data, model_source

# Two threads a worker on two cores would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = TrialConfig(
    rank=8,
    precision="fp32",
    global_batch_size=8,
    micro_batch_size=4,
    sequence_length=32,
    learning_rate=1e-2,
    max_steps=4,
    eval_every=2,
)


def tiny(**changes: object) -> TrialConfig:
    """A quick trial with some settings changed."""
    return TrialConfig.model_validate({**TINY.model_dump(), **changes})


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return model_source.materialize(model_source.resolve("builtin:tiny-llama"))


@pytest.fixture(scope="session")
def tiny_data(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A small file: evaluations are the tests' cost.
    source = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    import json
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)[:8]).split()
    rows = [{"text": " ".join(words[start : start + 4 + start % 37])} for start in range(0, 3000, 30)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path_factory.mktemp("data") / "data"
    data.prepare(DataConfig(train=str(source), eval=0.1), tiny_model, folder)
    return folder
