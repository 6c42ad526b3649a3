"""What is well formed in a sweep file and yet cannot be meant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from orchestrator.config.axes import axes_of, axis_of, complete
from orchestrator.config.constraint import parse
from orchestrator.config.known_good import GUIDED, KNOWN_GOOD
from orchestrator.config.names import nearest
from orchestrator.config.search_space import (
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
from orchestrator.config.sweep_config import BETTER_MODES, SweepConfig, is_score
from orchestrator.config.trial_config import CHANGEABLE, TrialConfig
from orchestrator.config.type_problems import PBT_EXAMPLE, either_of, in_our_words
from orchestrator.errors import Problem, cut

MOST_EXCLUSIONS = 1000
MOST_COMPARISONS = 10_000_000
"""Of configurations with entries of `exclude`."""
MOST_TRIALS = 100_000
MONEYLESS = {
    "scheduler": "grace_seconds",
    "search": "min_gain_per_hour",
    "objective": "step_time_s",
    "constraints": "step_time_s",
}
"""What to use where nothing is paid for, by the part of the file."""


def problems_of_meaning(sweep: SweepConfig) -> Iterator[Problem]:
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
                told = either_of(in_our_words(detail, ()) for detail in error.errors(include_url=False))
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
            yield Problem(f"space.{name}.{kind}", in_our_words(error.errors(include_url=False)[0], ()))


def _admits(hint: Any, number: type) -> bool:
    return hint is number or any(_admits(part, number) for part in getattr(hint, "__args__", ()))
