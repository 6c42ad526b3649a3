"""README.md of an exported model: what was asked, trained and measured, on what data and with what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from orchestrator.config.local_path import local_path
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.export.merge import merged_dtype
from orchestrator.export.trial_weights import Kind
from orchestrator.reporting import quantities
from orchestrator.reporting.statistics import objective_of, spell
from orchestrator.results.provenance import run_page
from orchestrator.results.records import SweepResult, TrialResult
from orchestrator.results.secrets import without_secret

FROM_BUILTIN = {
    "builtin:smollm2-135m": (
        "The base is SmolLM2-135M-Instruct (Apache-2.0) as a package ships it in 4 bits, dequantised: its outputs "
        "differ from those of the published weights."
    )
}


MARK = "exported from a sweep that `orchestrator` ran."
"""Stands in every card: `--force` knows an export by it."""


def model_card(sweep: SweepResult, trial: TrialResult, kind: Kind, config: SweepConfig | None) -> str:
    """README.md: what was asked, trained and measured, on what data and with what; of a local base only its name."""
    on_hub = _is_on_hub(sweep.model)
    head = {
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": sweep.model} if on_hub else {}),
        "tags": ["orchestrator", *([] if kind == "full" else ["lora"])],
    }
    what = {
        "adapter": "A LoRA adapter for",
        "merged": "A LoRA adapter merged into",
        "full": "A full fine-tune of",
    }[kind]
    # A folder's name, not its path, which is this machine's and nobody else's business.
    base = sweep.model if on_hub or sweep.model.startswith("builtin:") else Path(sweep.model).name
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {sweep.name}: trial {trial.trial_id}",
        f"{what} `{base}`, {MARK}",
        *_remarks(sweep, trial, kind),
        "## Use",
        _snippet(kind, merged_dtype(trial.config.precision)),
        "## Question",
        sweep.question or "None was written down.",
        "## Data",
        _data(sweep, config),
        "## Result",
        _table(_measured(sweep, trial)),
        "## Configuration",
        _table({name: spell(value) for name, value in trial.config if value is not None}),
        "## Provenance",
        _table(_provenance(sweep, trial, config)),
    ]
    return "\n\n".join(parts) + "\n"


def _is_on_hub(model: str) -> bool:
    return not model.startswith("builtin:") and not local_path(model).exists()


def _remarks(sweep: SweepResult, trial: TrialResult, kind: Kind) -> list[str]:
    found = []
    if note := FROM_BUILTIN.get(sweep.model):
        found.append(note)
    if kind == "adapter" and not _is_on_hub(sweep.model):
        found.append(
            "The adapter names its base by a folder of the machine that exported it. Elsewhere put the base's folder "
            "into `adapter_config.json` (`base_model_name_or_path`), or export the whole model with `--merge`."
        )
    if kind != "full" and trial.config.precision.is_quantized:
        now = "is merged into" if kind == "merged" else "is loaded below with"
        found.append(
            f"The adapter was trained on the base in {trial.config.precision} and {now} the unquantised base, so its "
            "loss may differ a little from the one below."
        )
    if trial.status.needs_reason:
        found.append(f"The trial is {trial.status.value.replace('_', ' ')}: {trial.reason}")
    return found


def _snippet(kind: Kind, dtype: str) -> str:
    """Code to be pasted where the card lies; an adapter's base is another's, and told which type it was trained in."""
    loader, told, imports = "AutoModelForCausalLM", "", ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if kind == "adapter":
        loader, told = "AutoPeftModelForCausalLM", f', dtype="{dtype}"'
        imports = [f"from peft import {loader}", "from transformers import AutoTokenizer"]
    return "\n".join(
        [
            "```python",
            *imports,
            "",
            'folder = "."  # this one',
            f"model = {loader}.from_pretrained(folder{told})",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "```",
        ]
    )


def _data(sweep: SweepResult, config: SweepConfig | None) -> str:
    lines = {"hash": sweep.data_hash or quantities.UNKNOWN}
    if config:
        lines = {
            "train": config.data.train,
            "eval": spell(config.data.eval),
            "format": config.data.format,
            **lines,
        }
    return _table(lines)


def _measured(sweep: SweepResult, trial: TrialResult) -> dict[str, str]:
    best, memory = trial.best, trial.peak_memory
    found = {"status": trial.status.value, "repeat": str(trial.repeat), "seed": str(trial.seed)}
    if best:
        found |= {
            "best step": f"{best.step} of {trial.config.max_steps}",
            "eval_loss": quantities.number(best.eval_loss),
            "loss": quantities.number(best.loss),
            "tokens trained on": f"{best.tokens:,}",
        }
        if sweep.objective_metric not in found:
            found[sweep.objective_metric] = quantities.number(objective_of(sweep, trial))
    return found | {
        "trainable parameters": f"{trial.trainable_parameters:,}" if trial.trainable_parameters else quantities.UNKNOWN,
        "tokens a second": quantities.rate(trial.tokens_per_s),
        "time a step": quantities.step_time(trial.step_time_s),
        "peak memory of a worker": quantities.memory(memory.measured_bytes if memory else None),
    }


def _provenance(sweep: SweepResult, trial: TrialResult, config: SweepConfig | None) -> dict[str, str]:
    server = config.tracking.uri if config else None
    found = {
        "sweep": f"{sweep.name} ({sweep.sweep_id})",
        "MLflow run": _run(server, trial.mlflow_run_id),
        "MLflow parent run": _run(server, sweep.mlflow_run_id),
        "MLflow server": without_secret(server) if server else "none named in the sweep file",
        "devices": ", ".join(dict.fromkeys(trial.devices)) or quantities.UNKNOWN,
    }
    if trial.git:
        found["commit of the repository it was run in"] = trial.git.commit + (
            " with changes" if trial.git.dirty else ""
        )
    return found | trial.versions


def _run(server: str | None, run_id: str | None) -> str:
    """The run as a link, where a server has a page of it."""
    if run_id is None:
        return quantities.UNKNOWN
    page = run_page(server, run_id) if server else None
    return f"[{run_id}]({page})" if page else run_id


def _table(rows: Mapping[str, str]) -> str:
    # A bar would end the cell.
    cells = [(name, " ".join(value.split()).replace("|", "\\|")) for name, value in rows.items()]
    lines = [f"| {name} | {value} |" for name, value in cells]
    return "\n".join(["| | |", "| --- | --- |", *lines])
