"""Of a sweep file's keys and types: what is wrong, one problem a key, in our words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.config.names import nearest
from orchestrator.config.search_space import (
    DOMAIN_TAGS,
    SETTING_TYPES,
)
from orchestrator.config.sweep_config import SchedulerConfig, SweepConfig
from orchestrator.errors import Problem, cut, shown

Path_ = tuple[str | int, ...]
MOST_PROBLEMS = 100
LISTS: dict[Path_, str] = {
    ("constraints",): "takes a list, as `constraints: [peak_memory_bytes <= 24GiB]`",
    ("search", "points"): "takes a list, as `points: [known_good, {rank: 16}]`",
}
"""Keys of which the list is best told by an example."""
PBT_EXAMPLE = "pbt: {population: 8, interval_steps: 40}"


def problems_between_keys(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """What no single key can know, found before the types are known to be right."""
    trial, space = raw.get("trial"), raw.get("space")
    if isinstance(trial, Mapping) and isinstance(space, Mapping):
        for name in sorted({str(key) for key in trial} & {str(key) for key in space}):
            yield Problem(f"space.{name}", "stands in `trial` too: a setting is shared or searched, not both")
    if "space" in raw and not space:
        yield Problem("space", "is empty: search at least one setting, or leave the key out to run `trial:` alone")


def told_of_settings(error: ValidationError, settings: Any) -> str:
    """What is wrong with settings that stand alone, in the words of a sweep file's `trial`."""
    problems = problems_of(error, {"trial": settings}, within=("trial",))
    return "; ".join(f"{problem.path} {problem.message}" for problem in problems)


def problems_of(error: ValidationError, raw: Any, within: Path_ = ()) -> Iterator[Problem]:
    """pydantic's errors in our words: one problem a key, whatever number of union members it failed."""
    said: dict[Path_, list[str]] = {}
    for detail in error.errors(include_url=False)[: MOST_PROBLEMS + 1]:
        path = _real_path((*within, *detail["loc"]), raw)
        said.setdefault(path, []).append(in_our_words(detail, path))
    for path, found in said.items():
        sentences = found if (whole := _rule_told_whole(path)) is None else [whole]
        # An element that is wrong leaves its list too short in pydantic's eyes: the element's own problem is enough.
        if any(len(other) > len(path) and other[: len(path)] == path for other in said):
            continue
        yield Problem(spell(path), either_of(sentences))


def either_of(sentences: Iterable[str]) -> str:
    """`should be greater than or equal to 1 or 'full', not 0`: what all of them say is said once."""
    told = list(dict.fromkeys(sentences))
    parts = [sentence.removeprefix("should be ").rpartition(", not ") for sentence in told]
    values = {value for _, _, value in parts}
    if len(values) == 1 and all(sentence.startswith("should be ") for sentence in told):
        return f"should be {' or '.join(takes for takes, _, _ in parts)}, not {values.pop()}"
    return " or ".join(told)


def _rule_told_whole(path: Path_) -> str | None:
    """Of keys of which the rule is better told at once than member by member of its union."""
    if path[0] == "exclude":
        return "takes a list of partial configurations, as `exclude: [{precision: nf4, zero_stage: 3}]`"
    of_space = [key for key in path if key != "choice"][:-1] if isinstance(path[-1], int) else []
    if path == ("trial", "alpha") or of_space == ["space", "alpha"]:
        return "takes a number above 0, or a multiple of the rank as 2x"
    if path == ("trial", "target_modules") or of_space == ["space", "target_modules"]:
        example = "[attention, [q_proj, v_proj]]" if of_space else "[q_proj, v_proj]"
        return f"takes attention, all-linear or a list of modules' names, as `target_modules: {example}`"
    return None


