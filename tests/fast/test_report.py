"""The report: what it says, that it is one harmless file, and that it can be made of any folder at any time."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from filelock import FileLock

from orchestrator.errors import FolderError
from orchestrator.planning.plan import SweepPlan
from orchestrator.reporting import charts, quantities, report
from orchestrator.reporting.cost_charts import PART_STYLES, memory_chart, parts_of
from orchestrator.reporting.curves import mean_curves, plateaus, value_curves
from orchestrator.reporting.findings import behind_text, trial_snippet
from orchestrator.reporting.plot import BOTTOM, HEIGHT, TOP, Axis, Dot, Line, is_cut, ticks, xy_plot
from orchestrator.reporting.recommendation import recommend
from orchestrator.reporting.status import render_status
from orchestrator.reporting.times import Outlay, against_plan, times_of
from orchestrator.results.files import write_atomically
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import PeakMemory, SweepResult, Timing, TrialStatus
from tests.made_up_sweep import (
    START_MS,
    made_up_plan,
    made_up_point,
    made_up_sweep,
    made_up_trial,
    simulated,
    write_made_up,
)

pytest.importorskip("jinja2")
pytest.importorskip("scipy")

VOID = {"meta", "link", "input", "br", "wbr"}
HOSTILE = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Reads a page, and fails on tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def of_every_status() -> SweepResult:
    statuses = list(TrialStatus)
    settings = [{"rank": 2 ** (i + 1), "precision": p} for i in range(len(statuses)) for p in ("bf16", "nf4")]
    return simulated(
        [2.0 + i / 50 for i in range(len(settings))],
        2,
        0,
        configurations=settings,
        status_of=lambda place, repeat: statuses[place // 2] if place < 18 else TrialStatus.COMPLETED,
    )


def a_thousand_trials() -> SweepResult:
    settings = [{"rank": 1 + i % 250, "weight_decay": i // 250 / 10} for i in range(1000)]
    return simulated([2 + i % 97 / 97 for i in range(1000)], 1, 0, configurations=settings)


def built(tmp_path: Path, sweep: SweepResult) -> report.Report:
    return report.build(write_made_up(tmp_path / "sweep", sweep), now_s=START_MS / 1000 + 60)


def test_the_text_has_the_answer_the_table_the_reasons_and_what_to_take(tmp_path: Path) -> None:
    text = report.render_text(built(tmp_path, simulated([2.1, 2.0, 1.998], 3, 2, noise_sd=0.003)))
    lines = text.splitlines()
    assert lines[0] == "How high a LoRA rank pays for itself?"
    assert lines[2].startswith("Take rank=8: it is within ")
    assert [line.split()[0] for line in lines if re.match(r"^[* ]  rank=", line)].count("*") == 1
    assert "    rank: 8" in lines
    assert "seed" not in text
    assert "sweep/trials/" in text
    assert text.endswith("of the trials' time was training")


def test_where_it_is_too_early_to_tell_nothing_is_called_recommended(tmp_path: Path) -> None:
    cut_off = made_up_trial({"rank": 16}, status=TrialStatus.CANCELLED, objective=2.2)
    early = built(tmp_path, made_up_sweep([made_up_trial({"rank": 8}), cut_off], interrupted=True))
    text, page = report.render_text(early), report.render_html(early)
    assert "completed so far (rank=8):" in text
    assert "\n*" not in text
    assert ">Completed so far</h2>" in page
    assert '<span class="tag">completed so far</span>' in page
    assert "recommended" not in text + page
    assert "Take this" not in page
    assert json.loads(report.render_json(early))["recommendation"]["basis"] == "too_early"


def test_constraints_stand_at_the_table_and_what_breaks_one_says_so_though_it_has_not_completed(
    tmp_path: Path,
) -> None:
    heavy, waits = (made_up_trial({"rank": rank}, status=TrialStatus.CANCELLED, memory_bytes=size)
                    for rank, size in ((128, 3 * 2**30), (64, None)))  # fmt: skip
    kept = ("peak_memory_bytes <= 2GiB", "tokens_per_s >= 1")
    made = built(tmp_path, made_up_sweep([made_up_trial({"rank": 8}), heavy, waits], constraints=kept))
    text, page = report.render_text(made), Page(report.render_html(made)).text
    assert "\nconstraints: peak_memory_bytes <= 2GiB, tokens_per_s >= 1\n" in text
    assert [line.split()[0] for line in text.splitlines() if "(breaks " in line] == ["rank=128"]
    assert "1 cancelled (breaks peak_memory_bytes <= 2GiB)  " in text
    assert "Only what keeps the constraints competes: peak_memory_bytes <= 2GiB, tokens_per_s >= 1." in page
    # In the table of configurations, and in that of trials.
    assert page.count("breaks peak_memory_bytes <= 2GiB") == 2
    assert "constraints: " not in report.render_text(built(tmp_path, made_up_sweep([made_up_trial({"rank": 8})])))


def test_what_lies_off_the_front_says_so_in_place_of_how_far_it_is_behind(tmp_path: Path) -> None:
    values = {8: (2.0, 2**31), 16: (2.1, 2**30), 32: (2.2, 2**31), 64: (1.9, 2**33)}
    trials = [made_up_trial({"rank": rank}, objective=loss, memory_bytes=size) for rank, (loss, size) in values.items()]
    objectives = (("eval_loss", "min"), ("peak_memory_bytes", "min"))
    made = built(tmp_path, made_up_sweep(trials, objectives=objectives, constraints=("peak_memory_bytes <= 4GiB",)))
    behind = {summary.label: behind_text(made, summary) for summary in made.summaries}
    assert behind == {"rank=8": "", "rank=16": "0.1000", "rank=32": "off the front", "rank=64": ""}
    one = built(tmp_path, made_up_sweep(trials))
    assert all("front" not in behind_text(one, summary) for summary in one.summaries)


def test_where_the_budget_ended_the_sweep_its_answer_is_for_now_and_says_what_was_not_used(tmp_path: Path) -> None:
    why = "budget.hours is used up: run the same command again; not used: 9 of budget.trials 14"
    sweep = simulated([2.1, 2.0], 1, 0).model_copy(update={"cut_short": why})
    made = built(tmp_path, sweep)
    text, page, figures = report.render_text(made), report.render_html(made), json.loads(report.render_json(made))
    assert "Take rank=8 for now: " in text
    for told in (text, Page(page).text, "\n".join(figures["recommendation"]["evidence"])):
        assert f"The budget ended the sweep before its last trials, and the answer may change: {why}." in told
    assert (figures["cut_short"], figures["state"]) == (why, "out of budget")
    assert "2 trials (2 completed), out of budget, " in text
    assert "2 trials · out of budget" in page


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_spread_is_told_where_there_are_repeats_and_never_one_over_other_settings(
    tmp_path: Path, repeats: int
) -> None:
    settings = [{"rank": rank, "zero_stage": stage} for rank in (8, 32) for stage in (0, 2)]
    # Stages come to the same loss.
    sweep = simulated([2.1, 2.1, 2.0, 2.0], repeats, 0, noise_sd=0, configurations=settings)
    made = built(tmp_path, sweep)
    page = Page(report.render_html(made)).text
    for text in (page, report.render_text(made)):
        assert bool(re.search(r"\d ± \d", text)) is (repeats > 1)
    assert ("nothing has a ±" in page) is (repeats == 1)
    ranks = made.effects[0].values
    assert [value.objective and value.objective.half_width for value in ranks] == [None, None]


def test_every_end_is_told_with_its_reason(tmp_path: Path) -> None:
    text = report.render_text(built(tmp_path, of_every_status()))
    for words in ("refused: rank=", "out of memory: rank=", "diverged: rank=", "failed: rank=", "stopped: rank="):
        assert words in text
    assert "have not ended yet" in text


def test_rows_that_were_left_out_are_told_and_one_trial_is_one(tmp_path: Path) -> None:
    too_long = ("at sequence_length 32 2 of 9 rows to train on cannot be used",)
    sweep = simulated([2.0], 1, 0).model_copy(update={"rows_left_out": 3, "rows_too_long": too_long})
    text = report.render_text(built(tmp_path, sweep))
    assert "At sequence_length 32 2 of 9 rows to train on cannot be used." in text
    assert "3 rows of the data could not be used: data/summary.json says where and why." in text
    assert "\n1 trial (1 completed), ended" in text


@pytest.mark.parametrize(("rows", "is_few"), [(1, True), (29, True), (30, False), (None, False)])
def test_that_few_rows_were_evaluated_is_told_where_a_loss_is_the_objective(rows: int | None, is_few: bool) -> None:
    sweep = simulated([2.0, 2.1], 2, 0).model_copy(update={"eval_rows": rows})
    told = [line for line in recommend(sweep).evidence if "to evaluate on" in line]
    assert bool(told) is is_few
    assert all(line.startswith(f"Only {rows} row") and "no ± tells that" in line for line in told)
    by_speed = sweep.model_copy(update={"objective_metric": "tokens_per_s", "objective_mode": "max"})
    assert not any("to evaluate on" in line for line in recommend(by_speed).evidence)


def test_a_report_names_files_by_paths_that_hold_wherever_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "my sweeps"
    sweep = simulated([2.0, 2.1], 1, 0)
    folder = write_made_up(storage / "sweep", sweep)
    write_atomically(folder.sweep_file, "name: made-up\n")
    monkeypatch.chdir(storage)
    made = report.build(SweepFolder(Path("sweep")))
    adapter = storage / "sweep" / "trials" / (made.recommendation.trial_id or "") / "adapter"
    page = Page(report.render_html(made)).text
    for told in (page, report.render_text(made), report.render_json(made)):
        assert str(adapter) in told
    # Not the sweep.yaml of the working directory, which may be another sweep's.
    assert f"orchestrator run '{storage}/sweep/sweep.yaml' --name made-up-again" in page
    assert "folder" + str(storage / "sweep") in page.replace("\n", "")


def test_a_sweep_in_an_object_store_is_repeated_with_the_file_that_lies_there(tmp_path: Path) -> None:
    write_made_up(tmp_path / "copy", simulated([2.0, 2.1], 1, 0))
    page = Page(report.render_html(report.build(SweepFolder(tmp_path / "copy", "s3://bucket/sweeps/made-up")))).text
    assert "# with s3://bucket/sweeps/made-up/sweep.yaml copied here\norchestrator run sweep.yaml --name" in page


def test_the_rows_are_told_on_the_page_and_in_json_and_that_a_spread_is_of_the_seeds(tmp_path: Path) -> None:
    made = built(tmp_path, simulated([2.0, 2.1], 2, 0).model_copy(update={"train_rows": 360, "eval_rows": 40}))
    page, figures = Page(report.render_html(made)).text, json.loads(report.render_json(made))
    assert "360 to train on, 40 to evaluate on" in page
    assert "It is of the seeds alone: all trials are evaluated on the same rows" in page
    assert (figures["train_rows"], figures["eval_rows"]) == (360, 40)


def test_the_page_is_well_formed_and_asks_for_nothing(tmp_path: Path) -> None:
    html = report.render_html(built(tmp_path, of_every_status()))
    page = Page(html)
    assert page.count("svg") > 4
    asked = [attrs.get(name) for _, attrs in page.tags for name in ("src", "href", "action", "data", "srcset")]
    assert all(address.startswith(("#", "data:")) for address in asked if address)
    assert "url(" not in html
    assert "@import" not in html
    assert set(re.findall(r"https?://[^\"' <]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in html
    anchors = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert anchors <= {f"#{attrs.get('id')}" for _, attrs in page.tags}


def test_the_page_is_valid_html(tmp_path: Path) -> None:
    parser = pytest.importorskip("html5lib").HTMLParser(strict=True)
    parser.parse(report.render_html(built(tmp_path, of_every_status())))
    assert parser.errors == []


def test_every_drawing_is_xml_with_a_title_and_a_description(tmp_path: Path) -> None:
    html = report.render_html(built(tmp_path, of_every_status()))
    drawings = re.findall(r"<svg xmlns.*?</svg>", html, flags=re.DOTALL)
    assert drawings
    for drawing in drawings:
        tree = ElementTree.fromstring(drawing)
        assert [child.tag.rpartition("}")[2] for child in tree][:2] == ["title", "desc"]
        assert "nan" not in drawing


def test_every_trial_is_in_the_page_without_a_script(tmp_path: Path) -> None:
    sweep = of_every_status()
    text = Page(report.render_html(built(tmp_path, sweep)).split("<script>")[0] + "</body></html>").text
    assert all(trial.trial_id in text for trial in sweep.trials)
    assert "needs 27.1 GiB of 24.0 GiB" in text


def test_hostile_names_are_harmless(tmp_path: Path) -> None:
    trial = made_up_trial({"target_modules": (HOSTILE,)}, status=TrialStatus.FAILED, reason=HOSTILE)
    fine = made_up_trial({"target_modules": (HOSTILE, "q")})
    sweep = made_up_sweep(
        [trial.model_copy(update={"hosts": (HOSTILE,), "devices": (HOSTILE,), "notes": (HOSTILE,)}), fine],
        searched=("target_modules",),
        name=HOSTILE,
        question=HOSTILE,
        model=HOSTILE,
    )
    folder = write_made_up(tmp_path / "sweep", sweep)
    write_atomically(folder.sweep_file, f"name: {HOSTILE}\n")
    html = report.render_html(report.build(folder))
    page = Page(html)
    assert page.count("script") == 1
    assert "<script>alert" not in html
    assert HOSTILE in page.text


def test_credentials_in_addresses_are_not_shared(tmp_path: Path) -> None:
    failed = made_up_trial({"rank": 8}, status=TrialStatus.FAILED, reason="no answer from https://me:hunter2@host/x")
    folder = write_made_up(tmp_path / "sweep", made_up_sweep([failed]))
    write_atomically(folder.sweep_file, "tracking: {uri: 'https://me:hunter2@mlflow.example'}\n")
    made = report.build(folder)
    html = report.render_html(made)
    assert "hunter2" not in html + report.render_text(made)
    assert "https://mlflow.example" in html


@pytest.mark.timeout(30)
def test_a_thousand_trials_are_reported_in_seconds(tmp_path: Path) -> None:
    folder = write_made_up(tmp_path / "sweep", a_thousand_trials(), evaluations=5)
    started = time.process_time()
    html = report.render_html(report.build(folder))
    assert time.process_time() - started < 8
    assert len(html) < 2_000_000
    assert html.count('class="line') < 400


def test_a_report_keeps_of_each_curve_its_evaluations_and_its_json_has_every_step(tmp_path: Path) -> None:
    """All steps of 10,000 trials with 1,000 each would take 16 GB of the driver that writes it."""
    trial = made_up_trial({"rank": 4}, steps=40)
    folder = write_made_up(tmp_path, made_up_sweep([trial]))
    points = [made_up_point(step, 2.0 if step % 10 == 0 else None) for step in range(1, 41)]
    folder.trial(trial.trial_id).metrics.write_text("".join(f"{point.model_dump_json()}\n" for point in points))
    made = report.build(folder)
    assert [point.step for point in made.curves[trial.trial_id]] == [10, 20, 30, 40]
    told = json.loads(report.render_json(made))["curves"][trial.trial_id]
    assert told == [[point.step, point.loss, point.eval_loss] for point in points]


def test_the_json_has_every_figure_and_is_strict(tmp_path: Path) -> None:
    sweep = of_every_status()

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    raw = json.loads(report.render_json(built(tmp_path, sweep)), parse_constant=refuse)
    assert len(raw["trials"]) == len(sweep.trials)
    assert raw["recommendation"]["label"]
    assert raw["recommendation"]["adapter"].endswith("/adapter")
    assert sum(raw["counts"].values()) == len(sweep.trials)
    assert {effect["setting"] for effect in raw["effects"]} == {"rank", "precision"}
    assert raw["times"]["wall_s"] == 3600


def test_losses_that_are_no_numbers_break_nothing(tmp_path: Path) -> None:
    sweep = made_up_sweep([made_up_trial({"rank": 8}, objective=float("nan")), made_up_trial({"rank": 16})])
    made = built(tmp_path, sweep)
    assert made.recommendation.label == "rank=16"
    json.loads(report.render_json(made))
    Page(report.render_html(made))
    report.render_text(made)


@pytest.mark.parametrize(
    "sweep",
    [
        made_up_sweep([]),
        made_up_sweep([made_up_trial({"rank": 8})], searched=(), question=None),
        made_up_sweep([made_up_trial({"rank": 8}, status=TrialStatus.PENDING)], started_ms=None, ended_ms=None),
        made_up_sweep([made_up_trial({"rank": 8}, memory_bytes=None, step_time_s=None)]),
        made_up_sweep([made_up_trial({"rank": r}, status=TrialStatus.INFEASIBLE) for r in (8, 16)]),
    ],
    ids=["no trial", "no space", "nothing started", "nothing measured", "all refused"],
)
def test_a_sweep_with_little_in_it_can_be_reported(tmp_path: Path, sweep: SweepResult) -> None:
    made = built(tmp_path, sweep)
    Page(report.render_html(made))
    assert report.render_text(made)
    json.loads(report.render_json(made))


def test_a_running_sweep_says_so_and_counts_to_now(tmp_path: Path) -> None:
    sweep = simulated([2.0, 2.1], 2, 0, status_of=lambda place, repeat: list(TrialStatus)[1 + (repeat == 0)])
    folder = write_made_up(tmp_path / "sweep", sweep.model_copy(update={"ended_ms": None}))
    with FileLock(folder.lock):
        made = report.build(folder, now_s=START_MS / 1000 + 60)
    assert (made.state, made.times.wall_s) == ("not ended", 60)
    assert "2 of 4 trials have not ended yet" in report.render_html(made)


def test_the_time_of_a_sweep_that_was_killed_ends_with_its_last_sign_of_life(tmp_path: Path) -> None:
    killed = simulated([2.0, 2.1], 1, 0).model_copy(update={"ended_ms": None})
    folder = write_made_up(tmp_path / "sweep", killed)
    # The kernel freed its lock. Its last evaluation was at step 100, half a second each.
    folder.lock.touch()
    assert [report.build(folder, START_MS / 1000 + hours * 3600).times.wall_s for hours in (1, 9)] == [50, 50]


def test_damaged_records_are_named_and_taken_from_the_summary(tmp_path: Path) -> None:
    sweep = simulated([2.0, 2.1], 1, 0)
    folder = write_made_up(tmp_path / "sweep", sweep)
    broken = folder.trial(sweep.trials[0].trial_id).result
    broken.write_text("{", encoding="utf-8")
    made = report.build(folder)
    assert str(broken) in report.render_text(made)
    assert str(broken) in report.render_html(made)
    assert json.loads(report.render_json(made))["damaged"][0]["file"] == str(broken)
    assert len(made.summaries) == 2
    assert made.counts == {TrialStatus.COMPLETED: 2}
    for text in (report.render_text(made), report.render_html(made), render_status(folder)):
        assert "; told from results.json" in text
        assert "left out" not in text


def test_a_damaged_record_that_is_in_no_summary_is_left_out(tmp_path: Path) -> None:
    folder = write_made_up(tmp_path / "sweep", simulated([2.0, 2.1], 1, 0))
    write_atomically(folder.trial("stray-0").result, "{")
    folder.plan.mkdir()
    text = report.render_text(report.build(folder))
    assert f"{folder.plan} (Is a directory; left out)" in text
    assert "; left out" in next(line for line in text.splitlines() if "stray-0" in line)


def test_a_folder_of_which_the_summary_alone_is_lost_is_told_how_to_rebuild_it(tmp_path: Path) -> None:
    folder = write_made_up(tmp_path / "sweep", simulated([2.0, 2.1], 1, 0))
    folder.sweep_file.write_text("name: sweep\n", encoding="utf-8")
    folder.results_json.unlink()
    with pytest.raises(FolderError, match=r"results\.json is lost, and the trials are there: run the sweep again"):
        report.build(folder)


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="holds no sweep"):
        report.build(SweepFolder(tmp_path))


def test_what_a_sweep_ran_with_can_be_installed_from_a_public_index(tmp_path: Path) -> None:
    versions = {"python": "3.11.9", "orchestrator": "0.1.0", "torch": "2.13.0+cpu", "peft": "0.21.2"}
    trial = made_up_trial({"rank": 8}).model_copy(update={"versions": versions})
    page = report.render_html(built(tmp_path, made_up_sweep([trial])))
    told = ["# with orchestrator 0.1.0", "# torch was the build 2.13.0+cpu", "pip install peft==0.21.2 torch==2.13.0"]
    assert "\n".join([*told, "orchestrator run "]) in Page(page).text


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    folder = write_made_up(tmp_path / "sweep", of_every_status())
    assert report.render_html(report.build(folder)) == report.render_html(report.build(folder))


def test_the_small_builtin_model_is_said_to_be_dequantised(tmp_path: Path) -> None:
    sweep = made_up_sweep([made_up_trial({"rank": 8})], model="builtin:smollm2-135m")
    assert "dequantised from 4 bits" in report.render_html(built(tmp_path, sweep))


def test_the_snippet_is_a_trial_that_a_sweep_file_takes(tmp_path: Path) -> None:
    import yaml

    from orchestrator.config.trial_config import TrialConfig

    settings = {"rank": 8, "target_modules": ("q_proj",), "learning_rate": 3e-5, "zero_stage": 1}
    made = built(tmp_path, made_up_sweep([made_up_trial(settings)]))
    snippet = trial_snippet(made)
    assert snippet is not None
    assert TrialConfig(**yaml.safe_load(snippet)["trial"]) == TrialConfig(**settings)


@pytest.mark.parametrize(("rank", "loader"), [(8, "PeftModel"), ("full", "AutoModelForCausalLM")])
def test_the_page_says_how_to_load_the_best_weights(tmp_path: Path, rank: int | str, loader: str) -> None:
    assert f"{loader}.from_pretrained" in report.render_html(
        built(tmp_path, made_up_sweep([made_up_trial({"rank": rank})]))
    )


def test_the_memory_of_each_part_adds_up_to_what_was_predicted(tmp_path: Path) -> None:
    made = built(tmp_path, simulated([2.0, 2.1], 2, 0))
    folder = SweepFolder(made.folder)
    write_atomically(folder.plan, made_up_plan(made.sweep).model_dump_json())
    made = report.build(folder)
    parts = parts_of(made.plan, made.summaries)
    assert {sum(sizes.values()) for sizes in parts.values()} == {s.predicted_memory_bytes for s in made.summaries}
    page = report.render_html(made)
    assert "activations 256 MiB" in page
    assert "1.00 GiB measured" in page


def test_a_bar_without_parts_says_why_it_has_none(tmp_path: Path) -> None:
    sweep = simulated([2.0, 2.1], 1, 0)
    folder = write_made_up(tmp_path / "sweep", sweep)
    plan = made_up_plan(sweep)
    for known, is_told in ((plan.trials, False), (plan.trials[:1], True)):
        write_atomically(folder.plan, plan.model_copy(update={"trials": known}).model_dump_json())
        page = report.render_html(report.build(folder))
        assert ("predicted, without parts" in page) is is_told
        assert ("it knows none of what a search proposed later" in page) is is_told


def test_the_table_of_settings_has_no_empty_columns(tmp_path: Path) -> None:
    drawn = [{"rank": rank, "alpha": alpha} for rank, alpha in ((4, 8), (8, 24), (16, 64))]
    searched = report.render_html(built(tmp_path / "search", simulated([2.0, 2.1, 2.2], 1, 0, configurations=drawn)))
    grid = report.render_html(built(tmp_path / "grid", simulated([2.0, 2.1, 2.2], 2, 0)))
    for heading in ("change from the first that has pairs", "seeds", "change from the value before", "memory", "speed"):
        assert f">{heading}</th>" in grid
        assert f">{heading}</th>" not in searched
    assert ">mean eval_loss</th>" in searched


def test_time_and_money_stand_beside_the_plan(tmp_path: Path) -> None:
    sweep = simulated([2.0, 2.1], 2, 0)
    folder = write_made_up(tmp_path / "sweep", sweep)
    write_atomically(folder.plan, made_up_plan(sweep).model_dump_json())
    write_atomically(folder.sweep_file, "budget: {price_per_gpu_hour: 3.0}\n")
    made = report.build(folder)
    outlays = {outlay.what: outlay for outlay in made.outlays}
    assert outlays["from start to end"].actual == 3600
    assert outlays["from start to end"].planned == (100, 200, 300)
    hours = made.times.worker_s * 2 / 3600
    assert outlays["GPU-hours of the trials"].actual == pytest.approx(hours)
    assert outlays["cost of the trials"].actual == pytest.approx(3 * hours)
    assert outlays["a completed trial's time over the plan's, median"].actual == pytest.approx(2)
    page = report.render_html(made)
    assert "Against the plan" in page
    assert "without the pauses between its runs" in page


def test_against_the_plan_attempts_before_the_last_count_and_examples_do_not(tmp_path: Path) -> None:
    sweep = simulated([2.0, 2.1], 2, 0)
    first = sweep.trials[0]
    lost = first.model_copy(update={"timing": first.timing.model_copy(update={"earlier_s": 1800.0})})
    resumed = sweep.model_copy(update={"trials": (lost, *sweep.trials[1:])})
    plan = made_up_plan(sweep)

    def outlays(plan: SweepPlan, sweep: SweepResult) -> dict[str, Outlay]:
        return {one.what: one for one in against_plan(sweep, plan, times_of(sweep, 0), 3.0)}

    before, after = outlays(plan, sweep), outlays(plan, resumed)
    # Two GPUs for half an hour.
    assert after["GPU-hours of the trials"].actual == pytest.approx(before["GPU-hours of the trials"].actual + 1)
    assert after["cost of the trials"].actual == pytest.approx(before["cost of the trials"].actual + 3)
    assert before["trials run"].actual == 4
    assert "trials run" not in outlays(plan.model_copy(update={"proposed_by": "tpe"}), sweep)


def test_trials_that_were_cancelled_before_they_began_have_not_run(tmp_path: Path) -> None:
    sweep = simulated([2.0, 2.1], 2, 0)
    cancelled = {"status": TrialStatus.CANCELLED, "reason": "interrupted"}
    cut, waited = (trial.model_copy(update=cancelled) for trial in sweep.trials[:2])
    waited = waited.model_copy(update={"steps": 0, "timing": Timing()})
    ended = sweep.model_copy(update={"trials": (cut, waited, *sweep.trials[2:])})
    outlays = {one.what: one for one in against_plan(ended, made_up_plan(sweep), times_of(ended, 0), None)}
    assert outlays["trials run"].actual == 3
    assert "Not in the comparison: 2 cancelled (1 had not begun)." in built(tmp_path, ended).recommendation.evidence


def test_a_plan_that_cannot_be_read_is_named_and_left_out(tmp_path: Path) -> None:
    folder = write_made_up(tmp_path / "sweep", simulated([2.0, 2.1], 1, 0))
    write_atomically(folder.plan, "{")
    made = report.build(folder)
    assert made.plan is None
    assert str(folder.plan) in report.render_html(made)


def test_the_parts_of_the_time_add_up(tmp_path: Path) -> None:
    timing = Timing(startup_s=5, model_s=5, training_s=20, evaluation_s=5, total_s=40)
    trial = made_up_trial({"rank": 8}).model_copy(update={"timing": timing})
    times = built(tmp_path, made_up_sweep([trial])).times
    assert times.worker_s == sum(times.parts_s.values()) == 40
    assert times.parts_s["other"] == 5
    assert times.training_share == 0.5


def test_bands_leave_out_what_a_seed_does_to_all_configurations_alike(tmp_path: Path) -> None:
    made = built(tmp_path, simulated([2.0, 2.1, 2.2], 4, 0, noise_sd=1e-6, seed_sd=0.5))
    (figure,) = charts.loss_curves(made.sweep, made.summaries, made.curves)
    assert figure.svg.count('class="band') == 3
    band = re.search(r'class="band s0[^"]*" d="M([^"]+)Z"', figure.svg)
    assert band
    heights = [float(point.split()[1]) for point in band[1].split("L")]
    half = len(heights) // 2
    assert heights[:half] == pytest.approx(heights[half:][::-1], abs=0.2)


def of_two_repeats(apart: float) -> SweepResult:
    """Seeds that the two configurations answer differently, by `apart`."""
    pairs = [(rank, repeat, 2.0 + apart * ((rank == 4) == (repeat == 0))) for rank in (4, 8) for repeat in (0, 1)]
    return made_up_sweep([made_up_trial({"rank": rank}, repeat, objective=loss) for rank, repeat, loss in pairs])


def test_the_band_of_two_repeats_is_the_whole_interval_though_it_is_wider_than_they_are_apart(tmp_path: Path) -> None:
    made = built(tmp_path, of_two_repeats(0.01))
    (figure,) = charts.loss_curves(made.sweep, made.summaries, made.curves)
    step, low, high = mean_curves(made.sweep, made.summaries, made.curves)[0].band[-1]
    # Levelled they are 0.01 apart; of two configurations Morey's correction is 2, and t is 12.706.
    half_width = 12.706 * 0.01 / 2 * math.sqrt(2)
    assert (step, high - low) == (100, pytest.approx(2 * half_width, rel=1e-4))
    assert "with its 95 % interval by Student's t, without the shift that a seed gives all" in figure.caption
    assert "beyond" not in figure.caption


def test_a_band_that_would_press_the_curves_flat_is_cut_at_the_drawings_edge_and_said_to_be(tmp_path: Path) -> None:
    made = built(tmp_path, of_two_repeats(0.3))
    (figure,) = charts.loss_curves(made.sweep, made.summaries, made.curves)
    heights = [
        [float(point.split()[1]) for point in path.split("L")]
        for path in re.findall(r'class="line s[^"]*" d="M([^"]+)"', figure.svg)
    ]
    assert len(heights) == 2
    assert min(map(max, heights)) - max(map(min, heights)) > (HEIGHT - TOP - BOTTOM) / 2
    bands = re.findall(r'class="band s[^"]*" d="M([^"]+)Z"', figure.svg)
    edges = [float(point.split()[1]) for band in bands for point in band.split("L")]
    assert min(edges) == pytest.approx(TOP)
    assert max(edges) == pytest.approx(HEIGHT - BOTTOM)
    assert "a band that reaches the edge of the drawing goes on beyond it" in figure.caption


def test_a_band_leaves_the_drawing_where_its_edge_does(tmp_path: Path) -> None:
    line = Line(((0.0, 0.0), (10.0, 1.0)), "l", "s0", ((0.0, 0.0, 0.0), (10.0, -100.0, 1.0)))
    (band,) = re.findall(r'class="band[^"]*" d="M([^"]+)Z"', xy_plot("t", "s", Axis("x"), Axis("y"), [line]))
    assert is_cut([line])
    corners = [tuple(map(float, point.split())) for point in band.split("L")]
    (leaves,) = [x for x, y in corners if y == HEIGHT - BOTTOM and x < max(x for x, _ in corners)]
    left, right = min(x for x, _ in corners), max(x for x, _ in corners)
    # Of a height of 100 the frame shows 0.25, and a twentieth of what is shown.
    assert (leaves - left) / (right - left) == pytest.approx((0.25 + 0.05 * 1.25) / 100, abs=1e-3)


def test_of_many_configurations_the_mean_of_each_value_is_drawn_with_its_band(tmp_path: Path) -> None:
    settings = [{"rank": rank, "zero_stage": stage} for rank in (8, 16, 32) for stage in (0, 1, 2, 3)]
    truth = [2.0 + s["rank"] / 100 for s in settings]
    made = built(tmp_path, simulated(truth, 3, 0, configurations=settings))
    by_rank, by_stage = charts.loss_curves(made.sweep, made.summaries, made.curves)
    for figure, values in ((by_rank, 3), (by_stage, 4)):
        assert figure.svg.count(' mean"') == 2 * values  # a line and its band
        assert figure.svg.count('class="line rest"') == len(settings)
    (first, *_), combinations = value_curves(made.sweep, "rank", made.curves)
    assert combinations == 4
    last = [t.best.eval_loss for t in made.sweep.trials if t.config.rank == 8 and t.best and t.best.eval_loss]
    assert first.points[-1][1] == pytest.approx(sum(last) / len(last))


def test_a_values_mean_curve_is_that_of_the_combinations_which_all_values_completed(tmp_path: Path) -> None:
    """ASHA left rank 32 its best learning rate alone: over whatever completed it would look the best."""
    settings = [{"rank": rank, "learning_rate": rate} for rank in (2, 8, 32) for rate in (1e-4, 1e-3, 1e-2)]
    stopped = {(32, 1e-4), (32, 1e-3), (8, 1e-4)}
    sweep = simulated(
        [2.0 + s["rank"] / 100 - s["learning_rate"] * 50 for s in settings],
        2,
        0,
        noise_sd=0,
        configurations=settings,
        status_of=lambda place, _: (
            TrialStatus.STOPPED if tuple(settings[place].values()) in stopped else TrialStatus.COMPLETED
        ),
    )
    made = built(tmp_path, sweep)
    means, combinations = value_curves(made.sweep, "rank", made.curves)
    assert combinations == 1
    ends = [mean.points[-1][1] for mean in means]
    assert [end - ends[0] for end in ends] == pytest.approx([0.0, 0.06, 0.3])
    by_rank, _ = charts.loss_curves(made.sweep, made.summaries, made.curves)
    assert "over 1 combination of the other settings that completed with every one of them" in by_rank.caption


def test_where_a_value_was_always_stopped_its_configurations_are_drawn(tmp_path: Path) -> None:
    settings = [{"rank": rank, "precision": p} for p in ("bf16", "nf4") for rank in (2, 4, 8, 16, 32)]
    sweep = simulated(
        [2.0] * 10,
        1,
        0,
        configurations=settings,
        status_of=lambda place, _: TrialStatus.STOPPED if place >= 5 else TrialStatus.COMPLETED,
    )
    made = built(tmp_path, sweep)
    assert value_curves(made.sweep, "precision", made.curves) == ((), 0)
    _, by_precision = charts.loss_curves(made.sweep, made.summaries, made.curves)
    assert "precision nf4" in {key.label for key in by_precision.keys}


def test_a_curve_that_still_falls_has_not_levelled_off(tmp_path: Path) -> None:
    sweep = simulated([2.0, 2.0], 2, 0, noise_sd=0)
    flat = tuple(made_up_point(step, 2.0 + (1 if step < 40 else 0.001)) for step in range(10, 101, 10))
    falling = tuple(made_up_point(step, 3.0 - step / 100) for step in range(10, 101, 10))
    curves = {t.trial_id: flat if t.config.rank == 4 else falling for t in sweep.trials}
    level = plateaus(sweep, curves)
    first, second = (level[sweep.trials[i].configuration_id] for i in (0, 1))
    assert first.levelled_off_at_step == 40
    assert second.levelled_off_at_step is None
    assert second.late_fall.mean == pytest.approx(0.3)
    assert "has not levelled off" in report.render_text(built(tmp_path, sweep))


def told_of_curves(tmp_path: Path, curves: Sequence[Mapping[int, float]]) -> str:
    """What the report says of one configuration whose repeats were evaluated so: step → eval_loss."""
    sweep = simulated([2.0], len(curves), 0)
    folder = write_made_up(tmp_path / "sweep", sweep)
    for trial, curve in zip(sweep.trials, curves, strict=True):
        lines = [made_up_point(step, loss).model_dump_json() for step, loss in curve.items()]
        folder.trial(trial.trial_id).metrics.write_text("\n".join(lines) + "\n")
    return next(line for line in report.build(folder).recommendation.evidence if "curve" in line)


def test_how_much_a_curve_still_fell_names_the_steps_between_which_it_did(tmp_path: Path) -> None:
    falling = {step: 4.0 - step / 100 for step in range(20, 101, 20)}
    told = told_of_curves(tmp_path, [falling])
    assert told.startswith("Its curve has not levelled off: eval_loss still fell by 0.4000 between step 60 and 100, so")


def test_a_fall_that_may_be_noise_is_not_told_as_one(tmp_path: Path) -> None:
    steps = range(20, 101, 20)
    curves = [{step: 4.0 - slope * step / 100 for step in steps} for slope in (0.1, 0.3)]
    told = told_of_curves(tmp_path, curves)
    assert told == (
        "Whether its curve has levelled off cannot be told: eval_loss changed by −0.08 ± 0.51 between step 60 and 100."
    )


def test_what_repeats_were_not_both_evaluated_at_does_not_tell_of_their_fall(tmp_path: Path) -> None:
    falling = {step: 4.0 - step / 100 for step in range(10, 101, 10)}
    gap = {step: loss for step, loss in falling.items() if step != 70}
    assert "between step 60 and 100" in told_of_curves(tmp_path, [falling, gap])


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        # As they were measured: 1.7 % in all, and more than a quarter of that since step 25.
        ([6.775, 6.742, 6.716, 6.703, 6.692, 6.684, 6.676, 6.668, 6.661], None),
        ([6.775, 6.720, 6.690, 6.670, 6.664, 6.662, 6.662, 6.661, 6.661], 20),
        # What hardly fell at all ends in the noise of evaluations.
        ([6.664, 6.660, 6.663, 6.659, 6.662, 6.660, 6.662, 6.660, 6.661], 5),
    ],
)
def test_a_curve_that_fell_little_is_level_only_against_its_own_fall(losses: list[float], step: int | None) -> None:
    (trial,) = (sweep := simulated([2.0], 1, 0)).trials
    curve = tuple(made_up_point(5 * place, loss) for place, loss in enumerate(losses, 1))
    assert plateaus(sweep, {trial.trial_id: curve})[trial.configuration_id].levelled_off_at_step == step


def test_memory_that_breaks_a_bound_does_not_read_like_memory_that_keeps_it(tmp_path: Path) -> None:
    mib = 2**20
    trials = [made_up_trial({"rank": rank}, memory_bytes=int(size * mib)) for rank, size in ((4, 454.8), (8, 455.3))]
    trials.append(made_up_trial({"rank": 16}, memory_bytes=400 * mib))
    sweep = made_up_sweep(trials, constraints=("peak_memory_bytes <= 455MiB",))
    made = report.build(write_made_up(tmp_path / "sweep", sweep))
    for told in (report.render_text(made), report.render_html(made)):
        assert "454.8 MiB" in told
        assert "455.3 MiB" in told
        assert "400 MiB" in told


def test_a_curve_that_rose_is_told_by_how_much_and_not_by_less_than_nothing(tmp_path: Path) -> None:
    sweep = simulated([2.0, 2.0], 2, 0, noise_sd=0)
    folder = write_made_up(tmp_path / "sweep", sweep)
    for trial in sweep.trials:
        rising = [made_up_point(step, 2.0 + (step / 100) ** 2).model_dump_json() for step in range(10, 101, 10)]
        folder.trial(trial.trial_id).metrics.write_text("\n".join(rising) + "\n")
    told = " ".join(report.render_text(report.build(folder)).split())
    assert "Its curve has not settled: eval_loss rose by 0." in told


@pytest.mark.parametrize(
    ("value", "words"),
    [(1234.0, "1234"), (9999.7, "10000"), (-9999.7, "−10000"), (999.96, "1000"), (123.45, "123.5"), (2.5, "2.500")],
)
def test_a_number_has_four_digits_and_no_bare_point_nor_exponent(value: float, words: str) -> None:
    assert quantities.number(value) == words


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, (0, 2, 4, 6, 8, 10)), (2.03, 2.11, (2.04, 2.06, 2.08, 2.1)), (5, 5, (5,)), (-1, 1, (-1, -0.5, 0, 0.5, 1))],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: tuple[float, ...]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_that_are_too_long_for_their_columns_take_two_rows() -> None:
    names = ["0.0001 to 0.000253", "0.000283 to 0.000566", "0.000823 to 0.00792", "0.00894 to 0.063"]
    axis = Axis("learning_rate", lambda place: names[int(place)], (0.0, 1.0, 2.0, 3.0))
    svg = xy_plot("t", "s", axis, Axis("y"), dots=[Dot((0.0, 1.0), "dot")])
    assert ">0.000283 to</text>" in svg
    assert ">0.000566</text>" in svg
    assert ">0.00894 to 0.063</text>" in svg


def test_a_legend_tells_the_range_that_a_colour_stands_for(tmp_path: Path) -> None:
    made = built(tmp_path, simulated([2.0] * 12, 1, 0, configurations=[{"rank": rank} for rank in range(1, 13)]))
    (figure,) = charts.loss_curves(made.sweep, made.summaries, made.curves)
    assert [key.label for key in figure.keys] == ["rank 1 to 3", "rank 4 to 6", "rank 7 to 9", "rank 10 to 12"]


def test_memory_without_parts_has_a_colour_that_no_part_has_and_a_running_trial_is_not_said_to_be_none(
    tmp_path: Path,
) -> None:
    ends = ((8, TrialStatus.RUNNING), (16, TrialStatus.PENDING), (32, TrialStatus.FAILED))
    trials = [made_up_trial({"rank": rank}, status=status) for rank, status in ends]
    trials = [
        t.model_copy(update={"peak_memory": PeakMemory(predicted_bytes=2**30, kind="cuda_allocated")}) for t in trials
    ]
    figure = memory_chart(built(tmp_path, made_up_sweep(trials)).summaries, {}, "cuda_allocated")
    assert figure
    assert figure.keys[0].style.removesuffix(" bar") not in PART_STYLES.values()
    for words in ("rank=8: not measured yet", "rank=16: not run", "rank=32: not measured"):
        assert f"<title>{words}</title>" in figure.svg


def test_labels_do_not_lie_on_each_other() -> None:
    dots = [Dot((1 + i / 1000, 2.0), f"dot {i}", "s0", "a label of some length") for i in range(5)]
    svg = xy_plot("t", "s", Axis("x"), Axis("y"), [Line(((1.0, 1.0), (3.0, 3.0)), "l")], dots)
    assert 1 <= svg.count("a label of some length") < 5


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.84, "0.84 s"),
        (42, "42 s"),
        (200, "3 min 20 s"),
        (3840, "1 h 04 min"),
        (59.7, "1 min 00 s"),
        (200_000, "2 d 07 h"),
        (None, "–"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float | None, words: str) -> None:
    assert quantities.duration(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.084, "84 ms"), (0.9994, "999 ms"), (0.9996, "1 s"), (1.324, "1.32 s"), (999.6, "1000 s"), (1234, "1234 s")],
)
def test_a_steps_time_has_no_exponent(seconds: float, words: str) -> None:
    assert quantities.step_time(seconds) == words


@pytest.mark.parametrize(
    ("mean", "half_width", "words"),
    [
        (2.41312, 0.0123, "2.413 ± 0.012"),
        (0.004, 0.006, "0.0040 ± 0.0060"),
        (-0.1, None, "−0.1000"),
        (-0.004, 0.25, "0.00 ± 0.25"),
        (1234.5, 20, "1234 ± 20"),
    ],
)
def test_the_half_width_decides_how_many_digits_a_mean_has(mean: float, half_width: float | None, words: str) -> None:
    assert quantities.plus_minus(mean, half_width) == words


def test_the_micro_batch_is_told_where_each_configuration_was_given_its_own(tmp_path: Path) -> None:
    sizes = {8: 4, 16: 4, 32: 1}
    trials = [made_up_trial({"rank": rank, "micro_batch_size": size}) for rank, size in sizes.items()]
    made = built(tmp_path, made_up_sweep(trials))
    assert "rank=32 (micro-batch 1)" in report.render_text(made)
    assert report.render_html(made).count(">micro-batch</th>") == 2
    alike = built(tmp_path / "alike", made_up_sweep(trials[:2]))
    assert "micro-batch" not in report.render_text(alike)
    assert ">micro-batch</th>" not in report.render_html(alike)
