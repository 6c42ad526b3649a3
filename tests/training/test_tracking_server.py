"""A sweep's tree in real MLflow servers, read back as its users read it: over REST, and as a model that generates."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest
import requests
import torch

from orchestrator.config.sweep_config import DataConfig, SweepConfig, TrackingConfig
from orchestrator.config.sweep_file import to_yaml
from orchestrator.reporting import report
from orchestrator.reporting.recommendation import trial_to_take
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialResult
from orchestrator.results.storage import read_sweep
from orchestrator.sweep import logged_model, system_metrics
from orchestrator.sweep.tracking import Tracker
from orchestrator.training import data
from tests import tracking_servers
from tests.tracking_servers import Server
from tests.training.test_export import a_sweep, base_plus_adapter, logits_of
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(600)
MODEL = "tiny-writer"


@dataclass(frozen=True, slots=True)
class Tracked:
    """A sweep that a server has."""

    server: Server
    sweep: SweepConfig
    folder: SweepFolder
    result: SweepResult
    best: TrialResult
    said: tuple[str, ...]

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """MLflow's REST API."""
        where = f"{self.server.uri}/api/2.0/mlflow/{path}"
        return _answer(requests.get(where, params=query, auth=self.server.login, timeout=30))

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        where = f"{self.server.uri}/api/2.0/mlflow/{path}"
        return _answer(requests.post(where, json=body, auth=self.server.login, timeout=30))

    def runs(self, condition: str, *order_by: str) -> list[dict[str, Any]]:
        experiment = self.get("experiments/get-by-name", experiment_name=self.sweep.name)["experiment"]
        ids = [experiment["experiment_id"]]
        return list(self.post("runs/search", experiment_ids=ids, filter=condition, order_by=order_by)["runs"])


def _answer(response: requests.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return dict(response.json())


@pytest.fixture(scope="module", params=["sqlite", "postgresql and s3"])
def tracked(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tracked]:
    root = tmp_path_factory.mktemp("server")
    start = tracking_servers.on_sqlite if request.param == "sqlite" else tracking_servers.on_postgresql_and_s3
    with start(root) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        # Logging a model names the server to all of this process, here and in the tests before.
        mlflow.set_tracking_uri(None)
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)
        # A busy machine is no outage.
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")
        yield _track(server, root, tiny_model)
        mlflow.set_tracking_uri(None)


def _track(server: Server, root: Path, tiny_model: Path) -> Tracked:
    """A made-up sweep of real adapters, tracked as `run` does it, twice as if it were resumed."""
    folder = a_sweep(root / "made-up", tiny_model, {"rank": 16}, {"rank": 8}, {"rank": 128})
    sweep = SweepConfig(
        name="made-up",
        model="builtin:tiny-llama",
        data=DataConfig(train="builtin:python-docs", eval=0.1),
        tracking=TrackingConfig(uri=server.uri, registered_model=MODEL),
        space={"rank": [8, 16, 128]},
        storage=str(root),
    )
    data.prepare(sweep.data, tiny_model, folder.data)
    write_atomically(folder.sweep_file, to_yaml(sweep))
    write_atomically(folder.plan, "{}")
    write_atomically(folder.report, report.render_html(report.build(folder)))
    result, said = read_sweep(folder)[0], []
    for _ in range(2):
        tracker = Tracker(sweep, result.sweep_id, folder)
        for trial in result.trials:
            tracker.track(trial)
        with system_metrics.logged(server.uri, tracker.parent_run_id):
            wait_until(
                functools.partial(_metrics_of, tracker.parent_run_id),
                lambda seen: "system/cpu_utilization_percentage" in seen,
                60,
            )
        assert tracker.finish(120)
        ids = {trial.trial_id: tracker.run_id(trial.trial_id) for trial in result.trials}
        trials = tuple(t.model_copy(update={"mlflow_run_id": ids[t.trial_id]}) for t in result.trials)
        result = result.model_copy(update={"trials": trials, "mlflow_run_id": tracker.parent_run_id})
        best = trial_to_take(result)
        assert best is not None
        tracker.close_parent(result, best)
        logged_model.log_best(sweep, result, best, folder, said.append)
    return Tracked(server, sweep, folder, result, best, tuple(said))


def _metrics_of(run_id: str) -> set[str]:
    return set(mlflow.MlflowClient().get_run(run_id).data.metrics)


