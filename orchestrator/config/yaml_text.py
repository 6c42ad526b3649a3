"""A sweep file's text: YAML with the line of every key, keys written over by --set, and a value as it is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from orchestrator.config.names import nearest
from orchestrator.config.type_problems import MOST_PROBLEMS, Path_, spell
from orchestrator.errors import InputError, Problem, SweepFileError, cut, shown

Lines = dict[Path_, int]
MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_VALUES = 50_000
TEXT_TAG = "tag:yaml.org,2002:str"
LONGEST_NUMBER = 400
"""Characters of a value that is no text: YAML 1.1 reads 1:59:59 to the base of 60, which takes minutes for 300,000."""
LARGEST_WHOLE_NUMBER = 2**63


def refusal(file: Path, problems: Sequence[Problem]) -> SweepFileError:
    """All problems at once, as far as anybody reads on."""
    more = [Problem("the rest of the file", "has more problems: mend these first")] * (len(problems) > MOST_PROBLEMS)
    return SweepFileError(str(file), (*problems[:MOST_PROBLEMS], *more))


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


def read_yaml(file: Path) -> tuple[dict[str, Any], Lines]:
    """What it says, and the line of each key.

    Raises:
        InputError: it cannot be read, or is not YAML.
        SweepFileError: values that no sweep can have.
    """
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
        raise refusal(file, problems)
    return raw, lines


def _construct(node: yaml.Node, path: Path_, lines: Lines, problems: list[Problem]) -> Any:
    """Plain values of a node, the line of every key, and keys that stand twice (which YAML readers pass over)."""
    lines.setdefault(path, node.start_mark.line + 1)
    if len(lines) > MAX_VALUES:
        # Aliases of aliases: a few lines that stand for billions of values.
        raise InputError(f"the sweep file stands for more than {MAX_VALUES:,} values: write it without aliases")
    if len(path) > MAX_DEPTH:
        problems.append(Problem(spell(path[:4]) + "…", f"is nested deeper than {MAX_DEPTH} levels", lines[path]))
        return None
    if isinstance(node, yaml.MappingNode):
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            if key in found:
                problems.append(Problem(spell((*path, key)), "stands twice: keep one", key_node.start_mark.line + 1))
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
        problems.append(Problem(spell(path), told, node.start_mark.line + 1))
        return None
    except (yaml.YAMLError, ValueError) as error:
        problems.append(Problem(spell(path), f"cannot be read ({cut(str(error))})", node.start_mark.line + 1))
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


def write_over(raw: dict[str, Any], lines: Lines, override: str) -> None:
    """Write `key=value` over what the file says.

    Raises:
        InputError: it is no such pair, or its value cannot be read.
    """
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
