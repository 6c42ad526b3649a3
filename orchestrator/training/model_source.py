"""Where a base model comes from: built in, a local folder, or the hub; and its local folder, made once a machine."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.local_path import local_path
from orchestrator.errors import ModelError, cut, first_line
from orchestrator.planning.causal_models import without_causal_head
from orchestrator.results.remote import cache_folder
from orchestrator.training import builtin_models

# Weights are read as safetensors only: a pickle runs whatever code its author put in it.
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_OFFLINE_MEND = "connect to the hub (unset HF_HUB_OFFLINE), name a local folder, or use builtin:smollm2-135m"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that was found, and its transformers config; nothing large was read or fetched yet."""

    name: str
    config: dict[str, Any]
    folder: Path | None
    """A local folder, or None where `materialize` makes one."""


def resolve(model: str) -> ModelSource:
    """Find a model by its name in the sweep file.

    Raises:
        ModelError: there is no such model, it cannot be reached, or it has no causal language-model head.
    """
    _require_endpoint()
    if model.startswith("builtin:"):
        return ModelSource(model, _builtin_config(model.removeprefix("builtin:")), None)
    path = local_path(model)
    folder = path.resolve() if path.is_dir() else None
    config = _read_config(folder / "config.json") if folder else _hub_config(model)
    if reason := without_causal_head(config):
        raise ModelError(f"model {model}: {reason}")
    return ModelSource(model, config, folder)


def materialize(source: ModelSource) -> Path:
    """A local folder that `from_pretrained` reads, tokenizer and all; fetched or built where that was not done yet.

    Raises:
        ModelError: the weights or what they are made from cannot be had.
    """
    if source.name.startswith("builtin:"):
        return builtin_models.build(source.name.removeprefix("builtin:"), cache_folder())
    folder = source.folder or _fetch(source.name)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model {source.name}: {folder} holds no *.safetensors; "
            "save the model once with save_pretrained(..., safe_serialization=True)"
        )
    return folder


def is_hub_id(model: str) -> bool:
    """Whether the hub could have a model of this name."""
    return bool(_HUB_ID.match(model))


def _builtin_config(name: str) -> dict[str, Any]:
    if name in builtin_models.CONFIGS:
        return dict(builtin_models.CONFIGS[name])
    known = [f"builtin:{known}" for known in builtin_models.CONFIGS]
    nearest = difflib.get_close_matches(f"builtin:{name}", known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
    raise ModelError(f"model builtin:{cut(name)} does not exist; {hint}")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file.parent} holds no config.json: name a folder written by save_pretrained") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read ({error}): write it again with save_pretrained") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds no JSON object: write it again with save_pretrained")
    return config


def _hub_config(model: str) -> dict[str, Any]:
    if not is_hub_id(model):
        raise ModelError(
            f"model {cut(model)}: there is no such folder, and it is no hub id (owner/name); check the path"
        )
    from huggingface_hub import hf_hub_download

    offline = _is_offline()

    # Its retries are told line by line, twice; ours is the one message.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    try:
        file = hf_hub_download(model, "config.json", local_files_only=offline)
    except Exception as error:
        # Its own kinds, and those of the HTTP library that it uses, which has changed (huggingface_hub 2.4: httpx2).
        why = "the hub is out of reach and its cache here has none" if offline else _hub_problem(error)
        raise ModelError(f"model {cut(model)} is no local folder, and {why}; {_OFFLINE_MEND}") from error
    return _read_config(Path(file))


def _require_endpoint() -> None:
    """With one that is no address, neither huggingface_hub nor transformers can be imported, whatever the model."""
    try:
        # As the lookup of its host does.
        (urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname or "").encode("idna")
    except ValueError as error:
        raise ModelError(
            f"HF_ENDPOINT is no address ({first_line(error)}): set it to one like https://huggingface.co, or unset it"
        ) from error


def _is_offline() -> bool:
    """Whether the hub's name means nothing here: its client would try for 24 s before it says so."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def _hub_problem(error: Exception) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        return f"the hub does not answer ({cut(first_line(error.__cause__))})"
    return f"the hub has none to give ({cut(first_line(error))})"


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:
        raise ModelError(f"model {name} cannot be fetched: {_hub_problem(error)}; {_OFFLINE_MEND}") from error
