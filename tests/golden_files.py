"""What the contract freezes, as files to compare with: the sweep file's schema and keys, and every command's help."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config.sweep_config import SweepConfig
from tests.compatibility_page import compatibility_page
from tests.key_tables import key_tables

GOLDEN = Path(__file__).parent / "golden"
KEY_TABLES = Path(__file__).parent.parent / "docs" / "sweep-file.md"
COMPATIBILITY = KEY_TABLES.with_name("compatibility.md")
EDITORS_SCHEMA = Path(__file__).parent.parent / "search_spaces" / "sweep.schema.json"


def commands() -> list[str]:
    return sorted(str(c.name or c.callback.__name__) for c in app.registered_commands if c.callback)


def help_of(*command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "100"}, prog_name="orchestrator")
    assert result.exit_code == 0, result.output
    return result.output


def expected() -> Iterator[tuple[Path, str]]:
    """Every golden file with what it should hold."""
    schema = json.dumps(SweepConfig.model_json_schema(), indent=2) + "\n"
    yield GOLDEN / "sweep.schema.json", schema
    yield EDITORS_SCHEMA, schema
    yield KEY_TABLES, key_tables(json.loads(schema))
    yield COMPATIBILITY, compatibility_page()
    yield GOLDEN / "help" / "orchestrator.txt", help_of()
    for command in commands():
        yield GOLDEN / "help" / f"{command}.txt", help_of(command)


def main() -> None:
    for file, text in expected():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


if __name__ == "__main__":
    main()
