"""What a reader has to know before trusting a sweep's answer: what was left out, what ended, what may be chance."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from orchestrator.config.sweep_config import is_score
from orchestrator.errors import counted
from orchestrator.reporting import quantities
from orchestrator.reporting.effects import measured_trials
from orchestrator.reporting.noise import one_run_words
from orchestrator.reporting.statistics import LOSSES, ConfigurationSummary, differing_micro_batches
from orchestrator.reporting.times import has_run
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus

FEW_STEPS = 20
FEW_ROWS = 30
"""Measured of adapters for builtin:smollm2-135m on 100 rows of builtin:python-docs, cut to 64 tokens: of one row the
loss scatters by 15 to 19 % of the mean, and its difference between two adapters by 0.10 to 0.21 (3 to 7 %). Of 30 rows
that is about 1 % of the loss by the choice of rows alone, and a report counts 1 % as a difference that matters."""


def caveats(
    sweep: SweepResult,
    found: Sequence[ConfigurationSummary],
    completed: Sequence[ConfigurationSummary],
    contenders: Sequence[ConfigurationSummary],
    wild: Collection[str],
) -> list[str]:
    """What else a reader has to know before trusting the answer.

    wild: ids of the configurations that were left out for the scatter of their repeats.
    """
    ran = [trial for trial in sweep.trials if trial.status is TrialStatus.COMPLETED]
    return [
        *_of_its_end(sweep),
        *_of_scores(sweep, ran),
        *_of_rows(sweep, ran),
        *_of_repeats(completed, contenders, wild),
        *_of_chance(sweep, ran, contenders),
        *_of_unlike_trials(sweep, ran),
        *_of_what_ended(sweep, found),
    ]


def _of_its_end(sweep: SweepResult) -> Iterator[str]:
    open_ = sum(trial.status in (TrialStatus.PENDING, TrialStatus.RUNNING) for trial in sweep.trials)
    if open_:
        yield f"{open_} of {len(sweep.trials)} trials have not ended yet: the answer may change."
    if sweep.cut_short:
        yield f"The budget ended the sweep before its last trials, and the answer may change: {sweep.cut_short}."
    if sweep.interrupted:
        yield "The sweep was interrupted before its end: the same command goes on, and the answer may change."


def _of_scores(sweep: SweepResult, ran: Sequence[TrialResult]) -> Iterator[str]:
    for score in filter(is_score, _metrics(sweep)):
        if unscored := [trial for trial in ran if trial.measured(score) is None]:
            there = sorted({name for trial in unscored for name in trial.scores})
            have = f"evaluated for {quantities.some(there)}" if there else "not evaluated"
            yield f"Without {score}, and so not competing: {counted(len(unscored), 'completed trial')}, {have}."


def _of_rows(sweep: SweepResult, ran: Sequence[TrialResult]) -> Iterator[str]:
    losses = sorted(LOSSES & _metrics(sweep).keys())
    if losses and (few := few_rows_words(sweep.eval_rows)):
        yield _sentence(few)
    lengths = sorted({trial.config.sequence_length for trial in ran})
    if len(lengths) > 1 and losses:
        shown = quantities.some([str(length) for length in lengths])
        yield (
            f"Rows are cut to a trial's sequence_length ({shown}), those that it "
            f"is evaluated on too: where they are longer than {lengths[0]} tokens, values of {' and '.join(losses)} at "
            "different lengths stand on different tokens, and cannot be compared."
        )
    if sweep.rows_left_out:
        rows = counted(sweep.rows_left_out, "row")
        yield f"{rows} of the data could not be used: data/summary.json says where and why."
    for told in sweep.rows_too_long:
        yield _sentence(told)


def few_rows_words(eval_rows: int | None) -> str | None:
    """That which rows a loss is of may decide it; None where there are enough, or nobody knows how many."""
    if eval_rows is None or eval_rows >= FEW_ROWS:
        return None
    return (
        f"only {counted(eval_rows, 'row')} to evaluate on: other rows may change the answer, and no ± tells that; hold "
        "more back (data.eval)"
    )


def _metrics(sweep: SweepResult) -> dict[str, None]:
    """What the sweep is judged by, in order."""
    return dict.fromkeys((sweep.objective_metric, *(metric for metric, _ in sweep.objectives)))


def _of_repeats(
    completed: Sequence[ConfigurationSummary], contenders: Sequence[ConfigurationSummary], wild: Collection[str]
) -> Iterator[str]:
    if scattered := [summary.label for summary in completed if summary.configuration_id in wild]:
        yield f"Left out, since their repeats scatter ten times as far as the others': {quantities.some(scattered)}."
    broken = [summary.label for summary in completed if summary.is_broken]
    if broken and not any(summary.is_broken for summary in contenders):
        yield f"Left out, since a repeat of theirs diverged or ran out of memory: {quantities.some(broken)}."
    elif broken:
        those = quantities.some(broken)
        yield f"Every completed configuration also diverged or ran out of memory in a repeat: {those}."
    if early := [summary.label for summary in contenders if summary.counts.get(TrialStatus.STOPPED)]:
        yield (
            f"The scheduler stopped repeats of {quantities.some(early)}: their means stand on the repeats that went "
            "well."
        )


def _of_chance(
    sweep: SweepResult, ran: Sequence[TrialResult], contenders: Sequence[ConfigurationSummary]
) -> Iterator[str]:
    measured = [trial.configuration_id for trial in measured_trials(sweep)]
    if len(set(measured)) == len(measured) > 1:
        yield one_run_words(sweep)
    steps_of = {trial.configuration_id: trial.steps_trained for trial in ran}
    timed = min((steps_of[summary.configuration_id] for summary in contenders), default=FEW_STEPS)
    if timed < FEW_STEPS:
        yield f"Speeds stand on as few as {timed} steps of a trial: differences of a few tens of percent may be chance."


def _of_unlike_trials(sweep: SweepResult, ran: Sequence[TrialResult]) -> Iterator[str]:
    if sizes := differing_micro_batches(sweep, measured_trials(sweep)):
        yield (
            f"Trials ran with several micro_batch_size ({quantities.some([str(size) for size in sizes])}), each chosen "
            'to fit, which changes memory and speed by itself: "all else alike" these are compared at one size alone.'
        )
    devices = {device for trial in ran for device in trial.devices}
    if len(devices) > 1:
        yield f"Trials ran on different devices ({quantities.some(sorted(devices))}): their speeds are not comparable."


def _of_what_ended(sweep: SweepResult, found: Sequence[ConfigurationSummary]) -> Iterator[str]:
    if sweep.search_ended:
        yield _sentence(sweep.search_ended)
    earlier = sum(trial.leaves_checkpoint for trial in sweep.trials)
    if earlier:
        before = counted(earlier, "trial")
        yield f"The last generation competes; {before} of those before ended so that it could begin."
    waited = sum(trial.status is TrialStatus.CANCELLED and not has_run(trial) for trial in sweep.trials)
    if ended := _counts_of_ends(found, earlier, waited):
        yield f"Not in the comparison: {ended}."


def _sentence(told: str) -> str:
    return f"{told[0].upper()}{told[1:]}."


def _counts_of_ends(found: Sequence[ConfigurationSummary], earlier: int, waited: int) -> str:
    words = {
        TrialStatus.STOPPED: "stopped early by the scheduler",
        TrialStatus.INFEASIBLE: "refused before launch",
        TrialStatus.OUT_OF_MEMORY: "out of memory",
        TrialStatus.DIVERGED: "diverged",
        TrialStatus.PREEMPTED: "preempted",
        TrialStatus.FAILED: "failed",
        TrialStatus.CANCELLED: "cancelled" + (f" ({waited} had not begun)" if waited else ""),
    }
    counts = {status: sum(summary.counts.get(status, 0) for summary in found) for status in words}
    counts[TrialStatus.STOPPED] -= earlier
    return ", ".join(f"{count} {words[status]}" for status, count in counts.items() if count)
