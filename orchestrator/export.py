"""A trial's adapter out of a sweep, alone or merged into its base, as a folder that `from_pretrained` reads.

torch, transformers and peft are imported where they are used: a wrong trial id is told before they are loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.sweep_file import load
from orchestrator.config.trial_config import Precision
from orchestrator.errors import InputError, ModelError, StorageError
from orchestrator.reporting import quantities
from orchestrator.reporting.statistics import best_trial, spell
from orchestrator.results import remote
from orchestrator.results.provenance import without_secret
from orchestrator.results.records import SweepResult, TrialResult
from orchestrator.results.storage import SweepFolder, read_sweep
from orchestrator.training import model_source

Kind = Literal["adapter", "merged", "full"]
# Pickles, PEFT's own model card and what a training tool left there stay behind.
COPIED = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json")
CARD = "README.md"
FROM_BUILTIN = {
    "builtin:smollm2-135m": (
        "The base is SmolLM2-135M-Instruct (Apache-2.0) as a package ships it in 4 bits, dequantised: its outputs "
        "differ from those of the published weights."
    )
}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    folder: Path
    trial: TrialResult
    kind: Kind
    """`full` where the trial trained all weights, so that there is no adapter."""

    @property
    def loader(self) -> str:
        """The class whose `from_pretrained` reads the folder."""
        return "peft.AutoPeftModelForCausalLM" if self.kind == "adapter" else "transformers.AutoModelForCausalLM"


@dataclass(frozen=True, slots=True)
class _Base:
    """The base model of a sweep."""

    model: str
    """As the sweep file names it."""
    name: str
    """What `from_pretrained` takes for it: a hub id, or a folder of this machine."""
    source: str
    """Where its files are read now: a folder, or a hub id of which only the small files are wanted."""
    config: Mapping[str, Any]


def export(folder: SweepFolder, trial_id: str | None, to: Path, *, merge: bool, force: bool) -> Exported:
    """Write the named trial's weights, or the best one's, to the folder `to`, which is there whole or not at all.

    Raises:
        FolderError: there is no sweep.
        InputError: no such trial, a trial without weights, or `to` exists already.
        ModelError: the base model cannot be had.
        StorageError: `to` cannot be written.
    """
    to = to.expanduser().absolute()
    sweep, _ = read_sweep(folder)
    if os.path.lexists(to) and not force:
        raise InputError(f"{to} exists already: name another folder with --to, or replace this one with --force")
    trial = choose_trial(sweep, trial_id)
    weights = weights_of(folder, trial)
    kind: Kind = "full" if trial.config.trains_all_weights else "merged" if merge else "adapter"
    base = _base_of(sweep.model, with_weights=kind == "merged")
    _refuse_to_destroy(to, folder, base)
    with _written_aside(to) as partial:
        if kind == "merged":
            _merge(base.source, weights, trial, partial)
        else:
            _copy(weights, partial)
            _point_at_base(partial, base, kind)
        _add_tokenizer_and_generation(base, partial)
        (partial / CARD).write_text(model_card(sweep, trial, kind, _config_of(folder)), encoding="utf-8")
        for file in partial.iterdir():
            # safetensors makes files that only their owner may read.
            file.chmod(0o644)
    return Exported(to, trial, kind)


def choose_trial(sweep: SweepResult, trial_id: str | None) -> TrialResult:
    """The named trial, or the best.

    Raises:
        InputError: there is no such trial, or none was evaluated.
    """
    if trial_id is None:
        best = best_trial(sweep)
        if best is None:
            raise InputError(
                f"no trial of {sweep.name} has been evaluated, so none is the best: run the sweep to its end, "
                "or name a trial with --trial"
            )
        return best
    known = {trial.trial_id: trial for trial in sweep.trials}
    if trial_id not in known:
        near = get_close_matches(trial_id, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {_some(list(known))}"
        raise InputError(f"--trial {trial_id}: {sweep.name} has no such trial; {hint}")
    return known[trial_id]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def weights_of(folder: SweepFolder, trial: TrialResult) -> Path:
    """The folder with what the trial trained.

    Raises:
        InputError: it has none; the reason is told.
    """
    remote.fetch_trial(folder, trial.trial_id)
    root = folder.trial(trial.trial_id).root
    where = root / trial.adapter if trial.adapter else folder.trial(trial.trial_id).adapter
    if any(where.glob("*.safetensors")):
        return where
    why = f" ({trial.reason})" if trial.reason else ""
    status = trial.status.value.replace("_", " ")
    raise InputError(
        f"trial {trial.trial_id} has no adapter in {where}: it is {status}{why}, and one is saved at the first "
        "evaluation; name another with --trial"
    )


def _base_of(model: str, *, with_weights: bool) -> _Base:
    found = model_source.resolve(model)
    if found.folder is None and not model.startswith("builtin:"):
        # Of a hub model only the small files are fetched where its weights are not merged.
        source = str(model_source.materialize(found)) if with_weights else model
        return _Base(model, model, source, found.config)
    folder = str(model_source.materialize(found))
    return _Base(model, folder, folder, found.config)


def _refuse_to_destroy(to: Path, sweep: SweepFolder, base: _Base) -> None:
    """With --force a folder is replaced as a whole; not one that other things live in."""
    goes = to.resolve()
    if goes.is_relative_to(sweep.trial("any").root.parent.resolve()):
        raise InputError(f"--to {to} is a part of the sweep's records, which --force would remove: name another folder")
    if not os.path.lexists(to):
        return
    if to.is_symlink() or not to.is_dir():
        raise InputError(f"--force replaces a folder, and {to} is none: name another with --to")
    kept = {"the sweep": sweep.root, "the current folder": Path.cwd(), "your home": Path.home()}
    if Path(base.source).is_dir():
        kept["the base model"] = Path(base.source)
    for what, where in kept.items():
        if where.resolve().is_relative_to(goes):
            raise InputError(f"--force would remove {to}, which holds {what}: name another folder with --to")


@contextmanager
def _written_aside(to: Path) -> Iterator[Path]:
    """A folder beside `to`, on the same file system, that takes its place at the end."""
    partial, old = (to.with_name(f".{to.name}.{os.getpid()}{end}") for end in ("", ".old"))
    try:
        partial.mkdir(parents=True)
        yield partial
        if os.path.lexists(to):
            to.rename(old)
        partial.rename(to)
    except OSError as error:
        raise StorageError(f"cannot write {to} ({error}): free some space there, or name another --to") from error
    finally:
        if os.path.lexists(old) and not os.path.lexists(to):
            old.rename(to)
        for rest in (partial, old):
            if rest.is_dir() and not rest.is_symlink():
                shutil.rmtree(rest, ignore_errors=True)
            else:
                rest.unlink(missing_ok=True)


def _copy(weights: Path, to: Path) -> None:
    for pattern in COPIED:
        for file in weights.glob(pattern):
            shutil.copyfile(file, to / file.name)


def _point_at_base(to: Path, base: _Base, kind: Kind) -> None:
    """The trial's files name a folder of the machine that trained, and are set for training."""
    file = to / ("adapter_config.json" if kind == "adapter" else "config.json")
    changes: dict[str, Any] = (
        {"base_model_name_or_path": base.name}
        if kind == "adapter"
        # Training keeps no cache, and `generate` would go without it too.
        else {"use_cache": base.config.get("use_cache", True)}
    )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"the trial's {file.name} is missing or damaged: name another with --trial") from error
    file.write_text(json.dumps({**raw, **changes}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _merge(base: str, adapter: Path, trial: TrialResult, to: Path) -> None:
    """W + B·A·scaling in the weights' own dtype.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; peft 0.21.2, tuners/tuners_utils.py, merge_and_unload.
    """
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = merged_dtype(trial.config.precision)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"the base model in {base} cannot be loaded: {error}") from error
    try:
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"the adapter of trial {trial.trial_id} cannot be merged into {base}: {error}; "
            "leave --merge out, or name another with --trial"
        ) from error
    try:
        merged.save_pretrained(to)
    except SafetensorError as error:
        raise StorageError(f"cannot write {to} ({error}): free some space there, or name another --to") from error


