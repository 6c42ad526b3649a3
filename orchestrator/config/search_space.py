"""Choices, ranges, `when` and `exclude`: out of them come the configurations of a sweep."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError, create_model

from orchestrator.config.trial_config import TrialConfig

Value = TypeVar("Value")
SETTING_TYPES = {
    name: hint
    for name, hint in get_type_hints(TrialConfig, include_extras=True).items()
    if name in TrialConfig.model_fields
}
SETTINGS = {name: TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)) for name, hint in SETTING_TYPES.items()}
"""What reads and writes the value of each setting."""
Settings = dict[str, Any]
WholeNumber = int  # inside a class with a field `int`, the name is the field's


class _Part(BaseModel):
    # No attribute docstrings: pydantic looks for the source of every class made below through all loaded modules,
    # which takes half a minute where transformers is loaded.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class When(_Part):
    """A setting that is searched only where other settings have one of the named values."""

    when: Annotated[dict[str, Any], Field(description="Setting → value, or list of values, that it must have.")] = {}


class Choice(When, Generic[Value]):
    """One of several values."""

    choice: Annotated[tuple[Value, ...], Field(min_length=1)]


class Uniform(When):
    """A real number between two bounds, each part as likely."""

    uniform: tuple[float, float]

    def sample(self, rng: random.Random) -> float:
        """Draw one value."""
        return rng.uniform(*self.uniform)


class LogUniform(When):
    """A positive real number between two bounds, each power of ten as likely."""

    log_uniform: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

    def sample(self, rng: random.Random) -> float:
        """Draw one value."""
        low, high = self.log_uniform
        return min(high, max(low, math.exp(rng.uniform(math.log(low), math.log(high)))))


class IntRange(When):
    """A whole number between two bounds, both included."""

    int: tuple[WholeNumber, WholeNumber]

    def sample(self, rng: random.Random) -> WholeNumber:
        """Draw one value."""
        return rng.randint(*self.int)


class LogIntRange(When):
    """A positive whole number between two bounds, both included, each power of ten as likely."""

    log_int: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]

    def sample(self, rng: random.Random) -> int:
        """Draw one value."""
        low, high = self.log_int
        # Half a unit on both sides, so that the ends are as likely as their neighbours.
        drawn = math.exp(rng.uniform(math.log(low - 0.5), math.log(high + 0.5)))
        return min(high, max(low, round(drawn)))


Range = Uniform | LogUniform | IntRange | LogIntRange
MOST_IN_VAIN = 100_000
"""Draws in a row, or combinations of a grid, without one that is new: no grid is so large."""
DOMAIN_TAGS = ("list", "choice", "uniform", "log_uniform", "int", "log_int")


def _tag(raw: Any) -> str:
    if isinstance(raw, BaseModel):
        return next(tag for tag in DOMAIN_TAGS if tag in type(raw).model_fields)
    if isinstance(raw, Mapping):
        return next((tag for tag in DOMAIN_TAGS if tag in raw), "choice")
    return "list"


def _domain(setting: str, annotation: Any) -> Any:
    # A class with a name of its own: pydantic's for the generic one is its whole annotation spelled out.
    choice = create_model(setting.title().replace("_", "") + "Choice", __base__=Choice[annotation])
    return Annotated[
        Annotated[tuple[annotation, ...], Field(min_length=1), Tag("list")]
        | Annotated[choice, Tag("choice")]
        | Annotated[Uniform, Tag("uniform")]
        | Annotated[LogUniform, Tag("log_uniform")]
        | Annotated[IntRange, Tag("int")]
        | Annotated[LogIntRange, Tag("log_int")],
        Discriminator(_tag),
    ]


# One optional field a setting, so that the JSON schema and every error know the setting's own type.
Space: type[_Part] = create_model(  # type: ignore[call-overload]
    "Space",
    __base__=_Part,
    **{
        name: (_domain(name, annotation) | None, Field(None, description=TrialConfig.model_fields[name].description))
        for name, annotation in SETTING_TYPES.items()
    },
)


def domains(space: BaseModel) -> dict[str, Choice[Any] | Range]:
    """The searched settings, in the order of TrialConfig; a bare list is a choice without a condition."""
    found = {name: getattr(space, name) for name in type(space).model_fields}
    return {
        name: Choice[Any](choice=domain) if isinstance(domain, tuple) else domain
        for name, domain in found.items()
        if domain is not None
    }


def holds(condition: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether every setting that the condition names has that value, or one of those values."""
    return all(settings.get(name) in allowed_values(name, allowed) for name, allowed in condition.items())


def as_trial(settings: Settings) -> Settings:
    """The settings with every default filled in, for a condition to look at."""
    return TrialConfig(**settings).model_dump(mode="json")


