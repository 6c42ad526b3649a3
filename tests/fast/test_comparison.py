"""Sweeps side by side: what may be compared, and how sure a difference is."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import InputError
from orchestrator.reporting import comparison_report, quantities, report
from orchestrator.reporting.comparison import Comparison, compare
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import GitState, SweepResult, TrialStatus
from tests.fast.test_report import Page
from tests.made_up_sweep import made_up_plan, made_up_sweep, made_up_trial, simulated, write_made_up

pytest.importorskip("jinja2")
pytest.importorskip("scipy")


def named(sweep: SweepResult, name: str, **fields: Any) -> SweepResult:
    return sweep.model_copy(update={"name": name, **fields})


def compared(tmp_path: Path, *sweeps: SweepResult) -> Comparison:
    folders = [write_made_up(tmp_path / str(place), sweep) for place, sweep in enumerate(sweeps)]
    return compare([report.build(folder) for folder in folders])


def test_the_better_sweep_is_named_with_how_sure_that_is(tmp_path: Path) -> None:
    worse, better = simulated([2.2, 2.1], 4, 1, noise_sd=0.01), simulated([2.0, 1.9], 4, 1, noise_sd=0.01)
    found = compared(tmp_path, named(worse, "old"), named(better, "new"))
    assert found.is_comparable
    assert found.answer.startswith("new recommends the configuration with the best eval_loss: rank=8 (")
    assert "old's rank=8 comes to" in found.answer
    assert ", worse by 0.2" in found.answer


def test_a_sweep_that_has_hardly_begun_recommends_nothing_yet(tmp_path: Path) -> None:
    waits = made_up_trial({"rank": 16}, status=TrialStatus.CANCELLED, objective=None)
    begun = made_up_sweep([made_up_trial({"rank": 8}, objective=1.0), waits], interrupted=True)
    found = compared(tmp_path, named(begun, "begun"), named(simulated([2.0, 1.9], 4, 1), "whole"))
    assert found.answer.startswith("whole recommends the configuration with the best eval_loss")
    assert found.answer.endswith("no other sweep has an answer yet.")
    assert "rank=8 (completed so far)" in comparison_report.render_text(found)
    assert "rank=8 (completed so far)" in Page(comparison_report.render_html(found)).text


def test_a_sweep_is_not_compared_with_itself(tmp_path: Path) -> None:
    made = report.build(write_made_up(tmp_path, simulated([2.2, 2.1], 2, 1)))
    with pytest.raises(InputError, match="named twice: name each once"):
        compare([made, made])


def test_equal_sweeps_are_within_the_noise(tmp_path: Path) -> None:
    one, other = (simulated([2.2, 2.0], 4, seed, noise_sd=0.01, seed_sd=0) for seed in (1, 2))
    assert "within the noise of it" in compared(tmp_path, named(one, "a"), named(other, "b")).answer


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("model", "another", "they differ in model"), ("data_hash", "0123456789abcdef", "they differ in data")],
)
def test_sweeps_of_another_model_or_data_are_not_ranked(tmp_path: Path, field: str, value: str, words: str) -> None:
    sweep = simulated([2.2, 2.0], 2, 1)
    found = compared(tmp_path, named(sweep, "a"), named(sweep, "b", **{field: value}))
    assert not found.is_comparable
    assert found.answer.startswith("Their objectives cannot be compared: ")
    assert words in found.differing[0]
    assert comparison_report.render_text(found).count(words) == 1
    assert Page(comparison_report.render_html(found)).text.count(words) == 1
    assert found.shared == ()


def test_a_sweep_with_the_name_of_anothers_folder_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = simulated([2.2, 2.0], 2, 1)
    a, b, c = named(sweep, "same", model="another"), named(sweep, "same"), named(sweep, "a")
    found = compare([report.build(write_made_up(Path(folder), s)) for folder, s in (("a", a), ("b", b), ("c", c))])
    assert [one.name for one in found.sweeps] == ["a", "b", "c"]
    assert not found.is_comparable


def of_one_rank(name: str, **settings: Any) -> SweepResult:
    """Rank 4 and 8, three seeds each, with settings that nobody searched."""
    configurations = [{"rank": rank, **settings} for rank in (4, 8)]
    return named(simulated([2.2, 2.0], 3, 1, configurations=configurations), name, searched=("rank",))


def test_settings_that_were_not_searched_and_differ_are_told_beside_who_is_better(tmp_path: Path) -> None:
    short, long = of_one_rank("short", max_steps=100), of_one_rank("long", max_steps=1000, learning_rate=1e-3)
    found = compared(tmp_path, short, long)
    assert found.is_comparable
    assert "they differ in max_steps (short: 100; long: 1000)" in found.differing
    assert "they differ in learning_rate (short: 0.0002; long: 0.001)" in found.differing
    assert compared(tmp_path / "alike", short, named(short, "again")).differing == ()


def test_what_one_sweep_searched_is_told_with_what_it_recommends(tmp_path: Path) -> None:
    fixed, searched = of_one_rank("fixed"), simulated([2.2, 2.0], 3, 1, configurations=[{"alpha": 8}, {"alpha": 64}])
    told = compared(tmp_path, fixed, named(searched, "searched")).differing
    assert [line.split(" (")[0] for line in told] == ["they differ in rank", "they differ in alpha"]
    assert told[1].endswith("searched: 64)")


def test_losses_of_sweeps_of_different_sequence_lengths_are_not_ranked(tmp_path: Path) -> None:
    short, long = of_one_rank("short", sequence_length=128), of_one_rank("long", sequence_length=1024, max_steps=9)
    found = compared(tmp_path, short, long)
    assert not found.is_comparable
    told = "Their objectives cannot be compared: they differ in sequence_length (short: 128; long: 1024)."
    assert found.answer == told
    fast = {"objective_metric": "tokens_per_s", "objective_mode": "max"}
    assert compared(tmp_path / "fast", named(short, "a", **fast), named(long, "b", **fast)).is_comparable


def test_what_both_ran_is_compared_seed_by_seed(tmp_path: Path) -> None:
    first = simulated([2.2, 2.0, 1.9], 3, 1, noise_sd=0)
    second = simulated([2.3, 2.1], 3, 1, noise_sd=0)
    found = compared(tmp_path, named(first, "a"), named(second, "b"))
    assert {shared.label for shared in found.shared} == {"rank=4", "rank=8"}
    for shared in found.shared:
        assert shared.differences["b"].mean == pytest.approx(0.1)
        assert shared.differences["b"].count == 3


def test_two_sweeps_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    sweep = simulated([2.2, 2.0], 2, 1)
    assert {s.name for s in compared(tmp_path, sweep, sweep).sweeps} == {str(tmp_path / "0"), str(tmp_path / "1")}


def test_the_command_compares_several_folders(tmp_path: Path) -> None:
    folders = [write_made_up(tmp_path / name, named(simulated([2.2, 2.0], 2, 1), name)) for name in ("a", "b")]
    shown = CliRunner().invoke(app, ["report", *(str(folder.root) for folder in folders)])
    assert shown.exit_code == 0
    assert "ran in several, all settings alike:" in shown.stdout
    page = Page(folders[0].comparison.read_text(encoding="utf-8"))
    assert "2 sweeps compared" in page.text
    assert folders[1].report.exists()
    raw = json.loads(CliRunner().invoke(app, ["report", "--json", *(str(folder.root) for folder in folders)]).stdout)
    assert [sweep["name"] for sweep in raw["sweeps"]] == ["a", "b"]


def test_the_comparison_is_told_where_its_page_cannot_be_written(tmp_path: Path) -> None:
    folders = [write_made_up(tmp_path / name, named(simulated([2.2, 2.0], 2, 1), name)) for name in ("a", "b")]
    folders[0].comparison.mkdir()
    shown = CliRunner().invoke(app, ["report", *(str(folder.root) for folder in folders)])
    assert shown.exit_code == 0
    assert "ran in several, all settings alike:" in shown.stdout
    assert f"cannot write {folders[0].comparison} " in shown.stderr
    # Nothing is named that is not there, nor an option that `report` does not have, and nothing half written stays.
    assert "report: " not in shown.stderr
    assert "--storage" not in shown.stderr
    assert not list(folders[0].root.glob(".comparison.html*"))


def test_a_page_of_an_earlier_report_is_not_shown_where_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_made_up(tmp_path / "a", simulated([2.2, 2.0], 2, 1))
    folder.report.write_text("of an earlier report")
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    shown = CliRunner().invoke(app, ["report", "--open", str(folder.root)])
    assert shown.exit_code == 0
    assert "No space left on device" in shown.stderr
    assert "report: " not in shown.stderr
    assert not opened
    assert [path.name for path in folder.root.glob("*report.html*")] == [folder.report.name]


def test_every_page_is_put_where_its_sweep_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write_made_up(tmp_path / name, named(simulated([2.2, 2.0], 2, 1), name)) for name in ("a", "b")]
    published: list[Path] = []
    monkeypatch.setattr("orchestrator.results.remote.publish", lambda folder, file: published.append(file))
    CliRunner().invoke(app, ["report", *(str(folder.root) for folder in folders)])
    assert published == [folders[0].report, folders[1].report, folders[0].comparison]


def test_each_sweeps_memory_is_drawn_with_its_own_parts(tmp_path: Path) -> None:
    """Of another model the same settings hold other bytes."""
    sweep = simulated([2.0], 1, 1)
    folders = [write_made_up(tmp_path / name, named(sweep, name)) for name in ("a", "b")]
    small = made_up_plan(sweep)
    (trial,) = small.trials
    assert trial.memory is not None
    parts = replace(trial.memory.parts, weights=trial.memory.parts.weights // 2)
    other = trial.model_copy(update={"memory": replace(trial.memory, parts=parts)})
    for folder, plan in zip(folders, (small, small.model_copy(update={"trials": (other,)})), strict=True):
        write_atomically(folder.plan, plan.model_dump_json())
    page = comparison_report.render_html(compare([report.build(folder) for folder in folders]))
    for held in (trial.memory.parts.weights, parts.weights):
        assert f"weights {quantities.memory(held)}" in page


def test_sweeps_without_an_answer_can_be_compared(tmp_path: Path) -> None:
    empty = made_up_sweep([])
    found = compared(tmp_path, named(empty, "a"), named(empty, "b"))
    assert found.answer == "None of them has an answer yet."
    Page(comparison_report.render_html(found))
    assert comparison_report.render_text(found)


def test_the_page_is_opened_where_there_is_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_made_up(tmp_path / "sweep", simulated([2.0, 2.1], 1, 0))
    opened = tmp_path / "opened"
    monkeypatch.setenv("BROWSER", f"sh -c 'printf %s \"$0\" > {opened}' %s")
    shown = CliRunner().invoke(app, ["report", "--open", str(folder.root)])
    assert shown.exit_code == 0
    assert opened.read_text(encoding="utf-8") == folder.report.as_uri()


def test_a_commit_is_told_as_that_of_the_repository_where_the_commands_were_called(tmp_path: Path) -> None:
    sweep = simulated([2.0], 1, 0)
    trials = [t.model_copy(update={"git": GitState(commit="f" * 40, dirty=False)}) for t in sweep.trials]
    found = compared(tmp_path, named(sweep, "old"), named(sweep.model_copy(update={"trials": tuple(trials)}), "new"))
    assert (
        "they differ in commit of the repository they were run in (old: 0123456789ab; new: ffffffffffff)"
        in found.differing
    )
    page = report.render_html(report.build(SweepFolder(tmp_path / "1")))
    assert f"# in the repository that it was run in, at commit {'f' * 40}" in page
    assert "orchestrator at commit" not in page