def merged_dtype(precision: Precision) -> Literal["float32", "bfloat16", "float16", "auto"]:
    """The dtype of the trial's own weights; `auto` is that of the base as published.

    A quantised base is merged unquantised: adding to 4 or 8 bits would round the adapter away.
    """
    if precision.is_quantized:
        return "auto"
    if precision is Precision.BF16:
        return "bfloat16"
    return "float16" if precision is Precision.FP16 else "float32"


def _add_tokenizer_and_generation(base: _Base, to: Path) -> None:
    """Tokenizer, chat template and generation config; what the base does not have is left out."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.source)
        try:
            generation = GenerationConfig.from_pretrained(base.source)
        except OSError:
            # Without a file of its own, the model's config says how it generates.
            generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base.source))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the tokenizer of {base.model} cannot be read ({error}); write it beside the model with save_pretrained"
        ) from error
    tokenizer.save_pretrained(to)
    generation.save_pretrained(to)


def _config_of(folder: SweepFolder) -> SweepConfig | None:
    """The sweep file; None where this release cannot read it, since the card has most of it from the records."""
    try:
        return load(folder.sweep_file)
    except InputError:
        return None


def model_card(sweep: SweepResult, trial: TrialResult, kind: Kind, config: SweepConfig | None) -> str:
    """README.md: what was asked, trained and measured, on what data and with what; of a local base only its name."""
    on_hub = not sweep.model.startswith("builtin:") and not Path(sweep.model).expanduser().exists()
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
        f"{what} `{base}`, exported from a sweep that `orchestrator` ran.",
        *_remarks(sweep, trial, kind),
        "## Use",
        _snippet(kind),
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


def _remarks(sweep: SweepResult, trial: TrialResult, kind: Kind) -> list[str]:
    found = []
    if note := FROM_BUILTIN.get(sweep.model):
        found.append(note)
    if kind == "merged" and trial.config.precision.is_quantized:
        found.append(
            f"The adapter was trained on the base in {trial.config.precision} and is merged into the unquantised base, "
            "so its loss may differ a little from the one below."
        )
    if trial.status.needs_reason:
        found.append(f"The trial is {trial.status.value.replace('_', ' ')}: {trial.reason}")
    return found


def _snippet(kind: Kind) -> str:
    loader, imports = "AutoModelForCausalLM", ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if kind == "adapter":
        loader = "AutoPeftModelForCausalLM"
        imports = [f"from peft import {loader}", "from transformers import AutoTokenizer"]
    return "\n".join(
        [
            "```python",
            *imports,
            "",
            f'model = {loader}.from_pretrained("this folder")',
            'tokenizer = AutoTokenizer.from_pretrained("this folder")',
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
            found[sweep.objective_metric] = quantities.number(getattr(best, sweep.objective_metric, None))
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
        "MLflow run": trial.mlflow_run_id or quantities.UNKNOWN,
        "MLflow parent run": sweep.mlflow_run_id or quantities.UNKNOWN,
        "MLflow server": without_secret(server) if server else "none named in the sweep file",
        "devices": ", ".join(dict.fromkeys(trial.devices)) or quantities.UNKNOWN,
    }
    if trial.git:
        found["commit"] = trial.git.commit + (" with changes" if trial.git.dirty else "")
    return found | trial.versions


def _table(rows: Mapping[str, str]) -> str:
    # A bar would end the cell.
    cells = [(name, " ".join(value.split()).replace("|", "\\|")) for name, value in rows.items()]
    lines = [f"| {name} | {value} |" for name, value in cells]
    return "\n".join(["| | |", "| --- | --- |", *lines])
