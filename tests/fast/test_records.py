from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from pydantic import ValidationError

from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import FolderError
from orchestrator.reporting import report
from orchestrator.results import folders
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import MOVES, MetricPoint, TrialResult, TrialStatus, upgrade
from orchestrator.results.storage import read_sweep, read_trial_results, write_result
from tests.made_up_sweep import made_up_point, made_up_sweep, made_up_trial, write_made_up

S = TrialStatus
ALLOWED = (
    {(S.PENDING, s) for s in (S.RUNNING, S.INFEASIBLE, S.FAILED, S.CANCELLED)}
    | {
        (S.RUNNING, s)
        for s in (S.COMPLETED, S.STOPPED, S.OUT_OF_MEMORY, S.DIVERGED, S.PREEMPTED, S.FAILED, S.CANCELLED)
    }
    | {(S.PREEMPTED, S.PENDING), (S.CANCELLED, S.PENDING)}
)


def trial(**changes: object) -> TrialResult:
    fields = {"trial_id": "a-0", "configuration_id": "a", "status": S.PENDING, "config": TrialConfig()}
    return TrialResult.model_validate(fields | {"repeat": 0, "seed": 0} | changes)


@pytest.mark.parametrize("before", TrialStatus)
@pytest.mark.parametrize("after", TrialStatus)
def test_a_status_moves_only_where_it_may(before: TrialStatus, after: TrialStatus) -> None:
    assert (after in MOVES[before]) == ((before, after) in ALLOWED)


@pytest.mark.parametrize("status", TrialStatus)
def test_every_bad_end_must_say_why(status: TrialStatus) -> None:
    if status in (S.PENDING, S.RUNNING, S.COMPLETED):
        assert trial(status=status).reason is None
    else:
        with pytest.raises(ValidationError, match="must say why"):
            trial(status=status)


def test_a_record_of_a_newer_release_is_refused_and_an_unknown_field_is_not() -> None:
    with pytest.raises(ValueError, match="not known to this release"):
        upgrade({"schema_version": 99})
    raw = json.loads(trial().model_dump_json()) | {"field_of_tomorrow": 1}
    assert TrialResult.model_validate(upgrade(raw)) == trial()


def test_damaged_records_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    write_atomically(folder.trial("a-0").result, trial().model_dump_json())
    write_atomically(folder.trial("b-0").result, '{"schema_version": 1, "trial_')
    write_atomically(folder.trial("c-0").result, "[]")
    results, damaged = read_trial_results(folder)
    assert set(results) == {"a-0"}
    assert {record.file.parent.name for record in damaged} == {"b-0", "c-0"}


def test_what_a_killed_writer_left_half_written_goes_with_the_next_write(tmp_path: Path) -> None:
    half, other = tmp_path / ".result.json.4711", tmp_path / ".results.json.4711"
    half.write_text('{"schema_ver')
    other.write_text("")
    write_atomically(tmp_path / "result.json", "{}")
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", other.name}


