"""The best trial's weights as an MLflow model, which `mlflow.transformers` and `mlflow.pyfunc` load and generate with.

Adapter, tokenizer and model card are in it; its base model is named, not copied, and never loaded here: mlflow's own
`transformers.save_model` wants the base in memory, which the sweep's driver may not have (3.17.2).
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import first_line
from orchestrator.export.folder import Exported, export
from orchestrator.export.merge import merged_dtype
from orchestrator.reporting.statistics import objective_of
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialResult
from orchestrator.sweep.mlflow_patience import time_to_upload, twice
from orchestrator.sweep.mlflow_runs import deleted_words, is_deleted, key_of
from orchestrator.sweep.tracking_address import tracking_uri

ALIAS = "champion"
"""Of the registered model's newest best version."""
EXAMPLE = "Write one sentence about the sea."
NEEDED = ("mlflow", "torch", "transformers", "peft", "accelerate", "safetensors")
# mlflow 3.17.2, transformers/flavor_config.py, FlavorKey: what its loader looks for.
_WEIGHTS = {"adapter": "peft", "full": "model"}
_TOKENIZER = "components/tokenizer"
_MODEL_FILES = ("adapter_config.json", "config.json", "generation_config.json", "model.safetensors.index.json")


def log_best(
    sweep: SweepConfig, result: SweepResult, best: TrialResult, folder: SweepFolder, say: Callable[[str], None]
) -> None:
    """Log the best trial's weights as a model of its run, and register it where the sweep file says so.

    What goes wrong is said, of whatever kind: the sweep has ended, and its results do not hang on it.
    """
    server = tracking_uri(sweep)
    try:
        # A registry in a database looks for the model there, whatever its client was told (3.17.2).
        mlflow.set_tracking_uri(server)
        if best.mlflow_run_id and is_deleted(MlflowClient(server).get_run(best.mlflow_run_id)):
            say(f"the best adapter is not logged as an MLflow model: {deleted_words(best.mlflow_run_id, server)}")
            return
        uri = twice(lambda: _logged(MlflowClient(server), sweep, result, best, folder))
    except (Exception, KeyboardInterrupt) as error:
        why = first_line(error)[:300]
        say(f"the best adapter is not logged as an MLflow model ({why}): run the same command again to do it")
    else:
        say(f"MLflow model: {uri}")


def _logged(
    client: MlflowClient, sweep: SweepConfig, result: SweepResult, best: TrialResult, folder: SweepFolder
) -> str:
    """Its address, as `models:/m-…` or `models:/NAME@champion`."""
    run_id = best.mlflow_run_id
    assert run_id is not None
    model_id = _find(client, run_id) or _log(client, result, best, run_id, folder)
    _link(client, result, best, run_id, model_id)
    name = sweep.tracking.registered_model
    if name is None:
        return f"models:/{model_id}"
    _register(client, name, model_id, run_id, result.sweep_id, best.trial_id)
    return f"models:/{name}@{ALIAS}"


def _find(client: MlflowClient, run_id: str) -> str | None:
    """What an earlier run of the sweep logged: a trial that has ended does not change."""
    experiment_id = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    # One that a run was cut off from uploading stays pending.
    return next((str(model.model_id) for model in found if model.status == "READY"), None)


def _log(client: MlflowClient, result: SweepResult, best: TrialResult, run_id: str, folder: SweepFolder) -> str:
    logged = client.create_logged_model(
        client.get_run(run_id).info.experiment_id,
        # mlflow 3.17.2, utils/validation.py: a model's name has no dot.
        result.name.replace(".", "-"),
        source_run_id=run_id,
        tags={"sweep_id": result.sweep_id, "trial_id": best.trial_id},
        params={key: str(value) for key, value in best.config.model_dump(mode="json").items()},
        model_type="text-generation",
    )
    with tempfile.TemporaryDirectory(prefix="orchestrator-model-") as temporary:
        exported = export(folder, best.trial_id, Path(temporary) / "exported", merge=False, force=False)
        about = {"run_id": run_id, "model_id": logged.model_id, "artifact_path": logged.artifact_location}
        written = write_model(exported, best.config, Path(temporary) / "model", about)
        with time_to_upload(file for file in written.rglob("*") if file.is_file()):
            client.log_model_artifacts(logged.model_id, str(written))
    client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)


