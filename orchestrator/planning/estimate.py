"""The `estimate` command: JSON lines in, JSON lines out; a line that cannot be read answers for itself alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

from pydantic import ValidationError

from orchestrator.config.names import nearest
from orchestrator.config.trial_config import TrialConfig
from orchestrator.config.type_problems import told_of_settings
from orchestrator.errors import InputError, ModelError, OrchestratorError, cut, shown
from orchestrator.planning.activations import LOOPS, Loop
from orchestrator.planning.causal_models import without_causal_head
from orchestrator.planning.cheaper import what_fits
from orchestrator.planning.compatibility import Case, refusals
from orchestrator.planning.hardware import LARGEST_MEMORY, Hardware
from orchestrator.planning.memory import estimate_on, loading_bytes_on
from orchestrator.planning.model_shape import ModelShape, shape_of
from orchestrator.planning.notes import counted_as_a_llama
from orchestrator.planning.planned_trial import with_micro_batch

ConfigOf = Callable[[str], Mapping[str, Any]]
MAX_WORKERS = 100_000
LEAST_GPU_BYTES = 2**20
"""Below that it was meant as GiB or MiB."""
KEYS = ("id", "model", "trial", "workers", "gpu_memory_bytes", "loop")
"""What a line has; only `model` is needed."""


def estimate_lines(lines: Iterable[str | bytes], config_of: ConfigOf) -> Iterator[str]:
    """One answer a line (UTF-8); `config_of` gives the transformers config of a hub id or folder."""
    shapes: dict[str, ModelShape | ModelError] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield json.dumps(_answer(number, line, config_of, shapes))


def _answer(
    number: int, line: str | bytes, config_of: ConfigOf, shapes: dict[str, ModelShape | ModelError]
) -> dict[str, Any]:
    identity = None
    try:
        raw = _read(line)
        # An `id` that cannot be written back (it is nested too deep) is none.
        identity = json.dumps(raw.get("id")) and raw.get("id")
        return {"id": identity, **_estimated(raw, config_of, shapes)}
    except OrchestratorError as error:
        told = str(error)
    except (OSError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        told = cut(str(error)) or type(error).__name__
    return {"id": identity, "error": f"line {number}: {told}"}


def _read(line: str | bytes) -> dict[str, Any]:
    text = line if isinstance(line, str) else line.decode("utf-8-sig")
    try:
        raw = json.loads(text, parse_constant=_no_json, parse_float=_finite, object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        raise InputError(f"no JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(raw, dict):
        raise InputError('takes an object, as {"id": 1, "model": "…", "trial": {"rank": 8}}')
    return raw


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise InputError(f"{cut(twice)} is given twice")
    return read


def _no_json(constant: str) -> Any:
    raise InputError(f"{constant} is no JSON: give a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise InputError(f"{cut(text)} is larger than a number can be")
    return number


def _estimated(
    raw: Mapping[str, Any], config_of: ConfigOf, shapes: dict[str, ModelShape | ModelError]
) -> dict[str, Any]:
    unknown = set(raw) - set(KEYS)
    if unknown:
        name = sorted(unknown)[0]
        raise InputError(f"{cut(name)} is no key here{nearest(name, KEYS)}; known: {', '.join(KEYS)}")
    workers = _whole(raw, "workers", 1, 1, MAX_WORKERS)
    memory_bytes = _whole(raw, "gpu_memory_bytes", None, LEAST_GPU_BYTES, 2**50)
    shape = _shape(raw.get("model"), config_of, shapes)
    assert workers is not None
    settings = raw.get("trial")
    config = _trial({} if settings is None else settings)
    hardware = _gpu(memory_bytes)
    loop = _loop(raw.get("loop"))
    case = Case(config, shape, hardware, workers, loop)
    reasons = list(refusals(case))
    config = with_micro_batch(config, shape, hardware, workers, memory_bytes or LARGEST_MEMORY, loop=loop)
    memory = estimate_on(config, shape, workers, hardware, loop)
    needed_bytes = max(memory.needed_bytes, loading_bytes_on(config, shape, workers, hardware))
    if memory_bytes is not None:
        memory = memory.within(memory_bytes)
        if needed_bytes > memory_bytes:
            told = f"needs {needed_bytes:,} bytes of {memory_bytes:,}"
            if needed_bytes > memory.needed_bytes:
                told += " while it loads, since under ZeRO-3 each worker loads the whole quantised model"
            if not reasons:
                # What another rule refuses would be refused with every change.
                fits = what_fits(replace(case, config=config), memory_bytes, workers)
                told += f"; fits with {fits}" if fits else "; use a smaller model"
            reasons.append(told)
    return {
        "allocated_bytes": memory.allocated_bytes,
        "reserved_bytes": memory.reserved_bytes,
        "device_bytes": memory.device_bytes,
        "needed_bytes": needed_bytes,
        "low_bytes": memory.low_bytes,
        "high_bytes": memory.high_bytes,
        "parts": memory.parts.by_name(),
        "micro_batch_size": config.micro_batch_size,
        "feasible": not reasons,
        "reasons": reasons,
        # Beside what every answer has.
        **({"notes": [note]} if (note := counted_as_a_llama(case)) else {}),
    }


def _loop(named: Any) -> Loop:
    if named is None:
        return "any"
    if named not in get_args(Loop):
        raise InputError(f"loop is {shown(named)}: give {', '.join(LOOPS)} or any, which it is where it is left out")
    return named  # type: ignore[no-any-return]


def _trial(settings: Any) -> TrialConfig:
    try:
        return TrialConfig.model_validate(settings)
    except ValidationError as error:
        raise InputError(told_of_settings(error, settings)) from error


def _whole(raw: Mapping[str, Any], name: str, default: int | None, least: int, most: int) -> int | None:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{name} is {shown(value)}: give a whole number from {least:,} to {most:,}")
    return value


def _shape(model: Any, config_of: ConfigOf, shapes: dict[str, ModelShape | ModelError]) -> ModelShape:
    if not isinstance(model, str | dict) or not model:
        raise InputError("model is missing: give a hub id, a folder, or a transformers config as an object")
    key = model if isinstance(model, str) else json.dumps(model, sort_keys=True)
    if key not in shapes:
        try:
            shapes[key] = shape_of(config_of(model) if isinstance(model, str) else _causal(model))
        except ModelError as error:
            # A hub that is out of reach takes seconds to be told from one that has no such model: once is enough.
            shapes[key] = error
    found = shapes[key]
    if isinstance(found, ModelError):
        raise found
    return found


def _causal(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model that is found by its name was asked for its head where it was found. One that does not say what it is was
    made up, and is counted as a Llama."""
    if "model_type" in config and isinstance(config["model_type"], str) and (reason := without_causal_head(config)):
        raise ModelError(f"model: {reason}")
    return config


def _gpu(memory_bytes: int | None) -> Hardware:
    """A GPU that can all: an estimate is refused for its memory, or for what no GPU can."""
    return Hardware(
        "cuda", 1, 1, 1, LARGEST_MEMORY, True, True, gpu_memory_bytes=memory_bytes, compute_capability=(9, 0)
    )
