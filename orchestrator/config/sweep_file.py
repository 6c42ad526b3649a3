"""A sweep file from disk to SweepConfig and back, with every problem told at once: file, line, key, nearest name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from orchestrator.config.axes import axes_of, axis_of, complete
from orchestrator.config.constraint import parse
from orchestrator.config.known_good import GUIDED, KNOWN_GOOD
from orchestrator.config.names import nearest
from orchestrator.config.search_space import (
    DOMAIN_TAGS,
    SETTING_TYPES,
    SETTINGS,
    Choice,
    IntRange,
    LogIntRange,
    Range,
    in_order_of_need,
    is_excluded,
)
from orchestrator.config.storage_address import name_problem, storage_problem
from orchestrator.config.sweep_config import BETTER_MODES, SchedulerConfig, SweepConfig, is_score
from orchestrator.config.trial_config import CHANGEABLE, TrialConfig
from orchestrator.errors import InputError, Problem, SweepFileError, cut, shown

Path_ = tuple[str | int, ...]
Lines = dict[Path_, int]
MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_VALUES = 50_000
TEXT_TAG = "tag:yaml.org,2002:str"
LONGEST_NUMBER = 400
"""Characters of a value that is no text: YAML 1.1 reads 1:59:59 to the base of 60, which takes minutes for 300,000."""
MOST_PROBLEMS = 100
MOST_EXCLUSIONS = 1000
MOST_COMPARISONS = 10_000_000
"""Of configurations with entries of `exclude`."""
LARGEST_WHOLE_NUMBER = 2**63
MOST_TRIALS = 100_000
LISTS: dict[Path_, str] = {
    ("constraints",): "takes a list, as `constraints: [peak_memory_bytes <= 24GiB]`",
    ("search", "points"): "takes a list, as `points: [known_good, {rank: 16}]`",
}
"""Keys of which the list is best told by an example."""
PBT_EXAMPLE = "pbt: {population: 8, interval_steps: 40}"
MONEYLESS = {
    "scheduler": "grace_seconds",
    "search": "min_gain_per_hour",
    "objective": "step_time_s",
    "constraints": "step_time_s",
}
"""What to use where nothing is paid for, by the part of the file."""


def load(file: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep file; each override is `trial.max_steps=20`.

    Raises:
        InputError: there is no such file, or it is not YAML.
        SweepFileError: it has problems; all of them are in it.
    """
    raw, lines = _read(file)
    for override in overrides:
        _override(raw, lines, override)
    problems = list(_problems_between_keys(raw))
    sweep = None
    try:
        sweep = SweepConfig.model_validate(raw)
    except ValidationError as error:
        told = {problem.path for problem in problems}
        problems += [problem for problem in _problems_of(error, raw) if problem.path not in told]
    if sweep is not None and not problems:
        problems += _problems_of_meaning(sweep)
    if problems or sweep is None:
        raise _refusal(file, list(_with_lines(problems, lines, tuple(overrides))))
    return sweep


def _refusal(file: Path, problems: Sequence[Problem]) -> SweepFileError:
    """All problems at once, as far as anybody reads on."""
    more = [Problem("the rest of the file", "has more problems: mend these first")] * (len(problems) > MOST_PROBLEMS)
    return SweepFileError(str(file), (*problems[:MOST_PROBLEMS], *more))


def text_of(file: Path, overrides: Sequence[str] = ()) -> str:
    """The sweep file as it is written, with the overrides in it and no default filled in.

    Raises:
        InputError: there is no such file, or it is not YAML.
    """
    raw, lines = _read(file)
    for override in overrides:
        _override(raw, lines, override)
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=100)


def to_yaml(sweep: SweepConfig) -> str:
    """The sweep with every default filled in; `load` reads it back."""
    whole = sweep.model_dump(mode="json", exclude_none=True)
    whole["trial"] = {name: value for name, value in whole["trial"].items() if name not in sweep.domains}
    if not whole["space"]:
        del whole["space"]
    return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=100)


