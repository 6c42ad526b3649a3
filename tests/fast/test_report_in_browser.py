"""The report in a real browser: quiet, harmless, usable by hand, by keyboard and by screen reader, and printed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.reporting import comparison_report, report
from orchestrator.reporting.comparison import compare
from orchestrator.results.files import write_atomically
from tests.fast.test_report import a_thousand_trials, of_every_status
from tests.made_up_sweep import made_up_plan, simulated, write_made_up

playwright = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
PHONE, DESK = 390, 1280
OPENS_S = 1.0
LIMIT_MS = 90_000
"""What is waited for, on a machine that is busy with other work too."""


@dataclass
class Pages:
    """Files to open."""

    report: Path
    comparison: Path
    thousand: Path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    root = tmp_path_factory.mktemp("sweeps")
    folder = write_made_up(root / "of-every-status", of_every_status())
    write_atomically(folder.plan, made_up_plan(of_every_status()).model_dump_json())
    write_atomically(folder.sweep_file, "name: of-every-status\n")
    other = report.build(
        write_made_up(root / "other", simulated([2.0, 2.1], 2, 0).model_copy(update={"name": "other"}))
    )
    made = report.build(folder)
    thousand = write_made_up(root / "thousand", a_thousand_trials(), evaluations=5)
    write_atomically(folder.report, report.render_html(made))
    write_atomically(folder.comparison, comparison_report.render_html(compare([made, other])))
    write_atomically(thousand.report, report.render_html(report.build(thousand)))
    return Pages(folder.report, folder.comparison, thousand.report)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=list(QUIET))
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a file; at the end the page has neither said nor asked for anything."""
    said: list[str] = []
    contexts = []

    def open_(file: Path, width: int = DESK, theme: str = "light", *, has_script: bool = True) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, java_script_enabled=has_script
        )
        context.set_default_timeout(LIMIT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: None if request.url == file.as_uri() else said.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [told for told in said if not told.startswith("data:")] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_the_page_passes_the_accessibility_checks(opened: Any, pages: Pages, name: str, theme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(opened(getattr(pages, name), theme=theme)).response["violations"]
    told = [f"{v['id']}: {v['help']}: {[node['html'][:200] for node in v['nodes'][:3]]}" for v in found]
    assert told == []


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_nothing_is_wider_than_a_phone(opened: Any, pages: Pages, name: str) -> None:
    page = opened(getattr(pages, name), width=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE


def test_the_table_of_a_search_over_many_settings_is_no_wider_than_a_desk(opened: Any, tmp_path: Path) -> None:
    values = {"alpha": 16.5, "learning_rate": 2.34567e-4, "precision": "amp_bf16", "target_modules": "all-linear"}
    sweep = simulated([2.0, 2.1], 1, 0, configurations=[{"rank": 8, **values}, {"rank": 32, **values}])
    folder = write_made_up(tmp_path, sweep.model_copy(update={"constraints": ("peak_memory_bytes <= 1GiB",)}))
    write_atomically(folder.report, report.render_html(report.build(folder)))
    frame = opened(folder.report).locator(".wide:has(#every)")
    assert frame.evaluate("frame => frame.scrollWidth - frame.clientWidth") == 0


def test_the_table_sorts_by_a_click_and_by_the_keyboard(opened: Any, pages: Pages) -> None:
    page = opened(pages.report)
    column = page.locator("#every thead th", has_text="best eval_loss")
    place = column.evaluate("head => head.cellIndex")

    def values() -> list[float]:
        cells = page.locator(f"#every tbody tr > :nth-child({place + 1})").evaluate_all(
            "cells => cells.map(cell => cell.dataset.v)"
        )
        return [float(value) for value in cells if value]

    column.get_by_role("button").click()
    assert column.get_attribute("aria-sort") == "ascending"
    assert values() == sorted(values())
    page.keyboard.press("Enter")
    assert column.get_attribute("aria-sort") == "descending"
    assert values() == sorted(values(), reverse=True)
    # What has no value stays at the end either way.
    last = page.locator(f"#every tbody tr:last-child > :nth-child({place + 1})")
    assert last.get_attribute("data-v") == ""


def test_the_table_filters_by_what_is_typed(opened: Any, pages: Pages) -> None:
    page = opened(pages.report)
    page.get_by_label("Filter").fill("nf4 completed")
    shown = page.locator("#every tbody tr:visible")
    assert 0 < shown.count() < page.locator("#every tbody tr").count()
    assert all("nf4" in text and "completed" in text for text in shown.all_inner_texts())
    assert page.get_by_role("status").inner_text() == f"{shown.count()} of 40 trials"


def test_without_a_script_every_trial_is_there(opened: Any, pages: Pages) -> None:
    page = opened(pages.report, has_script=False)
    assert page.locator("#every tbody tr:visible").count() == 40
    assert not page.get_by_label("Filter").is_visible()


def test_the_page_prints_on_light_paper_with_all_its_tables(opened: Any, pages: Pages) -> None:
    page = opened(pages.report, theme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert page.locator("details pre").bounding_box()["height"] > 0
    assert page.pdf(format="A4", print_background=True).startswith(b"%PDF")


def test_a_table_of_some_dozens_is_laid_out_before_anybody_scrolls_to_it(opened: Any, pages: Pages) -> None:
    rows = {name: opened(getattr(pages, name)).locator("#every tbody tr") for name in ("report", "thousand")}
    is_drawn = "row => row.checkVisibility({contentVisibilityAuto: true})"
    assert rows["report"].last.evaluate(is_drawn)
    assert not rows["thousand"].last.evaluate(is_drawn)


def test_a_thousand_trials_open_in_a_second(opened: Any, pages: Pages) -> None:
    page = opened(pages.thousand)
    spent = page.context.new_cdp_session(page)
    # The main thread's own time: what else the machine does beside is not the page's.
    spent.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.reload()
    metrics = {metric["name"]: metric["value"] for metric in spent.send("Performance.getMetrics")["metrics"]}
    assert metrics["TaskDuration"] < OPENS_S
    assert page.locator("#every tbody tr").count() == 1000
