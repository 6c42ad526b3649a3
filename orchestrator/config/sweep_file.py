"""A sweep file from disk to SweepConfig and back, with every problem told at once: file, line, key, nearest name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from orchestrator.config.meaning_problems import problems_of_meaning
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.type_problems import problems_between_keys, problems_of, spell
from orchestrator.config.yaml_text import Lines, read_yaml, refusal, write_over
from orchestrator.errors import Problem, cut


def load(file: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep file; each override is `trial.max_steps=20`.

    Raises:
        InputError: there is no such file, or it is not YAML.
        SweepFileError: it has problems; all of them are in it.
    """
    raw, lines = read_yaml(file)
    for override in overrides:
        write_over(raw, lines, override)
    problems = list(problems_between_keys(raw))
    sweep = None
    try:
        sweep = SweepConfig.model_validate(raw)
    except ValidationError as error:
        told = {problem.path for problem in problems}
        problems += [problem for problem in problems_of(error, raw) if problem.path not in told]
    if sweep is not None and not problems:
        problems += problems_of_meaning(sweep)
    if problems or sweep is None:
        raise refusal(file, list(_with_lines(problems, lines, tuple(overrides))))
    return sweep


def text_of(file: Path, overrides: Sequence[str] = ()) -> str:
    """The sweep file as it is written, with the overrides in it and no default filled in.

    Raises:
        InputError: there is no such file, or it is not YAML.
    """
    raw, lines = read_yaml(file)
    for override in overrides:
        write_over(raw, lines, override)
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=100)


def to_yaml(sweep: SweepConfig) -> str:
    """The sweep with every default filled in; `load` reads it back."""
    whole = sweep.model_dump(mode="json", exclude_none=True)
    whole["trial"] = {name: value for name, value in whole["trial"].items() if name not in sweep.domains}
    if not whole["space"]:
        del whole["space"]
    return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=100)


def _with_lines(problems: Iterable[Problem], lines: Lines, overrides: Sequence[str]) -> Iterator[Problem]:
    by_spelling = {spell(path): line for path, line in lines.items()}
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
