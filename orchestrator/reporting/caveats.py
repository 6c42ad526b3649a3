"""What a reader has to know before trusting a sweep's answer: what was left out, what ended, what may be chance."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from orchestrator.config.sweep_config import is_score
from orchestrator.errors import counted
from orchestrator.reporting import quantities
from orchestrator.reporting.effects import measured_trials
from orchestrator.reporting.noise import one_run_words
from orchestrator.reporting.statistics import LOSSES, ConfigurationSummary, differing_micro_batches
from orchestrator.reporting.times import has_run
from orchestrator.results.records import SweepResult, TrialStatus

FEW_STEPS = 20


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
    told = []
    open_ = sum(trial.status in (TrialStatus.PENDING, TrialStatus.RUNNING) for trial in sweep.trials)
    if open_:
        told.append(f"{open_} of {len(sweep.trials)} trials have not ended yet: the answer may change.")
    if sweep.cut_short:
        told.append(f"The budget ended the sweep before its last trials, and the answer may change: {sweep.cut_short}.")
    if sweep.interrupted:
        told.append("The sweep was interrupted before its end: the same command goes on, and the answer may change.")
    ran = [trial for trial in sweep.trials if trial.status is TrialStatus.COMPLETED]
    metrics = dict.fromkeys((sweep.objective_metric, *(metric for metric, _ in sweep.objectives)))
    for score in filter(is_score, metrics):
        if unscored := [trial for trial in ran if trial.measured(score) is None]:
            there = sorted({name for trial in unscored for name in trial.scores})
            have = f"evaluated for {quantities.some(there)}" if there else "not evaluated"
            trials = counted(len(unscored), "completed trial")
            told.append(f"Without {score}, and so not competing: {trials}, {have}.")
    lengths = sorted({trial.config.sequence_length for trial in ran})
    if len(lengths) > 1 and (losses := sorted(LOSSES & metrics.keys())):
        shown = quantities.some([str(length) for length in lengths])
        told.append(
            f"Rows are cut to a trial's sequence_length ({shown}), those that it "
            f"is evaluated on too: where they are longer than {lengths[0]} tokens, values of {' and '.join(losses)} at "
            "different lengths stand on different tokens, and cannot be compared."
        )
    if sweep.rows_left_out:
        rows = counted(sweep.rows_left_out, "row")
        told.append(f"{rows} of the data could not be used: data/summary.json says where and why.")
    steps_of = {trial.configuration_id: trial.steps_trained for trial in ran}
    if scattered := [summary.label for summary in completed if summary.configuration_id in wild]:
        told.append(
            f"Left out, since their repeats scatter ten times as far as the others': {quantities.some(scattered)}."
        )
    broken = [summary.label for summary in completed if summary.is_broken]
    if broken and not any(summary.is_broken for summary in contenders):
        told.append(f"Left out, since a repeat of theirs diverged or ran out of memory: {quantities.some(broken)}.")
    elif broken:
        told.append(
            f"Every completed configuration also diverged or ran out of memory in a repeat: {quantities.some(broken)}."
        )
    early = [s.label for s in contenders if s.counts.get(TrialStatus.STOPPED)]
    if early:
        told.append(
            f"The scheduler stopped repeats of {quantities.some(early)}: their means stand on the repeats that went "
            "well."
        )
    measured = [trial.configuration_id for trial in measured_trials(sweep)]
    if len(set(measured)) == len(measured) > 1:
        told.append(one_run_words(sweep))
    timed = min((steps_of[s.configuration_id] for s in contenders), default=FEW_STEPS)
    if timed < FEW_STEPS:
        told.append(
            f"Speeds stand on as few as {timed} steps of a trial: differences of a few tens of percent may be chance."
        )
    if sizes := differing_micro_batches(sweep, measured_trials(sweep)):
        told.append(
            f"Trials ran with several micro_batch_size ({quantities.some([str(size) for size in sizes])}), each chosen "
            'to fit, which changes memory and speed by itself: "all else alike" these are compared at one size alone.'
        )
    devices = {device for trial in ran for device in trial.devices}
    if len(devices) > 1:
        told.append(
            f"Trials ran on different devices ({quantities.some(sorted(devices))}): their speeds are not comparable."
        )
    if sweep.search_ended:
        told.append(f"{sweep.search_ended[0].upper()}{sweep.search_ended[1:]}.")
    earlier = sum(trial.leaves_checkpoint for trial in sweep.trials)
    if earlier:
        before = counted(earlier, "trial")
        told.append(f"The last generation competes; {before} of those before ended so that it could begin.")
    waited = sum(trial.status is TrialStatus.CANCELLED and not has_run(trial) for trial in sweep.trials)
    ended = _counts_of_ends(found, earlier, waited)
    if ended:
        told.append(f"Not in the comparison: {ended}.")
    return told


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
