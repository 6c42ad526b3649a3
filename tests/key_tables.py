"""docs/sweep-file.md out of the sweep file's schema: a table of keys for each of its parts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
INTRODUCTION = """# The sweep file, key by key

Written by `scripts/golden` from the schema that `orchestrator schema` prints. What each part means together is in the
[reference](reference.md); `search_spaces/` has whole files.

In `space:` stand the settings of `trial:` that are searched, each as a list of values, as a choice with a condition
under which alone it is searched (`{choice: [...], when: {...}}`), or as a range: `{uniform: [a, b]}`,
`{log_uniform: [a, b]}`, `{int: [a, b]}`, `{log_int: [a, b]}`.
"""


def key_tables(schema: Schema) -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_section("", schema, schema)])


def _section(path: str, part: Schema, schema: Schema) -> Iterator[str]:
    yield from (f"## `{path}:`" if path else "## Whole file", "", "| key | takes | default | |")
    yield "| --- | --- | --- | --- |"
    inner = []
    for name, key in part["properties"].items():
        below = f"{path}.{name}" if path else name
        # Its keys are those of `trial:`, and the introduction says how they are written there.
        model = None if name == "space" else _model(key, schema)
        if model and model["properties"]:
            inner.append((below, model))
        takes = _takes(key, schema)
        if model:
            takes = f"[keys](#{below.replace('.', '')})" if model["properties"] else "`{}`"
        about = " ".join((key.get("description") or (model or {}).get("description", "")).split())
        yield f"| `{name}` | {takes} | {_default(name, key, part)} | {about} |"
    yield ""
    for below, model in inner:
        yield from _section(below, model, schema)


def _default(name: str, key: Schema, part: Schema) -> str:
    if name in part.get("required", ()):
        return "must be there"
    default = key.get("default")
    return "" if default is None or isinstance(default, dict) else f"`{json.dumps(default)}`"


def _model(key: Schema, schema: Schema) -> Schema | None:
    """The part that a key holds, of one or a list of them the one."""
    for option in (key, *key.get("anyOf", ())):
        if "$ref" in option:
            found = schema["$defs"][option["$ref"].rsplit("/", 1)[1]]
            return found if "properties" in found else None
    return None


def _takes(key: Schema, schema: Schema) -> str:
    if "$ref" in key:
        return _takes(schema["$defs"][key["$ref"].rsplit("/", 1)[1]], schema)
    if "anyOf" in key:
        return " or ".join(
            dict.fromkeys(_takes(option, schema) for option in key["anyOf"] if option.get("type") != "null")
        )
    if "enum" in key:
        return ", ".join(f"`{value}`" for value in key["enum"])
    if "const" in key:
        return f"`{key['const']}`"
    if key.get("type") == "array":
        if "items" not in key:
            return "a list"
        each = "a list, each" if "anyOf" in key["items"] else "a list of"
        return f"{each} {_takes(key['items'], schema)}"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true, false",
        "object": "keys",
    }
    return words.get(key.get("type", ""), "any") + _bounds(key)


def _bounds(key: Schema) -> str:
    low = key.get("minimum", key.get("exclusiveMinimum"))
    high = key.get("maximum", key.get("exclusiveMaximum"))
    if low is None and high is None:
        return ""
    above = "above " if "exclusiveMinimum" in key else "from "
    told = [f"{above}{low:,g}"] if low is not None else []
    # Limits that only keep out slips of the pen say nothing.
    told += [f"{'below' if 'exclusiveMaximum' in key else 'to'} {high:,g}"] if high is not None and high <= 1000 else []
    return f" {' '.join(told)}"
