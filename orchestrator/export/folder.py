"""A trial's adapter out of a sweep, alone or merged into its base, as a folder that `from_pretrained` reads.

transformers is imported where it is used: a wrong trial id is told before it is loaded.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from orchestrator.config.local_path import local_path
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.sweep_file import load
from orchestrator.errors import InputError, ModelError, StorageError, cut, shown
from orchestrator.export.merge import merge as merge_adapter
from orchestrator.export.model_card import MARK, model_card
from orchestrator.export.trial_weights import Kind, choose_trial, weights_of
from orchestrator.results.files import let_read
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import TrialResult
from orchestrator.results.storage import read_sweep
from orchestrator.training import model_source
from orchestrator.training.tokenizer import load_tokenizer

# Pickles, PEFT's own model card and what a training tool left there stay behind.
GENERATION = "generation_config.json"
COPIED = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", GENERATION)
CARD = "README.md"
TOKENIZER = (
    *("*token*.json", "tokenizer.model", "vocab.*", "merges.txt", "spiece.model", "sentencepiece*.model"),
    *("chat_template*", "additional_chat_templates"),
)
"""What `save_pretrained` of the tokenizers writes."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    folder: Path
    trial: TrialResult
    kind: Kind
    base: str
    """What `from_pretrained` takes for the base model: a hub id, or a folder of this machine."""
    doubt: str | None
    """The report's words, where its answer is not to take the trial and nobody named one."""

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


def export(
    folder: SweepFolder,
    trial_id: str | None,
    to: Path,
    *,
    merge: bool,
    force: bool,
    runs: Mapping[str, str] = {},
) -> Exported:
    """Write the weights of the named trial, or of that in the report's answer, to the folder `to`: whole or not at all.

    runs: MLflow's runs of trials whose records do not name them, as while the sweep is at work.

    Raises:
        FolderError: there is no sweep.
        InputError: no such trial, a trial without weights, or `to` exists already.
        ModelError: the base model cannot be had.
        StorageError: `to` cannot be written.
    """
    to = Path(os.path.normpath(local_path(to).absolute()))
    sweep, _ = read_sweep(folder)
    if os.path.lexists(to) and not force:
        raise InputError(f"{to} exists already: name another folder with --to, or replace this one with --force")
    trial, doubt = choose_trial(sweep, trial_id)
    trial = trial.model_copy(update={"mlflow_run_id": trial.mlflow_run_id or runs.get(trial.trial_id)})
    weights = weights_of(folder, trial)
    kind: Kind = "full" if trial.config.trains_all_weights else "merged" if merge else "adapter"
    base = _base_of(sweep.model, with_weights=kind == "merged")
    _refuse_to_destroy(to, folder, base)
    with _written_aside(to) as partial:
        if kind == "merged":
            merge_adapter(base.source, weights, trial, partial)
        else:
            _copy(weights, partial)
            _point_at_base(partial, base, kind)
        _add_tokenizer_and_generation(base, partial)
        (partial / CARD).write_text(model_card(sweep, trial, kind, _config_of(folder)), encoding="utf-8")
        for file in partial.iterdir():
            let_read(file)
    return Exported(to, trial, kind, base.name, doubt)


def _base_of(model: str, *, with_weights: bool) -> _Base:
    found = model_source.resolve(model)
    if found.folder is None and not model.startswith("builtin:"):
        # Of a hub model only the small files are fetched where its weights are not merged.
        source = str(model_source.materialize(found)) if with_weights else model
        return _Base(model, model, source, found.config)
    folder = str(model_source.materialize(found))
    return _Base(model, folder, folder, found.config)


def _refuse_to_destroy(to: Path, sweep: SweepFolder, base: _Base) -> None:
    """Nothing of ours lies in a sweep's folder but the sweep, and with --force a folder is replaced as a whole: not one
    that other things live in.
    """
    goes = to.resolve()
    if sweep.root.resolve() in goes.parents:
        raise InputError(f"--to {to} lies in the sweep's own folder, which holds its records: name one outside of it")
    if not os.path.lexists(to):
        return
    if to.is_symlink() or not to.is_dir():
        raise InputError(f"--force replaces a folder, and {to} is none: name another with --to")
    kept = {"the sweep": sweep.root, "the current folder": Path.cwd(), "your home": local_path("~")}
    if Path(base.source).is_dir():
        kept["the base model"] = Path(base.source)
    for what, where in kept.items():
        if where.resolve().is_relative_to(goes):
            raise InputError(f"--force would remove {to}, which holds {what}: name another folder with --to")
    if foreign := _no_export(to):
        raise InputError(
            f"--force replaces what `export` made, and {to} {foreign}: name another folder with --to, or remove this "
            "one yourself"
        )


def _no_export(folder: Path) -> str | None:
    """What shows that `export` did not make the folder, or that more was put there since."""
    names = sorted(file.name for file in folder.iterdir())
    if not names:
        return None
    ours = (*COPIED, CARD, *TOKENIZER)
    for name in names:
        if not any(fnmatchcase(name, pattern) for pattern in ours):
            return f"holds {shown(name)}"
    if not {"adapter_config.json", "config.json"} & set(names):
        return "holds no adapter and no model"
    card = folder / CARD
    if not (card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")):
        return f"has no {CARD} of an export"
    return None


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
        raise StorageError(_unwritten(to, partial, error)) from error
    finally:
        if os.path.lexists(old) and not os.path.lexists(to):
            old.rename(to)
        for rest in (partial, old):
            if rest.is_dir() and not rest.is_symlink():
                shutil.rmtree(rest, ignore_errors=True)
            elif os.path.lexists(rest):
                rest.unlink()


def _unwritten(to: Path, partial: Path, error: OSError) -> str:
    why, mend = str(error), "name another --to"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        mend = f"free some space there, or {mend}"
    elif error.errno == errno.ENOENT and error.filename == str(partial):
        # So /proc says it of a folder that is to be made there.
        why = f"nothing can be made in {to.parent}"
    return f"cannot write {cut(str(to))} ({cut(why)}): {mend}"


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
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise InputError(f"the trial's {file.name} is missing or damaged: name another with --trial") from error
    file.write_text(json.dumps({**raw, **changes}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _add_tokenizer_and_generation(base: _Base, to: Path) -> None:
    """Tokenizer, chat template and generation config; what the base does not have is left out."""
    from transformers.utils import cached_file

    try:
        load_tokenizer(base.source).save_pretrained(to)
        generation = cached_file(base.source, GENERATION, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the tokenizer of {base.model} cannot be read ({error}); write it beside the model with save_pretrained"
        ) from error
    if generation:
        shutil.copyfile(generation, to / GENERATION)


def _config_of(folder: SweepFolder) -> SweepConfig | None:
    """The sweep file; None where this release cannot read it, since the card has most of it from the records."""
    try:
        return load(folder.sweep_file)
    except InputError:
        return None