def _real_path(loc: Iterable[str | int], raw: Any) -> Path_:
    """The keys of the file in pydantic's location, without the names of its union members."""
    path: list[str | int] = []
    at = raw
    items = list(loc)
    if items[0] == "space" and len(items) > 2 and items[2] in DOMAIN_TAGS:
        # The tag of the domain's kind, which may be spelled as a key of it.
        del items[2]
    for i, item in enumerate(items):
        held = at if isinstance(at, Mapping) else dict(enumerate(at)) if isinstance(at, list) else {}
        if item in held:
            at = held[item]
        elif not (isinstance(at, Mapping) and i == len(items) - 1 and isinstance(item, str) and item.isidentifier()):
            continue
        path.append(item)
    return tuple(path)


def in_our_words(detail: Any, path: Path_) -> str:
    """One of pydantic's errors, of the key at `path`."""
    kind, message, value = detail["type"], str(detail["msg"]), detail["input"]
    if kind == "missing":
        return "takes two bounds, as [1, 4]" if isinstance(detail["loc"][-1], int) else "is missing: write it"
    if kind == "extra_forbidden":
        return _unknown_key(path)
    if value is None:
        return "has no value: write one, or leave the key out where it has a default"
    if kind == "tuple_type":
        if len(path) > 2 and path[-1] in DOMAIN_TAGS:
            return "takes a list of values" if path[-1] == "choice" else "takes two bounds, as [1, 4]"
        if path[0] == "space":
            return "takes a list of values, `{choice: [...]}` or a range"
        return LISTS.get(path, f"takes a list, not {shown(value)}")
    if kind in ("model_type", "dict_type"):
        takes = "a rule with its keys, as `{asha: {grace_steps: 40}}`" if path == ("scheduler",) else "keys with values"
        return f"takes {takes}, not {shown(value)}"
    if kind == "string_pattern_mismatch":
        return f"takes letters, digits, `-`, `_` and `.`, and begins with a letter or digit, not {shown(value)}"
    if kind == "string_too_long":
        return f"has {len(value)} characters, of which {detail['ctx']['max_length']} at most are taken: shorten it"
    if kind == "too_short":
        return "is empty: name at least one value"
    if kind in ("literal_error", "enum") and isinstance(value, str):
        expected = [part.strip(" '") for part in detail["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{_lower(message)}, not {shown(value)}{nearest(value, expected)}"
    # What a check of ours refuses may be the whole part that it looked at.
    is_value = isinstance(value, str | int | float | bool) or message.startswith("Input should")
    seen = f", not {shown(value)}" if is_value and not message.endswith("?") else ""
    return f"{_lower(message.removeprefix('Value error, '))}{seen}"


def _lower(message: str) -> str:
    return message.replace("Input should", "should")


def _unknown_key(path: Path_) -> str:
    name = str(path[-1])
    if len(path) == 1 and name in SETTING_TYPES:
        return "is a setting: it stands under `trial:` or `space:`"
    if name in DOMAIN_TAGS and path[0] == "space" and len(path) == 3:
        return "stands beside another kind of values: keep one of them"
    known = _known_keys(path[:-1])
    return f"is no key here{nearest(name, known)}" + (f"; known: {', '.join(known)}" if len(known) <= 12 else "")


def _known_keys(parent: Path_) -> list[str]:
    if not parent:
        return list(SweepConfig.model_fields)
    if parent[0] in ("trial", "space") and len(parent) == 1:
        return list(SETTING_TYPES)
    if parent[0] == "space":
        return ["choice", "uniform", "log_uniform", "int", "log_int", "when"]
    model: Any = SweepConfig
    for key in parent:
        if isinstance(key, int):
            continue
        model = model.model_fields[key].annotation if issubclass(model, SweepConfig) else _inner_model(model, str(key))
        # Of one or a list of them, the one.
        model = model if isinstance(model, type) else next(iter(getattr(model, "__args__", ())), None)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)


def _inner_model(model: type[BaseModel], key: str) -> Any:
    if model is SchedulerConfig and key in model.model_fields:
        return next(part for part in model.model_fields[key].annotation.__args__)  # type: ignore[union-attr]
    return None


def spell(path: Path_) -> str:
    """`space.rank[0]`."""
    text = ""
    for item in path:
        text += f"[{item}]" if isinstance(item, int) else f".{cut(item)}" if text else cut(item)
    return text