def _link(client: MlflowClient, result: SweepResult, best: TrialResult, run_id: str, model_id: str) -> None:
    """Show it at the trial's run and the sweep's, and what it reached; once, however often it is asked."""
    point = best.best
    if point and (value := objective_of(result, best)) is not None:
        name = key_of(result.objective_metric)
        client.log_metric(run_id, name, value, point.time_ms, point.step, model_id=model_id)
    for run in filter(None, (run_id, result.mlflow_run_id)):
        outputs = client.get_run(run).outputs
        if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
            client.log_outputs(run, [LoggedModelOutput(model_id, point.step if point else 0)])


def write_model(exported: Exported, config: TrialConfig, to: Path, about: Mapping[str, str]) -> Path:
    """An MLflow model of the transformers and pyfunc flavors at `to`, out of an exported folder."""
    with warnings.catch_warnings():
        # MLflow's, of its own types (3.17.2).
        warnings.simplefilter("ignore")
        import mlflow.pyfunc
        from mlflow.models import Model
    model = Model(**about)
    model.add_flavor("transformers", **_flavor(exported, config))
    mlflow.pyfunc.save_model(
        to,
        loader_module="mlflow.transformers",
        mlflow_model=model,
        signature=_signature(),
        input_example=[EXAMPLE],
        # A build's own mark, as +cpu, is this machine's: `2.13.0` is on every index.
        pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in NEEDED],
        # The answer alone, as a chat or a server wants it.
        model_config={"return_full_text": False},
    )
    weights, tokenizer = to / _WEIGHTS[exported.kind], to / _TOKENIZER
    for folder in (weights, tokenizer):
        folder.mkdir(parents=True)
    for file in exported.folder.iterdir():
        if file.name == "README.md":
            where = to
        elif file.suffix == ".safetensors" or file.name in _MODEL_FILES:
            where = weights
        else:
            where = tokenizer
        shutil.move(file, where / file.name)
    model.model_size_bytes = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    model.save(to / "MLmodel")
    return to


def _flavor(exported: Exported, config: TrialConfig) -> dict[str, Any]:
    """What `mlflow.transformers` needs to load it (mlflow 3.17.2, transformers/flavor_config.py)."""
    dtype = merged_dtype(config.precision)
    flavor: dict[str, Any] = {
        "transformers_version": metadata.version("transformers"),
        "code": None,
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        "pipeline_model_type": "AutoModelForCausalLM",
        "source_model_name": exported.base,
        "components": ["tokenizer"],
        "tokenizer_type": "AutoTokenizer",
        # Without it, the base as it was published: what 4 and 8 bits are computed from.
        **({} if dtype == "auto" else {"torch_dtype": f"torch.{dtype}"}),
    }
    if exported.kind == "adapter":
        # A folder, or a hub id: the loader hands it to from_pretrained.
        return {**flavor, "peft_adaptor": _WEIGHTS["adapter"], "local_base_model_path": exported.base}
    return {**flavor, "model_binary": _WEIGHTS["full"]}


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    texts = Schema([ColSpec(DataType.string)])
    settings = [ParamSpec("max_new_tokens", DataType.integer, 64), ParamSpec("do_sample", DataType.boolean, False)]
    return ModelSignature(texts, texts, ParamSchema(settings))


def _register(client: MlflowClient, name: str, model_id: str, run_id: str, sweep_id: str, trial_id: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    have = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    versions = [version for version in have if version.source == f"models:/{model_id}"]
    version = (
        versions[0]
        if versions
        else client.create_model_version(
            name,
            f"models:/{model_id}",
            run_id,
            tags={"sweep_id": sweep_id, "trial_id": trial_id},
            model_id=model_id,
        )
    )
    client.set_registered_model_alias(name, ALIAS, version.version)
