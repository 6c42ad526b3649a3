"""What users and scripts may rely on: help, schema, exit codes, quiet stdout, documents that are true."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config.sweep_file import load, to_yaml
from orchestrator.planning.plan import SweepPlan
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.storage import write_result
from tests.fast.cases import LLAMA_2_7B
from tests.golden_files import commands, expected
from tests.made_up_sweep import made_up_trial

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "k8s" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SEARCH_SPACES = sorted((ROOT / "search_spaces").rglob("*.yaml"))
HEAVY = ("ray", "torch", "deepspeed", "transformers", "peft", "mlflow", "scipy", "numpy", "pandas")


@pytest.mark.parametrize(
    ("file", "text"), list(expected()), ids=lambda value: value.name if isinstance(value, Path) else ""
)
def test_the_surface_is_what_it_was(file: Path, text: str) -> None:
    assert file.read_text() == text, "if this change is meant, run scripts/golden and review its diff"


def test_help_and_plan_load_no_heavy_package() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom orchestrator.cli import app\n"
        "for words in (['--help'], ['plan', 'search_spaces/demo.yaml']):\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0, words\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert done.stdout.strip() == "[]", done.stderr


def test_help_is_there_before_the_sweep_files_models_are_made() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom orchestrator.cli import app\n"
        "assert CliRunner().invoke(app, ['run', '--help']).exit_code == 0\n"
        "print('orchestrator.config.sweep_config' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert done.stdout.strip() == "False", done.stderr


def test_plan_prints_one_json_document_and_nothing_else() -> None:
    result = CliRunner().invoke(
        app, ["plan", "search_spaces/zero_stage.yaml", "--gpu", "A100", "--gpus", "2", "--json"]
    )
    assert result.exit_code == 0
    assert SweepPlan.model_validate_json(result.stdout).runs == 7
    assert result.stderr == ""


@pytest.mark.parametrize("file", SEARCH_SPACES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_search_space_can_be_planned_on_its_hardware(file: Path) -> None:
    hardware = [] if file.parent.name == "cpu" else ["--gpu", "A100-40GB", "--gpus", "2"]
    result = CliRunner().invoke(app, ["plan", str(file), *hardware, "--json"])
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["runs"] > 0
    assert plan["makespan_s"][0] <= plan["makespan_s"][1] <= plan["makespan_s"][2]


@pytest.mark.parametrize(
    ("words", "exit_code", "told"),
    [
        (["plan", "no-such.yaml"], 2, "cannot be read"),
        (["plan", "search_spaces/demo.yaml", "--gpu", "H10"], 2, "did you mean H100"),
        (["plan", "search_spaces/demo.yaml", "--gpu", "H100", "--gpu-memory", "much"], 2, "80GiB"),
        (["plan", "search_spaces/demo.yaml", "--set", "model=builtin:tiny-lama"], 2, "tiny-llama"),
        (["report", "no/such/folder"], 2, "holds no sweep"),
        (["status", "no/such/folder"], 2, "holds no sweep"),
        (["plan", "search_spaces/demo.yaml", "--gpus", "8"], 2, "--gpu H100"),
        (["plan", "search_spaces/demo.yaml", "--set", "trial.target_modules=[q_prj]"], 2, "did you mean q_proj"),
        (["nonsense"], 2, "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_ends_with_2_and_says_what_is_wrong(words: list[str], exit_code: int, told: str) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == exit_code
    assert told in result.stderr
    assert result.stdout == ""


def test_a_plan_is_made_where_the_data_is_not() -> None:
    words = ["plan", "search_spaces/demo.yaml", "--set", "data.train=nowhere.jsonl"]
    result, script = CliRunner().invoke(app, words), CliRunner().invoke(app, [*words, "--json"])
    assert (result.exit_code, script.exit_code) == (0, 0)
    told = "run would end at once on this machine: data nowhere.jsonl: no such file"
    assert f"warning: {told}" in result.stdout.splitlines()[-1]
    assert json.loads(script.stdout)["warnings"][-1].startswith(told)


def test_a_plan_tells_what_is_done_already_in_the_sweeps_folder(tmp_path: Path) -> None:
    words = ["plan", "search_spaces/demo.yaml", "--set", f"storage={tmp_path}", "--json"]
    planned = json.loads(CliRunner().invoke(app, words).stdout)
    folder = SweepFolder(tmp_path / "demo")
    done = made_up_trial({}).model_copy(update={"trial_id": planned["trials"][0]["trial_id"]})
    write_result(folder, done)
    write_atomically(folder.sweep_file, to_yaml(load(Path("search_spaces/demo.yaml"), [f"storage={tmp_path}"])))
    told = json.loads(CliRunner().invoke(app, words).stdout)["warnings"]
    assert told == [
        *planned["warnings"],
        f"1 of these trials is done already in {folder.root}: `run` goes on with the rest",
    ]


def test_an_output_that_cannot_be_written_is_told() -> None:
    command = [sys.executable, "-m", "orchestrator", "plan", "search_spaces/demo.yaml"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=30)
    assert done.returncode == 3
    assert done.stderr.startswith("error: the output cannot be written")


def closed_pipe() -> int:
    """To write to: its reader has gone, as `tee` at Ctrl-C."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    """To write to: its window was closed."""
    master, terminal = pty.openpty()
    os.close(master)
    return terminal


@pytest.mark.parametrize("opened", [closed_pipe, closed_terminal])
def test_an_interrupted_run_ends_with_130_though_nobody_reads_its_output_any_more(opened: Callable[[], int]) -> None:
    pytest.importorskip("ray")
    code = """
