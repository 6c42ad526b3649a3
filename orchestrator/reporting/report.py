"""A sweep's answer with its evidence: as text, as JSON, and as one self-contained page."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import Any

from orchestrator.config.constraint import parse
from orchestrator.config.storage_address import is_remote
from orchestrator.reporting import charts, cost_charts, effect_charts, quantities
from orchestrator.reporting.findings import (
    Report,
    behind_text,
    build,
    objective_text,
    reasons,
    trial_snippet,
)
from orchestrator.reporting.pages import plain, render_page, status_words
from orchestrator.reporting.recommendation import RULE
from orchestrator.reporting.samples import samples_of
from orchestrator.reporting.statistics import (
    ConfigurationSummary,
    broken_by,
    differing_micro_batches,
    label,
    objective_of,
    sign_of,
)
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import TrialStatus

__all__ = ["Report", "build", "render_html", "render_json", "render_text"]

TEXT_ROWS = 40
PAGE_ROWS = 60
LAID_OUT_ROWS = 300
"""So many a page lays out as it opens; a picture of a whole page shows only what is laid out."""
QUANTISED_MODEL = "builtin:smollm2-135m"


def render_text(report: Report) -> str:
    """The answer for a terminal."""
    answer = report.recommendation
    lines = [
        report.sweep.question or report.sweep.name,
        "",
        answer.answer,
        *(f"  - {line}" for line in answer.evidence),
    ]
    lines += [f"  - damaged: {record.file} ({_first_line(record.why)})" for record in report.damaged]
    lines += ["", *_table(report)]
    for status, reason, names in reasons(report):
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(f"{status_words(status)}: {shown}: {_first_line(reason)}")
    if snippet := trial_snippet(report):
        lines += ["", f"{answer.called} ({answer.label}):", *(f"  {line}" for line in snippet.rstrip().splitlines())]
    if report.adapter:
        lines.append(f"  adapter: {report.adapter}")
    return "\n".join([*lines, "", _closing(report)])


def _first_line(text: str) -> str:
    return text.splitlines()[0][:300] if text else text


def _table(report: Report) -> list[str]:
    metric, answer = report.sweep.objective_metric, report.recommendation
    rows = [("", "configuration", "trials", metric, "behind the best", "tokens/s", "step", "memory", "predicted")]
    several = differing_micro_batches(report.sweep, report.sweep.trials)
    bounds = _memory_bounds(report)
    for summary in report.summaries[:TEXT_ROWS]:
        marked = "*" if answer.is_recommended and summary.configuration_id == answer.configuration_id else ""
        states = ", ".join(f"{summary.counts[s]} {status_words(s)}" for s in TrialStatus if summary.counts.get(s))
        states += f" (breaks {' and '.join(summary.breaks)})" if summary.breaks else ""
        rows.append(
            (
                marked,
                _named(summary) if several else summary.label,
                states,
                objective_text(summary),
                behind_text(report, summary),
                quantities.rate(summary.tokens_per_s),
                quantities.step_time(summary.step_time_s),
                quantities.memory(summary.peak_memory_bytes, bounds),
                quantities.memory(summary.predicted_memory_bytes),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < 5 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    if len(report.summaries) > TEXT_ROWS:
        lines.append(f"… {len(report.summaries) - TEXT_ROWS} more configurations in results.csv")
    if report.sweep.constraints:
        lines.append(f"constraints: {', '.join(report.sweep.constraints)}")
    return [*lines, ""]


def _memory_bounds(report: Report) -> list[float]:
    constraints = map(parse, report.sweep.constraints)
    return [constraint.bound for constraint in constraints if constraint.metric == "peak_memory_bytes"]


def _named(summary: ConfigurationSummary) -> str:
    """Its label, with the micro-batch that was chosen, where others have another."""
    return f"{summary.label} (micro-batch {' or '.join(map(str, summary.micro_batch_sizes)) or 'not chosen'})"


def _closing(report: Report) -> str:
    counts = ", ".join(f"{count} {status_words(status)}" for status, count in report.counts.items())
    times = report.times
    told = f"{report.trials_told} ({counts}), {report.state}, {quantities.duration(times.wall_s)}"
    if report.sweep.earlier_runs_s:
        told += " without the pauses between its runs"
    if times.training_share is not None:
        told += f"; {quantities.share(times.training_share)} of the trials' time was training"
    return told


def render_json(report: Report) -> str:
    """Every figure, for scripts."""
    trials = [
        {**trial.model_dump(mode="json"), "label": label(trial, report.sweep.searched)} for trial in report.sweep.trials
    ]
    whole = {
        "schema_version": 1,
        **report.sweep.model_dump(mode="json", exclude={"trials", "schema_version"}),
        "state": report.state,
        "rule": RULE,
        "recommendation": {**asdict(report.recommendation), "adapter": str(report.adapter) if report.adapter else None},
        "counts": report.counts,
        "configurations": [
            {
                **asdict(summary),
                "is_on_pareto_front": summary.configuration_id in report.front.configuration_ids,
                "plateau": asdict(level) if (level := report.plateaus.get(summary.configuration_id)) else None,
            }
            for summary in report.summaries
        ],
        "pareto_front": asdict(report.front),
        "effects": [asdict(effect) for effect in report.effects],
        "importances": report.importances,
        "times": {**asdict(report.times), "training_share": report.times.training_share},
        "against_plan": [asdict(outlay) for outlay in report.outlays],
        "trials": trials,
        "curves": {trial_id: _every_step(report, trial_id) for trial_id in report.curves},
        "damaged": [{"file": str(record.file), "why": record.why} for record in report.damaged],
    }
    return json.dumps(plain(whole), indent=1, ensure_ascii=False, allow_nan=False)


def _every_step(report: Report, trial_id: str) -> list[tuple[int, float | None, float | None]]:
    points = SweepFolder(report.folder).trial(trial_id).read_metrics()
    return [(point.step, point.loss, point.eval_loss) for point in points]


def render_html(report: Report) -> str:
    """One file that needs no network and no script to be read."""
    return render_page("report.html.jinja", _page(report))


def _page(report: Report) -> dict[str, Any]:
    sweep, answer = report.sweep, report.recommendation
    recommended = answer.configuration_id if answer.is_recommended else None
    kind = next((t.peak_memory.kind for t in sweep.trials if t.peak_memory), "resident")
    parts = cost_charts.parts_of(report.plan, report.summaries)
    metric = sweep.objective_metric
    costs = [
        cost_charts.memory_chart(report.summaries, parts, kind),
        cost_charts.speed_chart(report.summaries),
        *cost_charts.pareto_charts(sweep, report.summaries, report.front, recommended),
    ]
    settings = [
        effect_charts.importance_chart(metric, report.importances),
        *effect_charts.effect_charts(metric, report.effects),
        *effect_charts.response_charts(sweep.searched, report.summaries),
    ]
    sign = sign_of(sweep)
    values = {trial.trial_id: objective_of(sweep, trial) for trial in sweep.trials}
    return {
        "report": report,
        "sweep": sweep,
        "answer": answer,
        "rule": RULE,
        "snippet": trial_snippet(report),
        "curves": charts.loss_curves(sweep, report.summaries, report.curves),
        "costs": [figure for figure in costs if figure],
        "parts": [(s, parts[s.configuration_id]) for s in report.summaries[:PAGE_ROWS] if s.configuration_id in parts],
        "part_styles": cost_charts.PART_STYLES,
        "effect_table": effect_charts.effect_table(metric, report.effects),
        "setting_figures": [figure for figure in settings if figure],
        "configurations": [(s, objective_text(s), behind_text(report, s)) for s in report.summaries],
        "has_micro_batches": bool(differing_micro_batches(sweep, sweep.trials)),
        "has_repeats": any(len(summary.objective_by_repeat) > 1 for summary in report.summaries),
        "most": PAGE_ROWS,
        "laid_out": LAID_OUT_ROWS,
        "trials": sorted(sweep.trials, key=lambda t: _place(values[t.trial_id], sign)),
        "objective": values,
        "memory_bounds": _memory_bounds(report),
        "broken_by": lambda trial: broken_by(sweep, [trial]),
        "reasons": reasons(report),
        "statuses": list(TrialStatus),
        "samples": samples_of(sweep, SweepFolder(report.folder)),
        "environment": _environment(report),
        "repeat": _repeat(report),
        "quantised": sweep.model == QUANTISED_MODEL,
    }


def _place(value: float | None, sign: int) -> tuple[bool, float]:
    return value is None, sign * (value or 0.0)


def _repeat(report: Report) -> str:
    """The lines that run the same sweep again, with what it ran on."""
    trials = report.sweep.trials
    versions = dict(sorted({item for trial in trials for item in trial.versions.items() if item[0] != "python"}))
    told = {trial.git.commit for trial in trials if trial.git}
    lines = [f"# in the repository that it was run in, at commit {commit}" for commit in sorted(told)]
    if own := versions.pop("orchestrator", None):
        lines.append(f"# with orchestrator {own}")
    # A build of one's own, as `2.13.0+cpu`, is in no public index under that name.
    lines += [f"# {name} was the build {version}" for name, version in versions.items() if "+" in version]
    if versions:
        public = [f"{name}=={version.partition('+')[0]}" for name, version in versions.items()]
        lines.append(f"pip install {' '.join(public)}")
    file = report.sweep_file_at
    if is_remote(file):
        lines.append(f"# with {file} copied here")
        file = "sweep.yaml"
    return "\n".join([*lines, f"orchestrator run {shlex.quote(file)} --name {report.sweep.name}-again"])


def _rows_words(report: Report) -> str:
    train, held_out = report.sweep.train_rows, report.sweep.eval_rows
    known = train is not None and held_out is not None
    return f"{train} to train on, {held_out} to evaluate on" if known else quantities.UNKNOWN


def _environment(report: Report) -> list[tuple[str, str]]:
    trials = report.sweep.trials
    versions = {f"{name} {version}" for trial in trials for name, version in trial.versions.items()}
    git = {f"{t.git.commit[:12]}{' with uncommitted changes' if t.git.dirty else ''}" for t in trials if t.git}
    rows = [
        ("model", [report.sweep.model]),
        ("rows", [_rows_words(report)]),
        ("data hash", [report.sweep.data_hash or quantities.UNKNOWN]),
        ("hosts", sorted({host for trial in trials for host in trial.hosts})),
        ("devices", sorted({device for trial in trials for device in trial.devices})),
        ("commit of the repository it was run in", sorted(git)),
        ("versions", sorted(versions)),
        ("sweep id", [report.sweep.sweep_id]),
        ("MLflow run", [report.sweep.mlflow_run_id or quantities.UNKNOWN]),
        ("folder", [str(report.folder.absolute())]),
    ]
    return [(name, ", ".join(values) or quantities.UNKNOWN) for name, values in rows]