def shown_as_yaml(value: Any) -> str:
    """A part of a sweep as a message repeats it: in one line, as the file would have it."""
    told = yaml.safe_dump(
        to_jsonable_python(value), default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    # YAML ends a value that stands alone with a line of its own.
    return cut(told.removesuffix("...\n").strip())


def _not_yaml(file: Path, error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark and error.problem:
        while_ = f" {error.context}" if error.context else ""
        return f"{file}:{error.problem_mark.line + 1} is not YAML:{while_} {error.problem}"
    return f"{file} is not YAML: {' '.join(str(error).split())}"


def _read(file: Path) -> tuple[dict[str, Any], Lines]:
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_BYTES + 1)
    except OSError as error:
        near = nearest(file.name, [entry.name for entry in file.parent.glob("*.y*ml")])
        raise InputError(f"{cut(str(file))} cannot be read ({error.strerror}): name a sweep file{near}") from error
    if len(text) > MAX_BYTES:
        raise InputError(f"{file} is no sweep file: it has more than {MAX_BYTES:,} bytes")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise InputError(f"{_not_yaml(file, error)}; mend it there") from error
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{file} holds no keys: begin with `name:`, `model:` and `data:`")
    lines: Lines = {}
    problems: list[Problem] = []
    raw = _construct(node, (), lines, problems)
    if problems:
        raise _refusal(file, problems)
    return raw, lines


def _construct(node: yaml.Node, path: Path_, lines: Lines, problems: list[Problem]) -> Any:
    """Plain values of a node, the line of every key, and keys that stand twice (which YAML readers pass over)."""
    lines.setdefault(path, node.start_mark.line + 1)
    if len(lines) > MAX_VALUES:
        # Aliases of aliases: a few lines that stand for billions of values.
        raise InputError(f"the sweep file stands for more than {MAX_VALUES:,} values: write it without aliases")
    if len(path) > MAX_DEPTH:
        problems.append(Problem(_spell(path[:4]) + "…", f"is nested deeper than {MAX_DEPTH} levels", lines[path]))
        return None
    if isinstance(node, yaml.MappingNode):
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            if key in found:
                problems.append(Problem(_spell((*path, key)), "stands twice: keep one", key_node.start_mark.line + 1))
            lines[(*path, key)] = key_node.start_mark.line + 1
            found[key] = _construct(value_node, (*path, key), lines, problems)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, i), lines, problems) for i, item in enumerate(node.value)]
    return _scalar(node, path, problems)


def _scalar(node: yaml.Node, path: Path_, problems: list[Problem]) -> Any:
    loader = yaml.SafeLoader("")
    try:
        if node.tag != TEXT_TAG and len(node.value) > LONGEST_NUMBER:
            raise ValueError(f"more than {LONGEST_NUMBER} characters, and no text")
        return _plain_value(loader.construct_object(node, deep=True))
    except (LookupError, AttributeError):
        # PyYAML's readers look no closer at a text that a tag calls a number, a date or a truth (`!!bool maybe`).
        told = f"cannot be read as {node.tag.rpartition(':')[2]}: leave the tag out, or correct the value"
        problems.append(Problem(_spell(path), told, node.start_mark.line + 1))
        return None
    except (yaml.YAMLError, ValueError) as error:
        problems.append(Problem(_spell(path), f"cannot be read ({cut(str(error))})", node.start_mark.line + 1))
        return None
    finally:
        loader.dispose()


def _plain_value(value: Any) -> Any:
    """The value, or ValueError where it is a text that no file can hold (half a character, a zero byte), or endless."""
    if isinstance(value, str) and ("\0" in value or value.encode(errors="replace").decode() != value):
        raise ValueError("a character that no file can hold")
    if isinstance(value, int) and abs(value) >= LARGEST_WHOLE_NUMBER:
        raise ValueError("a whole number of more than 63 bits")
    return value


def _override(raw: dict[str, Any], lines: Lines, override: str) -> None:
    path, sign, text = override.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        raise InputError(f"--set {cut(override)}: write it as trial.max_steps=20")
    value = _value_of(override, text)
    # A setting stands in one of the two: naming it in one takes it out of the other.
    other = {"trial": "space", "space": "trial"}.get(keys[0])
    if other and len(keys) > 1 and isinstance(raw.get(other), dict) and keys[1] in raw[other]:
        del raw[other][keys[1]]
        if not raw[other]:
            del raw[other]
    for overridden in [path for path in lines if path[: len(keys)] == tuple(keys)]:
        # The value no longer comes from the file.
        del lines[overridden]
    at: Any = raw
    for key in keys[:-1]:
        if not isinstance(at.get(key), dict):
            at[key] = {}
        at = at[key]
    at[keys[-1]] = value