def test_of_two_who_write_a_file_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, fsync = tmp_path / "result.json", os.fsync

    def overtaken(descriptor: int) -> None:
        fsync(descriptor)
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "getpid", lambda: 4711)
        write_atomically(file, "the other's")

    monkeypatch.setattr(os, "fsync", overtaken)
    write_atomically(file, "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert file.read_text() == "the other's"


def test_a_file_of_holes_is_not_read(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    write_atomically(folder.trial("a-0").result, trial().model_dump_json())
    for file in (folder.trial("b-0").result, folder.trial("a-0").metrics, folder.results_json):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as opened:
            opened.truncate(2**40)
    results, damaged = read_trial_results(folder)
    assert set(results) == {"a-0"}
    assert "larger than 1,024 MiB" in damaged[0].why
    assert folder.trial("a-0").read_metrics() == ()
    with pytest.raises(FolderError, match="larger than"):
        read_sweep(folder)


def test_numbers_that_no_training_measures_spoil_no_report(tmp_path: Path) -> None:
    sweep = made_up_sweep([made_up_trial({"rank": rank}, objective=1e308) for rank in (4, 8, 16)])
    assert all(one.best and one.best.eval_loss == math.inf for one in sweep.trials)
    built = report.build(write_made_up(tmp_path / "sweep", sweep))
    assert "4" in report.render_text(built)
    with pytest.raises(ValidationError, match="less than"):
        trial(timing={"total_s": 1e308})


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 10**400}, {"tokens": -1}, {"repeat": 10**400}, {"gpu_shared_by": 10**400},
        {"last": {"seconds": math.inf}}, {"last": {"seconds": math.nan}}, {"last": {"step": 0}},
        {"last": {"step": 10**400}}, {"last": {"time_ms": -1}}, {"last": {"peak_memory_bytes": 10**400}},
        {"suggestion": {"number": 10**13, "settings": {}}}, {"suggestion": {"number": 0, "settings": {"rank": "abc"}}},
        {"suggestion": {"number": 0, "settings": {"colour": 1}}},
    ],
)  # fmt: skip
def test_a_record_with_what_no_trial_can_have_is_damaged(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder, good = SweepFolder(tmp_path), made_up_trial({"rank": 4})
    raw = json.loads(good.model_dump_json())
    raw |= {key: {**(raw[key] or {}), **value} if isinstance(value, dict) else value for key, value in changes.items()}
    write_atomically(folder.trial(good.trial_id).result, json.dumps(raw))
    results, (damaged,) = read_trial_results(folder)
    assert not results
    assert damaged.file == folder.trial(good.trial_id).result


@pytest.mark.parametrize("name", ["step", "tokens", "peak_memory_bytes", "time_ms"])
def test_a_line_of_a_curve_with_a_number_that_nothing_counts_is_left_out(tmp_path: Path, name: str) -> None:
    trial_folder, good = SweepFolder(tmp_path).trial("a-0"), made_up_point(1, 2.0)
    odd = json.loads(good.model_dump_json()) | {name: 10**400}
    write_atomically(trial_folder.metrics, json.dumps(odd) + "\n" + good.model_dump_json() + "\n")
    assert trial_folder.read_metrics() == (good,)


def test_a_clock_that_was_set_back_measured_no_time() -> None:
    assert trial(timing={"evaluation_s": -1e11}).timing.evaluation_s == 0


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "[" * 100_000, '{"schema_version": 1, "searched": ["colour"]}'])
def test_a_sweep_record_that_is_none_is_told_with_its_file(tmp_path: Path, text: str) -> None:
    folder = SweepFolder(tmp_path)
    write_atomically(folder.results_json, text)
    with pytest.raises(FolderError, match=r"results\.json cannot be read"):
        read_sweep(folder)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"constraints": ["watts <= 3"]}, "this release cannot judge watts <= 3"),
        ({"objectives": [["model_dump", "min"]]}, "model_dump: no such metric"),
        ({"started_ms": -(10**400)}, "started_ms: "),
        ({"run_started_ms": 10**400}, "run_started_ms: "),
    ],
)
def test_a_sweep_record_that_this_release_cannot_judge_says_why(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    folder = write_made_up(tmp_path, made_up_sweep([made_up_trial({"rank": 4})]))
    raw = json.loads(folder.results_json.read_text()) | changes
    write_atomically(folder.results_json, json.dumps(raw))
    with pytest.raises(FolderError, match=rf"results\.json cannot be read \(.*{why}"):
        read_sweep(folder)


def test_money_that_nobody_has_spoils_no_report(tmp_path: Path) -> None:
    costly = made_up_point(100, 2.5).model_dump() | {"cost": 1e308}
    trials = [
        made_up_trial({"rank": 4}, repeat).model_copy(update={"last": MetricPoint.model_validate(costly)})
        for repeat in range(3)
    ]
    sweep = made_up_sweep(trials, objective_metric="cost", constraints=("cost <= 1",))
    assert report.render_text(report.build(write_made_up(tmp_path / "sweep", sweep)))


def test_of_a_damaged_record_the_field_and_the_reason_are_told(tmp_path: Path) -> None:
    folder, raw = SweepFolder(tmp_path), json.loads(trial().model_dump_json())
    write_atomically(folder.trial("a-0").result, json.dumps(raw | {"timing": {"total_s": "soon"}}))
    _, (damaged,) = read_trial_results(folder)
    assert str(damaged).startswith(f"{folder.trial('a-0').result}: timing.total_s: Input should be a valid number")
    assert len(str(damaged).splitlines()) == 1
    proposed = raw | {"suggestion": {"number": 0, "settings": {"rank": "abc"}}}
    write_atomically(folder.trial("a-0").result, json.dumps(proposed))
    _, (damaged,) = read_trial_results(folder)
    assert str(damaged).startswith(f"{folder.trial('a-0').result}: suggestion.settings.rank: Input should be")


def test_a_curve_that_is_a_folder_is_named_as_damaged(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    write_atomically(folder.trial("a-0").result, trial().model_dump_json())
    folder.trial("a-0").metrics.mkdir()
    assert folder.trial("a-0").read_metrics() == ()
    results, damaged = read_trial_results(folder)
    assert set(results) == {"a-0"}
    assert [record.file for record in damaged] == [folder.trial("a-0").metrics]


def test_a_metrics_line_that_is_half_written_is_left_out(tmp_path: Path) -> None:
    trial_folder = SweepFolder(tmp_path).trial("a-0")
    point = MetricPoint(step=1, tokens=10, seconds=0.1, loss=2.0, learning_rate=1e-4, time_ms=5)
    write_atomically(trial_folder.metrics, point.model_dump_json() + "\n" + point.model_dump_json()[:20])
    assert trial_folder.read_metrics() == (point,)


def test_the_newest_point_is_found_at_the_curves_end_which_is_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial_folder = SweepFolder(tmp_path).trial("a-0")
    assert trial_folder.last_point() is None
    lines = [made_up_point(step, 2.0).model_dump_json() for step in range(1, 2001)]
    write_atomically(trial_folder.metrics, "\n".join([*lines, '{"step": -1}', lines[0][:20]]))
    opened, read_bytes = folders.opened, []

    @contextlib.contextmanager
    def watched(file: Path) -> Iterator[BinaryIO]:
        with opened(file) as stream:
            before = stream.read
            stream.read = lambda: read_bytes.append(len(found := before())) or found  # type: ignore[method-assign]
            yield stream

    monkeypatch.setattr(folders, "opened", watched)
    assert trial_folder.last_point() == made_up_point(2000, 2.0)
    assert read_bytes == [folders.CURVES_END_BYTES]
    write_atomically(trial_folder.metrics, lines[0])
    assert trial_folder.last_point() is None
    write_atomically(trial_folder.metrics, lines[0] + "\n")
    assert trial_folder.last_point() == made_up_point(1, 2.0)


def test_metrics_are_read_on_from_where_they_were_and_anew_when_the_trial_began_anew(tmp_path: Path) -> None:
    trial_folder = SweepFolder(tmp_path).trial("a-0")
    points = [MetricPoint(step=i, tokens=i, seconds=i, learning_rate=1e-4, time_ms=i) for i in range(1, 4)]
    lines = [point.model_dump_json() + "\n" for point in points]
    write_atomically(trial_folder.metrics, lines[0] + lines[1][:9])
    first, offset_bytes = trial_folder.read_metrics_from(0)
    write_atomically(trial_folder.metrics, "".join(lines))
    rest, end_bytes = trial_folder.read_metrics_from(offset_bytes)
    assert (first, rest) == ((points[0],), (points[1], points[2]))
    write_atomically(trial_folder.metrics, lines[2])
    assert trial_folder.read_metrics_from(end_bytes)[0] == (points[2],)


def test_a_write_leaves_no_partial_file_behind(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x.json", "1")
    write_atomically(tmp_path / "x.json", "2")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("x.json", "2")]


def test_a_record_of_before_populations_still_loads_and_counts_its_steps_from_the_first() -> None:
    raw = json.loads(trial(status=S.COMPLETED, steps=40).model_dump_json())
    del raw["started_from"]
    old = TrialResult.model_validate(upgrade(raw))
    assert old.started_from is None
    assert old.steps_trained == 40
    new = trial(status=S.COMPLETED, steps=40, started_from={"trial_id": "b-0", "step": 30})
    assert new.steps_trained == 10


def test_a_members_checkpoint_outlasts_the_end_of_its_generation_alone(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    member = {"number": 0, "settings": {}, "generation": 0, "member": 0}
    for suggestion, stays in ((member, True), (None, False)):
        folder.trial("a-0").checkpoint(2).mkdir(parents=True, exist_ok=True)
        write_result(folder, trial(status=S.STOPPED, reason="told", suggestion=suggestion))
        assert folder.trial("a-0").checkpoint(2).exists() == stays


def test_a_file_that_is_given_for_a_sweeps_folder_is_told_as_no_sweep(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("name: a\n", encoding="utf-8")
    with pytest.raises(FolderError, match="holds no sweep: name a folder"):
        read_sweep(SweepFolder(file))
