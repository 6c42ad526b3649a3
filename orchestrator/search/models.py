"""Proposals of Optuna's samplers, which are asked once each: the study is built anew out of what is known."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orchestrator.config.axes import Axis, active
from orchestrator.config.search_space import Settings, as_trial, holds
from orchestrator.search.fidelity import common_step, values_at
from orchestrator.search.observation import Observation, Standing

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

Ask = Callable[[int], Settings]
"""One proposal by its seed; each is made of what was known, and knows of no other."""


def tpe(axes: Sequence[Axis], base: Settings, known: Sequence[Observation]) -> Ask:
    """Tree-structured Parzen estimators; settings with a condition are modelled where it holds.

    What was stopped is told as pruned at its step, what waits or runs as running, what was refused by its violation.
    """
    import optuna

    with _quiet():
        study = _study(known)
        step = common_step(known, len(axes))
        told = _Told(axes)
        for observation in known:
            values = observation.values_at(step)
            if observation.standing is Standing.OPEN:
                trial = told.trial(observation, "RUNNING", observation.settings)
            elif observation.standing is Standing.REFUSED:
                trial = told.trial(observation, "PRUNED", observation.settings)
            elif values is not None:
                trial = told.trial(observation, "COMPLETE", observation.settings, values)
            elif observation.standing is Standing.PARTIAL and len(observation.curves) == 1:
                trial = told.trial(observation, "PRUNED", observation.settings, curve=observation.curves[0])
            else:
                continue
            study.add_trial(trial)

    def ask(seed: int) -> Settings:
        with _quiet():
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, group=True)
        with _asked(study, sampler) as asked:
            settings: Settings = {}
            for axis in axes:
                if holds(axis.when, as_trial({**base, **settings})):
                    settings[axis.name] = _value(axis, _suggested(asked, axis))
            return settings

    return ask


def gp(axes: Sequence[Axis], base: Settings, known: Sequence[Observation]) -> Ask:
    """A Gaussian process over the whole space, with expected improvement; every axis has a value.

    It models constraints, and objectives at one step, to which what was stopped is carried on. What was refused has no
    objective: it is told the mean of all, which moves the objective's model nowhere and leaves the verdict to the
    constraints' models.
    """
    import optuna

    whole = {axis.name: axis.at(0.5) for axis in axes}
    with _quiet():
        study = _study(known)
        step = common_step(known, len(axes))
        carried = [values_at(known, observation, step) for observation in known]
        found = [values for values in carried if values is not None]
        means = [sum(column) / len(found) for column in zip(*found, strict=True)]
        constrained = any(observation.violation for observation in known)
        told = _Told(axes)
        for observation, values in zip(known, carried, strict=True):
            settings = whole | observation.settings
            if observation.standing is Standing.OPEN:
                study.add_trial(told.trial(observation, "RUNNING", settings))
            elif observation.standing is Standing.REFUSED:
                study.add_trial(told.trial(observation, "COMPLETE", settings, means))
            elif values is not None:
                study.add_trial(told.trial(observation, "COMPLETE", settings, values, constrained=constrained))

    def ask(seed: int) -> Settings:
        with _quiet():
            # Its own first proposals would be random: ours come before.
            sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=1)
        with _asked(study, sampler, told.distributions) as asked:
            return active(axes, base, {axis.name: _value(axis, asked.params[axis.name]) for axis in axes})

    return ask


def _study(known: Sequence[Observation]) -> Study:
    import optuna

    objectives = max(len(observation.curves) for observation in known)
    return optuna.create_study(directions=["minimize"] * objectives)


@contextmanager
def _asked(
    study: Study, sampler: BaseSampler, distributions: Mapping[str, BaseDistribution] | None = None
) -> Iterator[Trial]:
    """One proposal of the sampler's; to the study it never was, so that the next one is made of the same."""
    from optuna.trial import TrialState

    with _quiet():
        study.sampler = sampler
        trial = study.ask(distributions)
        yield trial
        study.tell(trial, state=TrialState.FAIL)


class _Told:
    """What Optuna is told of observations."""

    def __init__(self, axes: Sequence[Axis]) -> None:
        self._axes = axes
        self.distributions = {axis.name: _distribution(axis) for axis in axes}

    def trial(
        self,
        observation: Observation,
        state: str,
        settings: Mapping[str, Any],
        values: Sequence[float] | None = None,
        curve: Sequence[tuple[int, float]] = (),
        *,
        constrained: bool = True,
    ) -> FrozenTrial:
        """One trial that has ended, or is at work."""
        from optuna.trial import TrialState, create_trial

        there = [axis for axis in self._axes if axis.name in settings]
        trial = create_trial(
            state=TrialState[state],
            values=list(values) if values is not None else None,
            params={axis.name: _parameter(axis, settings[axis.name]) for axis in there},
            distributions={axis.name: self.distributions[axis.name] for axis in there},
            intermediate_values=dict(curve),
        )
        if constrained and state != "RUNNING":
            for key, value in observation.constraints:
                trial.set_constraint(key, value)
        return trial


def _distribution(axis: Axis) -> BaseDistribution:
    """Choices stand as their places in the axis, since Optuna takes no lists; numbers among them keep their order."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.values:
        last = len(axis.values) - 1
        ordered = axis.is_ordered and last > 1
        return IntDistribution(0, last) if ordered else CategoricalDistribution(range(last + 1))
    if axis.is_whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.is_log)
    return FloatDistribution(axis.low, axis.high, log=axis.is_log)


def _suggested(trial: Trial, axis: Axis) -> Any:
    if not axis.values:
        suggest = trial.suggest_int if axis.is_whole else trial.suggest_float
        return suggest(axis.name, axis.low, axis.high, log=axis.is_log)
    last = len(axis.values) - 1
    if axis.is_ordered and last > 1:
        return trial.suggest_int(axis.name, 0, last)
    return trial.suggest_categorical(axis.name, range(last + 1))


def _parameter(axis: Axis, value: Any) -> Any:
    if axis.values:
        return axis.values.index(axis.read(value))
    return value


def _value(axis: Axis, parameter: Any) -> Any:
    return axis.values[parameter] if axis.values else parameter


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a line on stderr for every study, and without the warning that `group` is experimental (optuna 5.0.0)."""
    from optuna import logging
    from optuna.exceptions import ExperimentalWarning

    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        logging.set_verbosity(before)
