from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.sweep_file import load
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import SweepFileError, printable
from tests.fuzz import TARGETS, attack, read_all, whole_folder

INPUTS = {"sweep_file": 60, "results_folder": 20, "data_file": 80, "estimate_line": 150}
"""A few seconds of each; `python -m tests.fuzz` goes on."""
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
KEYS = [*((key,) for key in SweepConfig.model_fields), *(("trial", key) for key in TrialConfig.model_fields)]
KEYS += [("space", key) for key in TrialConfig.model_fields]


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_input_is_taken_or_refused_in_our_words_and_harms_nothing(target: str) -> None:
    told = {attack(TARGETS[target], seed) for seed in range(INPUTS[target])}
    assert told <= {"taken", "refused"}
    # Otherwise the attacks are of one kind only.
    assert "taken" in told


def test_a_pipe_in_place_of_any_file_of_a_sweep_is_not_waited_for(tmp_path: Path) -> None:
    sweep = whole_folder(tmp_path)
    for file in [path for path in sweep.root.rglob("*") if path.is_file()]:
        held = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        read_all(sweep)
        assert file.is_fifo()
        file.unlink()
        file.write_bytes(held)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_whatever_stands_at_a_key_loads_or_is_refused_at_that_key(
    key: tuple[str, ...], value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw: dict[str, Any] = {"name": "x", "model": "builtin:tiny-llama", "data": {"train": "builtin:python-docs"}}
    at = raw
    for name in key[:-1]:
        at = at.setdefault(name, {})
    at[key[-1]] = value
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8", errors="surrogatepass")
    try:
        load(file)
    except SweepFileError as error:
        for problem in error.problems:
            assert problem.path.startswith(".".join(key[:1]))
            assert problem.line
            assert len(problem.message) < 1000


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("exclude: 5", "exclude: takes a list of partial configurations"),
        ("trial: {rank: 0}", "trial.rank: should be greater than or equal to 1 or 'full', not 0"),
        ("trial:\n  max_steps:\nstorage:", "trial.max_steps: has no value: write one, or leave the key out"),
        ("trial:\n  max_steps:\nstorage:", "storage: has no value: write one, or leave the key out"),
        ("search:", "search: has no value: write one"),
        ("trial: {max_steps: []}", "trial.max_steps: should be a valid integer, not []"),
        ("space: {rank: [[]]}", "space.rank[0]: should be a valid integer or 'full', not []"),
        ("trial: {alpha: foo}", "trial.alpha: takes a number above 0, or a multiple of the rank as 2x"),
        ("trial: {alpha: 0x}", "trial.alpha: takes a number above 0, or a multiple of the rank as 2x"),
        ("space: {alpha: [2x, foo]}", "space.alpha[1]: takes a number above 0, or a multiple"),
        (
            "trial: {target_modules: qproj}",
            "trial.target_modules: takes attention, all-linear or a list of modules' names, as "
            "`target_modules: [q_proj, v_proj]`",
        ),
        (
            "space: {target_modules: [attention, qproj]}",
            "space.target_modules[1]: takes attention, all-linear or a list of modules' names, as "
            "`target_modules: [attention, [q_proj, v_proj]]`",
        ),
        ("space: {target_modules: {choice: [attn]}}", "space.target_modules.choice[0]: takes attention, all-linear or"),
        ("space: {rank: {choice: [4], whn: {dora: true}}}", "space.rank.whn: is no key here; did you mean when?"),
        ("space: {learning_rate: {uniform: [1]}}", "space.learning_rate.uniform: takes two bounds, as [1, 4]"),
        ("space: {rank: {int: 5}}", "space.rank.int: takes two bounds, as [1, 4]"),
        ("search: {algorithm: random, repeats: 1000}\nbudget: {trials: 1000}", "more than 100,000 trials"),
        (f"space: {{rank: {[*range(1, 400)]}, seed: {[*range(400)]}}}", "has 159,600 combinations"),
        (f"trial: {{rank: {'9' * 5000}}}", "trial.rank: cannot be read"),
        (f"trial: {{rank: 0x{'f' * 5000}}}", "trial.rank: cannot be read (more than 400 characters, and no text)"),
        (f"trial: {{precision: {'9x' * 5000}}}", "trial.precision: should be 'fp32'"),
    ],
)
def test_a_message_says_what_the_key_takes_and_repeats_no_long_value(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(f"name: x\nmodel: builtin:tiny-llama\ndata: {{train: builtin:python-docs}}\n{text}\n")
    with pytest.raises(SweepFileError) as caught:
        load(file)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_terminal_gets_no_control_characters() -> None:
    assert printable("a\x1b[31mb\r\n\tc\x9bé") == "a\\x1b[31mb\\r\n\tc\\x9bé"