def is_excluded(config: TrialConfig, exclude: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of the partial configurations that must not run is part of it."""
    return _has_one_of(config, _read_conditions(exclude))


def _read_conditions(conditions: Sequence[Mapping[str, Any]]) -> list[Mapping[str, list[Any]]]:
    """Each with the values that it allows, read once: a grid asks for each of its configurations."""
    return [{name: allowed_values(name, allowed) for name, allowed in one.items()} for one in conditions]


def _has_one_of(config: TrialConfig, conditions: Sequence[Mapping[str, list[Any]]]) -> bool:
    settings = config.model_dump(mode="json")
    return any(all(settings[name] in values for name, values in one.items()) for one in conditions)


def allowed_values(name: str, allowed: Any) -> list[Any]:
    """The values of a condition as a trial's settings have them (YAML's 1e-4 is a string), without what cannot be."""
    # A list of modules is one value.
    several = isinstance(allowed, list) and name != "target_modules"
    found = []
    for value in allowed if several else [allowed]:
        with contextlib.suppress(ValidationError):
            setting = SETTINGS[name].validate_python(value)
            found.append(SETTINGS[name].dump_python(setting, mode="json"))
    return found


def in_order_of_need(space: Mapping[str, Choice[Any] | Range]) -> tuple[str, ...]:
    """The settings, each after those that its `when` names.

    Raises:
        ValueError: two conditions wait for each other.
    """
    done: list[str] = []
    waiting = dict(space)
    while waiting:
        ready = [n for n, domain in waiting.items() if not (set(domain.when) & set(waiting)) - {n}]
        ready = [n for n in ready if n not in waiting[n].when]
        if not ready:
            raise ValueError(f"the `when` of {', '.join(waiting)} wait for each other")
        done += ready
        for name in ready:
            del waiting[name]
    return tuple(done)


@dataclass(frozen=True, slots=True)
class Trial:
    """One configuration and one seed, with the name that it keeps for ever."""

    trial_id: str
    configuration_id: str
    config: TrialConfig
    repeat: int


def make_trials(configurations: Sequence[TrialConfig], repeats: int) -> tuple[Trial, ...]:
    """Repeat every configuration; repeat n has seed + n in all of them, so that their differences are paired.

    All first repeats come before the second ones: a sweep that is cut short has seen every configuration.
    """
    return tuple(
        Trial(
            trial_id=f"{identity}-{repeat}",
            configuration_id=identity,
            config=config.model_copy(update={"seed": (config.seed + repeat) % 2**31}),
            repeat=repeat,
        )
        for repeat in range(repeats)
        for config in configurations
        for identity in [configuration_id(config)]
    )


def configuration_id(config: TrialConfig) -> str:
    """Eight hexadecimal digits out of all settings: the same configuration has the same name in every run."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def descendant(config: TrialConfig, parent_id: str, member: int) -> Trial:
    """A trial that goes on where another one stopped: it has a name of its own, though settings may be the same."""
    identity = hashlib.sha256(f"{parent_id} {member} {configuration_id(config)}".encode()).hexdigest()[:8]
    return Trial(f"{identity}-0", identity, config, 0)


def grid(
    base: Settings, space: Mapping[str, Choice[Any] | Range], exclude: Sequence[Mapping[str, Any]]
) -> tuple[TrialConfig, ...]:
    """Every combination of the choices, each once, sorted by the settings in their order.

    Raises:
        ValueError: the space has a range, which a grid cannot walk.
    """
    for name, domain in space.items():
        if not isinstance(domain, Choice):
            raise ValueError(f"space.{name} is a range, which a grid cannot walk: list its values or use random")
    order = in_order_of_need(space)

    def walk(settings: Settings, names: Sequence[str]) -> Iterator[Settings]:
        if not names:
            yield settings
            return
        domain = space[names[0]]
        assert isinstance(domain, Choice)
        if domain.when and not holds(domain.when, as_trial(settings)):
            yield from walk(settings, names[1:])
            return
        for value in domain.choice:
            yield from walk({**settings, names[0]: value}, names[1:])

    found = _distinct((settings for settings in walk(base, order)), exclude)
    return _in_order(found, space)


def sample(
    base: Settings,
    space: Mapping[str, Choice[Any] | Range],
    exclude: Sequence[Mapping[str, Any]],
    count: int,
    seed: int,
) -> tuple[TrialConfig, ...]:
    """`count` distinct random configurations, fewer where the space holds no more; the same seed draws the same."""
    rng = random.Random(seed)
    order = in_order_of_need(space)

    def draw() -> Settings:
        settings = dict(base)
        for name in order:
            domain = space[name]
            if not domain.when or holds(domain.when, as_trial(settings)):
                settings[name] = rng.choice(domain.choice) if isinstance(domain, Choice) else domain.sample(rng)
        return settings

    # A small space runs out of new configurations: after 100 draws for each one that it has there are no more.
    if all(isinstance(domain, Choice) for domain in space.values()):
        count = min(count, math.prod(len(domain.choice) for domain in space.values() if isinstance(domain, Choice)))
    draws = (draw() for _ in range(count * 100))
    return tuple(itertools.islice(_distinct(draws, exclude), count))


def _distinct(draws: Iterator[Settings], exclude: Sequence[Mapping[str, Any]]) -> Iterator[TrialConfig]:
    """Until nothing new has come for so long that nothing will: a grid is never that long."""
    seen: set[str] = set()
    in_vain = 0
    conditions = _read_conditions(exclude)
    for settings in draws:
        config = TrialConfig(**settings)
        identity = configuration_id(config)
        if identity in seen or _has_one_of(config, conditions):
            in_vain += 1
            if in_vain > max(MOST_IN_VAIN, 100 * len(seen)):
                return
            continue
        in_vain = 0
        seen.add(identity)
        yield config


def _in_order(
    configurations: Iterator[TrialConfig], space: Mapping[str, Choice[Any] | Range]
) -> tuple[TrialConfig, ...]:
    def position(config: TrialConfig) -> tuple[int, ...]:
        places = []
        for name, domain in space.items():
            value = getattr(config, name)
            assert isinstance(domain, Choice)
            places.append(domain.choice.index(value) if value in domain.choice else -1)
        return tuple(places)

    return tuple(sorted(configurations, key=position))