def _artifacts(tracked: Tracked, run_id: str) -> set[str]:
    return {file["path"] for file in tracked.get("artifacts/list", run_id=run_id)["files"]}


def test_the_server_has_the_sweeps_tree_once(tracked: Tracked) -> None:
    if tracked.server.login:
        where = f"{tracked.server.uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name=made-up"
        assert requests.get(where, timeout=30).status_code == 401
    (parent,) = tracked.runs("tags.kind = 'sweep'")
    assert parent["info"]["status"] == "FINISHED"
    metrics = {metric["key"] for metric in parent["data"]["metrics"]}
    assert {"best_eval_loss", "system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= metrics
    assert _artifacts(tracked, parent["info"]["run_id"]) >= {
        "report.html",
        "plan.json",
        "results.json",
        "results.csv",
        "sweep.yaml",
    }
    children = tracked.runs("tags.kind = 'trial'")
    assert len(children) == 3
    for child in children:
        tags = {tag["key"]: tag["value"] for tag in child["data"]["tags"]}
        assert tags["mlflow.parentRunId"] == parent["info"]["run_id"]
        assert {"adapter", "result.json"} <= _artifacts(tracked, child["info"]["run_id"])


def test_children_sort_by_a_searched_number_as_a_number(tracked: Tracked) -> None:
    for order, ranks in (("ASC", ["8", "16", "128"]), ("DESC", ["128", "16", "8"])):
        children = tracked.runs("tags.kind = 'trial'", f"metrics.`setting/rank` {order}")
        params = [{param["key"]: param["value"] for param in child["data"]["params"]} for child in children]
        assert [param["rank"] for param in params] == ranks
        assert {param["precision"] for param in params} == {"fp32"}
        assert {param["zero_stage"] for param in params} == {"2"}


def test_the_parent_names_its_data_by_the_hash_of_its_tokens(tracked: Tracked) -> None:
    (parent,) = tracked.runs("tags.kind = 'sweep'")
    inputs = parent["inputs"]["dataset_inputs"]
    contexts = {one["tags"][0]["value"]: one["dataset"] for one in inputs}
    assert set(contexts) == {"training", "evaluation"}
    summary = data.read_summary(tracked.folder.data)
    assert summary is not None
    assert contexts["training"]["digest"] == summary.hash[:32]
    assert f'"num_rows": {summary.train_rows}' in contexts["training"]["profile"]
    assert "builtin:python-docs" in contexts["training"]["source"]


def test_the_champion_is_the_best_trials_and_loads_and_generates(tracked: Tracked) -> None:
    assert tracked.said == (f"MLflow model: models:/{MODEL}@champion",) * 2
    found = tracked.get("registered-models/alias", name=MODEL, alias="champion")["model_version"]
    assert found["run_id"] == tracked.best.mlflow_run_id
    # Logged and registered once, however often the sweep is run.
    assert found["version"] == "1"
    for run_id in (tracked.best.mlflow_run_id, tracked.result.mlflow_run_id):
        outputs = tracked.get("runs/get", run_id=run_id)["run"]["outputs"]["model_outputs"]
        assert [f"models:/{output['model_id']}" for output in outputs] == [found["source"]]

    pipeline = mlflow.transformers.load_model(f"models:/{MODEL}@champion")
    expected = base_plus_adapter(tracked.folder, _base(pipeline), tracked.best)
    torch.testing.assert_close(logits_of(pipeline.model), expected)

    served = mlflow.pyfunc.load_model(f"models:/{MODEL}@champion")
    assert served.metadata.run_id == tracked.best.mlflow_run_id
    assert served.metadata.get_params_schema() is not None
    answers = served.predict(served.input_example, params={"max_new_tokens": 8})
    assert len(answers) == 1
    assert answers[0]
    assert logged_model.EXAMPLE not in answers[0]


def _base(pipeline: Any) -> Path:
    return Path(pipeline.model.peft_config["default"].base_model_name_or_path)


def test_the_artifacts_are_in_the_bucket(tracked: Tracked) -> None:
    if tracked.server.s3_endpoint is None:
        pytest.skip("this server keeps its artifacts in a folder")
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    bucket = boto3.client("s3", endpoint_url=tracked.server.s3_endpoint, **keys)
    names = {entry["Key"] for entry in bucket.list_objects_v2(Bucket="mlflow")["Contents"]}
    assert any(name.endswith("artifacts/peft/adapter_model.safetensors") for name in names)
    assert any(name.endswith("artifacts/report.html") for name in names)
