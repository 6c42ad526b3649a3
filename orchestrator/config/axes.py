"""The searched settings as coordinates that a search algorithm can walk, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from orchestrator.config.search_space import (
    SETTINGS,
    Choice,
    IntRange,
    LogIntRange,
    LogUniform,
    Range,
    Settings,
    as_trial,
    holds,
    in_order_of_need,
)
from orchestrator.errors import cut, shown

Domain = Choice[Any] | Range
DIGITS = 12
"""Of a number that an axis makes: the middle of 1e-4 to 1e-2 is 0.001, and not 0.0010000000000000002 beside it."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One searched setting; its values are those of a trial's JSON."""

    name: str
    when: Mapping[str, Any]
    values: tuple[Any, ...] = ()
    """Of a choice, numbers in ascending order; empty for a range."""
    low: float = 0.0
    high: float = 1.0
    is_log: bool = False
    is_whole: bool = False

    @property
    def is_ordered(self) -> bool:
        """Whether a step along the axis means something: ranges, numbers, and choices of two."""
        return not self.values or len(self.values) <= 2 or all(_is_number(value) for value in self.values)

    def at(self, unit: float) -> Any:
        """The value at a place between 0 and 1, of which each choice has as large a share."""
        unit = min(1.0, max(0.0, unit))
        if self.values:
            return self.values[min(len(self.values) - 1, int(unit * len(self.values)))]
        # A whole number owns half a unit on both sides, so that the ends are as wide as their neighbours.
        margin = 0.5 if self.is_whole else 0.0
        low, high = self._scaled(self.low - margin), self._scaled(self.high + margin)
        value = low + unit * (high - low)
        value = math.exp(value) if self.is_log else value
        value = round(value) if self.is_whole else float(f"{value:.{DIGITS}g}")
        return min(self.high, max(self.low, value))

    def place(self, value: Any) -> float:
        """The middle of a value's share: `at(place(value))` is the value.

        Raises:
            ValueError: the axis does not have it.
        """
        value = self.read(value)
        if self.values:
            return (self.values.index(value) + 0.5) / len(self.values)
        margin = 0.5 if self.is_whole else 0.0
        low, high = self._scaled(self.low - margin), self._scaled(self.high + margin)
        return (self._scaled(value) - low) / (high - low)

    def read(self, raw: Any) -> Any:
        """A value as a person or a record spells it, as the axis has it.

        Raises:
            ValueError: it lies beside the axis.
        """
        try:
            value = _as_json(self.name, SETTINGS[self.name].validate_python(raw))
        except ValidationError as error:
            raise ValueError(f"{shown(raw)} can never hold") from error
        if self.values and value not in self.values:
            raise ValueError(f"{shown(raw)} is none of those searched: {cut(', '.join(map(str, self.values)))}")
        if not self.values and not (_is_number(value) and self.low <= value <= self.high):
            raise ValueError(f"{shown(raw)} is not between {self.low:g} and {self.high:g}, where it is searched")
        return value

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.is_log else value


def axes_of(space: Mapping[str, Domain]) -> tuple[Axis, ...]:
    """One axis a searched setting, each after those that its `when` names."""
    return tuple(axis_of(name, space[name]) for name in in_order_of_need(space))


def axis_of(name: str, domain: Domain) -> Axis:
    """The axis of one setting."""
    if isinstance(domain, Choice):
        values = tuple(dict.fromkeys(_as_json(name, value) for value in domain.choice))
        return Axis(name, domain.when, tuple(sorted(values)) if all(map(_is_number, values)) else values)
    kind = next(key for key in type(domain).model_fields if key != "when")
    low, high = getattr(domain, kind)
    is_log, is_whole = isinstance(domain, LogUniform | LogIntRange), isinstance(domain, IntRange | LogIntRange)
    return Axis(name, domain.when, (), low, high, is_log, is_whole)


def active(axes: Sequence[Axis], base: Settings, values: Mapping[str, Any]) -> Settings:
    """The settings that are searched there: an axis without its condition is left out."""
    chosen: Settings = {}
    for axis in axes:
        if holds(axis.when, as_trial({**base, **chosen})):
            chosen[axis.name] = values[axis.name]
    return chosen


def settings_at(axes: Sequence[Axis], base: Settings, units: Sequence[float]) -> Settings:
    """The searched settings at a point of the unit cube."""
    return active(axes, base, {axis.name: axis.at(unit) for axis, unit in zip(axes, units, strict=True)})


def complete(axes: Sequence[Axis], base: Settings, point: Settings) -> Settings:
    """A point to try first; what it leaves open stands in the middle of its axis."""
    middle = {axis.name: axis.at(0.5) for axis in axes}
    named = {axis.name: axis.read(point[axis.name]) for axis in axes if axis.name in point}
    return active(axes, base, middle | named)


def places_of(axes: Sequence[Axis], settings: Settings) -> tuple[float, ...]:
    """Their point in the unit cube; a setting that is not searched there stands in the middle of its axis.

    So what is not there pulls a model neither way. Source: Lévesque et al. 2017, Bayesian optimization for conditional
    hyperparameter spaces.

    Raises:
        ValueError: a value lies beside its axis.
    """
    return tuple(axis.place(settings[axis.name]) if axis.name in settings else 0.5 for axis in axes)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_json(name: str, value: Any) -> Any:
    """As a trial's JSON has it; a list of modules as a tuple, which can be compared and counted."""
    plain = SETTINGS[name].dump_python(value, mode="json")
    return tuple(plain) if isinstance(plain, list) else plain