from unittest.mock import MagicMock
from orchestrator import cli
from orchestrator.reporting import report
from orchestrator.sweep import run
from orchestrator.training import inputs
inputs.look_at, report.render_text = MagicMock(), lambda made: "a report"
run.run = lambda *arguments: MagicMock(exit_code=130, tracked=True, tracking_uri="http://mlflow")
cli.app(["run", "search_spaces/demo.yaml"])
"""
    writer = opened()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60
        )
    finally:
        os.close(writer)
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("interrupted; the state is saved: run the same command again to go on\n")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_link_and_file_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"`((?:orchestrator|search_spaces|tests|scripts|docs|benchmarks)/[\w./-]+)`", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_command_that_a_document_shows_parses(document: Path) -> None:
    for block in re.findall(r"```console\n(.*?)```", document.read_text(), re.DOTALL):
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and words[0] == "orchestrator":
                assert words[1] in commands(), line
                help_text = CliRunner().invoke(app, [words[1], "--help"]).stdout
                assert all(word.partition("=")[0] in help_text for word in words[2:] if word.startswith("--")), line
            elif words and words[0].startswith("scripts/"):
                assert (ROOT / words[0]).exists(), line


def test_what_is_told_to_be_installed_is_pinned_as_the_package_pins_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())}
    files = [*DOCUMENTS, *(ROOT / "orchestrator").rglob("*.py")]
    told = {one for file in files for one in re.findall(r"pip install '([^']+)'", file.read_text())}
    assert any(one.startswith("lm-eval") for one in told)
    assert told <= wanted


def test_the_documented_import_order_is_the_enforced_one() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    table = re.findall(r"^\| (`[\w`, ]+`) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    # Modules of one row stand side by side: neither may import the other.
    assert [row.replace("`", "").replace(", ", " | ") for row in table] == layers


@pytest.mark.parametrize(
    ("variables", "words", "told"),
    [
        ({"ORCHESTRATOR_LOG": "loud"}, ["plan", "search_spaces/demo.yaml"], "error: ORCHESTRATOR_LOG=loud: takes"),
        ({}, ["export", "~nobody-of-this-name/sweeps/a", "--to", "~nobody-of-this-name/b"], "no home folder is known"),
        ({}, ["plan", "search_spaces/demo.yaml", "--set", "data.train=~nobody-of-this-name/x"], "no home folder"),
    ],
)
def test_what_the_environment_lacks_is_told_and_is_no_bug(
    variables: dict[str, str], words: list[str], told: str
) -> None:
    result = CliRunner().invoke(app, words, env=variables)
    assert result.exit_code in (0, 2)
    assert told in result.stderr
    assert "this is a bug" not in result.stderr


def test_an_answer_is_given_in_an_encoding_that_lacks_its_signs() -> None:
    command = [sys.executable, "-m", "orchestrator", "plan", "search_spaces/full.yaml", "--gpu", "A100", "--gpus", "8"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, cwd=ROOT, timeout=30)
    assert done.returncode == 0, done.stderr
    assert rb"8 \xd7 A100" in done.stdout


def test_an_estimate_of_a_model_in_a_home_that_nobody_has_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B | {"architectures": ["LlamaForCausalLM"]}))
    lines = [json.dumps({"id": n, "model": m}) for n, m in enumerate(["~nobody-of-this-name/m", str(tmp_path)])]
    result = CliRunner().invoke(app, ["estimate"], input="\n".join(lines) + "\n")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert "no home folder is known" in first["error"]
    assert second["allocated_bytes"] > 7e9