def _value_of(override: str, text: str) -> Any:
    problems: list[Problem] = []
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        # By the way of the file, and so within its limits.
        value = None if node is None else _construct(node, (), {}, problems)
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise InputError(f"--set {cut(override)}: {shown(text)} is not a YAML value") from error
    if problems:
        raise InputError(f"--set {cut(override)}: {problems[0].message}; it is not a YAML value that can be used")
    return value


def _problems_between_keys(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """What no single key can know, found before the types are known to be right."""
    trial, space = raw.get("trial"), raw.get("space")
    if isinstance(trial, Mapping) and isinstance(space, Mapping):
        for name in sorted({str(key) for key in trial} & {str(key) for key in space}):
            yield Problem(f"space.{name}", "stands in `trial` too: a setting is shared or searched, not both")
    if "space" in raw and not space:
        yield Problem("space", "is empty: search at least one setting, or leave the key out to run `trial:` alone")


def told_of_settings(error: ValidationError, settings: Any) -> str:
    """What is wrong with settings that stand alone, in the words of a sweep file's `trial`."""
    problems = _problems_of(error, {"trial": settings}, within=("trial",))
    return "; ".join(f"{problem.path} {problem.message}" for problem in problems)


def _problems_of(error: ValidationError, raw: Any, within: Path_ = ()) -> Iterator[Problem]:
    """pydantic's errors in our words: one problem a key, whatever number of union members it failed."""
    said: dict[Path_, list[str]] = {}
    for detail in error.errors(include_url=False)[: MOST_PROBLEMS + 1]:
        path = _real_path((*within, *detail["loc"]), raw)
        said.setdefault(path, []).append(_sentence(detail, path))
    for path, found in said.items():
        sentences = found if (whole := _rule_told_whole(path)) is None else [whole]
        # An element that is wrong leaves its list too short in pydantic's eyes: the element's own problem is enough.
        if any(len(other) > len(path) and other[: len(path)] == path for other in said):
            continue
        yield Problem(_spell(path), _either(sentences))


def _either(sentences: Iterable[str]) -> str:
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


def _sentence(detail: Any, path: Path_) -> str:
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


def _problems_of_meaning(sweep: SweepConfig) -> Iterator[Problem]:
    """What is well formed and yet cannot be meant."""
    if problem := name_problem(sweep.name):
        yield Problem("name", problem)
    if problem := storage_problem(sweep.storage):
        yield Problem("storage", problem)
    yield from _problems_of_objectives(sweep)
    if len(sweep.exclude) > MOST_EXCLUSIONS:
        yield Problem("exclude", f"has {len(sweep.exclude):,} entries, of which {MOST_EXCLUSIONS:,} at most are taken")
        return
    problems = [*_problems_of_space(sweep), *_problems_of_size(sweep), *_problems_of_search(sweep)]
    yield from problems
    if problems:
        # What is wrong cannot be drawn from.
        return
    try:
        in_order_of_need(sweep.domains)
    except ValueError as error:
        yield Problem("space", str(error))
        return
    yield from _problems_of_points(sweep)
    ranges = [domain for domain in sweep.domains.values() if not isinstance(domain, Choice)]
    if sweep.search.algorithm == "grid" and ranges:
        return
    pbt, there = sweep.scheduler.pbt, len(sweep.trials())
    if not there:
        yield Problem("exclude", "leaves no configuration: take an entry away or search more values")
    elif pbt and there < pbt.population:
        told = f"is more than the {there} configurations that there are: search more values, or lower it"
        yield Problem("scheduler.pbt.population", told)


def _problems_of_objectives(sweep: SweepConfig) -> Iterator[Problem]:
    """Objectives that nobody would measure, or want; a group of tasks scores its tasks too (mmlu: mmlu_anatomy)."""
    for i, objective in enumerate(sweep.objectives):
        path = f"objective[{i}]" if isinstance(sweep.objective, tuple) else "objective"
        if not is_score(objective.metric):
            if objective.mode != (better := BETTER_MODES.get(objective.metric, objective.mode)):
                told = f"would look for the worst {objective.metric}: write {better}, or leave it out"
                yield Problem(f"{path}.mode", told)
            continue
        if "mode" not in objective.model_fields_set:
            yield Problem(f"{path}.mode", f"is missing: max or min, whichever is better of {cut(objective.metric)}")
        task = objective.metric.partition("/")[0]
        if not task.startswith(sweep.evaluate.tasks):
            near = nearest(task, sweep.evaluate.tasks)
            yield Problem(f"{path}.metric", f"is a score of {cut(task)}, which evaluate.tasks does not name{near}")


def _problems_of_space(sweep: SweepConfig) -> Iterator[Problem]:
    for i, partial in enumerate(sweep.exclude):
        yield from _problems_of_condition(partial, f"exclude[{i}]")
        if sweep.precision_follows_hardware and "precision" in partial:
            yield Problem(f"exclude[{i}].precision", "follows the hardware: name it in `trial` or search it in `space`")
    for name, domain in sweep.domains.items():
        yield from _problems_of_condition(domain.when, f"space.{name}.when")
        if not isinstance(domain, Choice):
            yield from _problems_of_range(name, domain, sweep.search.algorithm)


def _problems_of_size(sweep: SweepConfig) -> Iterator[Problem]:
    """More trials than anybody can wait for, told before they are counted one by one."""
    combinations = math.prod(len(d.choice) for d in sweep.domains.values() if isinstance(d, Choice))
    if sweep.search.algorithm == "grid":
        if combinations > MOST_TRIALS:
            yield Problem("space", f"has {combinations:,} combinations, of which a grid walks {MOST_TRIALS:,} at most")
            return
        wanted = min(combinations, sweep.budget.trials or combinations)
    else:
        wanted = sweep.budget.trials or 1
    if max(wanted, combinations) * len(sweep.exclude) > MOST_COMPARISONS:
        yield Problem(
            "exclude", f"has {len(sweep.exclude):,} entries, too many for {max(wanted, combinations):,} trials"
        )
    if wanted * sweep.search.repeats > MOST_TRIALS:
        told = f"{wanted:,} configurations with {sweep.search.repeats:,} repeats are more than {MOST_TRIALS:,} trials"
        yield Problem("search.repeats" if sweep.search.repeats > 1 else "budget.trials", f"is too high: {told}")


def _problems_of_search(sweep: SweepConfig) -> Iterator[Problem]:
    search = sweep.search
    yield from _problems_of_pbt(sweep)
    yield from _problems_of_cost(sweep)
    yield from _problems_of_constraints(sweep)
    if search.is_adaptive and search.algorithm != "pbt" and sweep.budget.trials is None:
        yield Problem("search.algorithm", f"{search.algorithm} goes on until budget.trials: write how many to try")
    if search.is_adaptive and not sweep.domains:
        yield Problem("search.algorithm", f"{search.algorithm} has nothing to search: write `space:`, or leave it out")
    yield from _problems_of_lengths(sweep)
    if search.points and search.algorithm == "grid":
        yield Problem("search.points", "a grid tries every point anyway: leave it out, or name another algorithm")
    for i, point in enumerate(search.points):
        if isinstance(point, str):
            if not set(GUIDED) & set(sweep.domains):
                told = f"{KNOWN_GOOD} knows {' and '.join(GUIDED)}: search one of them, or name the point's settings"
                yield Problem(f"search.points[{i}]", told)
            continue
        for name, value in point.items():
            if name not in sweep.domains:
                yield Problem(f"search.points[{i}].{cut(name)}", f"is not searched{nearest(name, sweep.domains)}")
                continue
            try:
                axis_of(name, sweep.domains[name]).read(value)
            except ValueError as error:
                yield Problem(f"search.points[{i}].{name}", str(error))
    if search.warm_start and not search.is_adaptive:
        yield Problem("search.warm_start", f"teaches {search.algorithm} nothing: leave it out, or use tpe or gp")
    metrics = [objective.metric for objective in sweep.objectives]
    if twice := [metric for metric in metrics if metrics.count(metric) > 1]:
        yield Problem("objective", f"names {cut(twice[0])} twice: name each metric once")
    if metrics[0] == "cost":
        yield Problem("objective", "begins with cost, which is what a trial took: name it behind another objective")
    if search.algorithm == "cma_es" and len(sweep.objectives) > 1:
        yield Problem("search.algorithm", "cma_es knows one objective: use tpe or gp, or name one")
    if search.algorithm == "cma_es":
        for name, domain in sweep.domains.items():
            if not axis_of(name, domain).is_ordered:
                yield Problem(f"space.{name}", "has no order, which cma_es needs: use tpe or gp, or share the setting")


def _problems_of_points(sweep: SweepConfig) -> Iterator[Problem]:
    """Points that could not be tried as they are written: of a setting where it is not searched, or excluded."""
    axes = axes_of(sweep.domains)
    if sweep.precision_follows_hardware and any("precision" in axis.when for axis in axes):
        # What is searched where is known on the hardware alone.
        return
    for i, point in enumerate(sweep.search.points):
        if isinstance(point, str):
            continue
        settings = complete(axes, sweep.base, point)
        for name in sorted(set(point) - set(settings)):
            told = (
                f"is searched only where its `when` holds ({cut(str(sweep.domains[name].when))}), and not in this point"
            )
            yield Problem(f"search.points[{i}].{name}", f"{told}: leave it out, or change what the point has there")
        config = TrialConfig(**{**sweep.base, **settings})
        for j, partial in enumerate(sweep.exclude):
            if is_excluded(config, [partial]):
                told = f"is excluded by exclude[{j}], with what it leaves open in the middle of its range: change it"
                yield Problem(f"search.points[{i}]", f"{told}, name more of its settings, or take the exclusion away")
                break


def _problems_of_lengths(sweep: SweepConfig) -> Iterator[Problem]:
    """How long trials train, and when they are looked at: adaptive searches compare them at a step that they share."""
    algorithm = sweep.search.algorithm
    if algorithm not in ("tpe", "gp", "cma_es"):
        return
    for name in ("max_steps", "eval_every"):
        if name in sweep.domains:
            told = f"{algorithm} compares trials at a step that all reach: put it under `trial:`, or use grid or random"
            yield Problem(f"space.{name}", told)


def _problems_of_cost(sweep: SweepConfig) -> Iterator[Problem]:
    counts = {f"scheduler.{name}.grace_cost": getattr(part, "grace_cost", None) for name, part in sweep.scheduler}
    counts["search.min_gain_per_cost"] = sweep.search.min_gain_per_cost
    counts["objective"] = any(one.metric == "cost" for one in sweep.objectives)
    counts |= {f"constraints[{i}]": parse(text).metric == "cost" for i, text in enumerate(sweep.constraints)}
    for path, value in counts.items():
        if value and not sweep.budget.price_per_gpu_hour:
            instead = MONEYLESS[path.partition(".")[0].partition("[")[0]]
            price = "budget.price_per_gpu_hour"
            mend = f"name {price}" if sweep.budget.price_per_gpu_hour is None else f"raise {price} above 0"
            yield Problem(path, f"counts money: {mend}, or use {instead}")
    for name in ("min_gain_per_hour", "min_gain_per_cost"):
        if getattr(sweep.search, name) and sweep.search.algorithm in ("grid", "random", "pbt"):
            told = f"ends searches that choose one by one, and {sweep.search.algorithm} does not: use tpe, gp or cma_es"
            yield Problem(f"search.{name}", told)
        elif getattr(sweep.search, name) and len(sweep.training_objectives) > 1:
            told = "judges the first objective alone, and the front of all may still grow: leave it out, or name one"
            yield Problem(f"search.{name}", told)


def _problems_of_constraints(sweep: SweepConfig) -> Iterator[Problem]:
    """Bounds of one metric between which nothing lies."""
    bounds = [(i, parse(text)) for i, text in enumerate(sweep.constraints)]
    for i, lower in bounds:
        above = [upper for _, upper in bounds if upper.is_upper and upper.metric == lower.metric]
        if not lower.is_upper and any(upper.bound < lower.bound for upper in above):
            told = f"leaves no {lower.metric} between it and the bound from above: loosen one of them"
            yield Problem(f"constraints[{i}]", told)


def _problems_of_pbt(sweep: SweepConfig) -> Iterator[Problem]:
    pbt, algorithm = sweep.scheduler.pbt, sweep.search.algorithm
    if pbt is None:
        if algorithm == "pbt":
            yield Problem("search.algorithm", f"pbt needs its population: write scheduler: {{{PBT_EXAMPLE}}} alone")
        return
    if algorithm != "pbt":
        yield Problem("search.algorithm", f"{algorithm} and scheduler.pbt exclude each other: leave one of them out")
        return
    if not set(CHANGEABLE) & set(sweep.domains):
        yield Problem(
            "space", f"has nothing that pbt may change while it trains: search one of {', '.join(CHANGEABLE)}"
        )
    for name in ("max_steps", "eval_every"):
        if name in sweep.domains:
            yield Problem(f"space.{name}", "is shared by all members of a population: put it under `trial:`")
    for name, domain in sweep.domains.items():
        if name not in CHANGEABLE and (changed := sorted(set(domain.when) & set(CHANGEABLE))):
            told = f"depends on {changed[0]}, which pbt changes while a trial trains: take that condition away"
            yield Problem(f"space.{name}.when", told)
    if pbt.interval_steps % sweep.trial.eval_every:
        told = f"is no multiple of trial.eval_every ({sweep.trial.eval_every}), and members are compared by evaluations"
        yield Problem("scheduler.pbt.interval_steps", f"{told}: change one of them")
    if pbt.interval_steps >= sweep.trial.max_steps:
        told = f"leaves one generation of trial.max_steps ({sweep.trial.max_steps}): lower it, or leave pbt out"
        yield Problem("scheduler.pbt.interval_steps", told)
    if sweep.search.repeats > 1:
        yield Problem("search.repeats", "a member is one trial: leave it out, and run again with another search.seed")
    if sweep.budget.trials is not None:
        yield Problem("budget.trials", "pbt trains as many as scheduler.pbt.population: leave it out")
    if len(sweep.objectives) > 1:
        yield Problem("objective", "pbt compares members by one objective: name one, or use tpe or gp")


def _problems_of_condition(condition: Mapping[str, Any], path: str) -> Iterator[Problem]:
    for name, allowed in condition.items():
        if name not in SETTING_TYPES:
            yield Problem(f"{path}.{cut(name)}", f"is no setting{nearest(name, SETTING_TYPES)}")
            continue
        for value in allowed if isinstance(allowed, list) and name != "target_modules" else [allowed]:
            try:
                SETTINGS[name].validate_python(value)
            except ValidationError as error:
                told = _either(_sentence(detail, ()) for detail in error.errors(include_url=False))
                yield Problem(f"{path}.{cut(name)}", f"can never hold: {told}")


def _problems_of_range(name: str, domain: Range, algorithm: str) -> Iterator[Problem]:
    kind = next(key for key in type(domain).model_fields if key != "when")
    low, high = getattr(domain, kind)
    numbers = {hint for hint in (int, float) if _admits(SETTING_TYPES[name], hint)}
    if algorithm == "grid":
        yield Problem(
            f"space.{name}", "is a range, which a grid cannot walk: list its values, or search.algorithm: random"
        )
    if not low < high:
        yield Problem(f"space.{name}.{kind}", f"begins at {low}, not below its end {high}")
    if not numbers:
        yield Problem(f"space.{name}", "is no number: list its values")
    elif float not in numbers and not isinstance(domain, IntRange | LogIntRange):
        yield Problem(f"space.{name}.{kind}", "is a whole number: use int or log_int")
    for bound in (low, high):
        try:
            SETTINGS[name].validate_python(bound)
        except ValidationError as error:
            yield Problem(f"space.{name}.{kind}", _sentence(error.errors(include_url=False)[0], ()))


def _admits(hint: Any, number: type) -> bool:
    return hint is number or any(_admits(part, number) for part in getattr(hint, "__args__", ()))


def _with_lines(problems: Iterable[Problem], lines: Lines, overrides: Sequence[str]) -> Iterator[Problem]:
    by_spelling = {_spell(path): line for path, line in lines.items()}
    for problem in problems:
        path = problem.path
        if override := _override_of(path, overrides):
            yield Problem(path, f"{problem.message} (from --set {cut(override)})")
            continue
        # A key that is missing has no line: its parent's is the place to write it.
        while path and path not in by_spelling:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        yield Problem(problem.path, problem.message, by_spelling.get(path))


def _override_of(path: str, overrides: Sequence[str]) -> str | None:
    """The override that wrote this key, or what it stands in."""
    for override in reversed(overrides):
        key = override.partition("=")[0].strip()
        if path == key or path.startswith((f"{key}.", f"{key}[")):
            return override
    return None


def _spell(path: Path_) -> str:
    text = ""
    for item in path:
        text += f"[{item}]" if isinstance(item, int) else f".{cut(item)}" if text else cut(item)
    return text
