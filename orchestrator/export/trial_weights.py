"""Which trial is exported, and where its weights lie."""

from __future__ import annotations

import os
import stat
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from orchestrator.errors import InputError, cut
from orchestrator.reporting.recommendation import recommend
from orchestrator.results import remote
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult, TrialResult

Kind = Literal["adapter", "merged", "full"]
"""What an exported folder holds; `full` where the trial trained all weights, so that there is no adapter."""


def choose_trial(sweep: SweepResult, trial_id: str | None) -> tuple[TrialResult, str | None]:
    """The named trial, or the one of the report's answer, with what to say where that is not to take it.

    Raises:
        InputError: there is no such trial, or the report names none.
    """
    known = {trial.trial_id: trial for trial in sweep.trials}
    if trial_id is None:
        answer = recommend(sweep)
        if answer.trial_id is None:
            raise InputError(f"{sweep.name}: {answer.answer} A trial that is named with --trial is exported")
        doubt = f"{answer.answer} It is exported as {answer.called}, and not as recommended"
        return known[answer.trial_id], None if answer.is_recommended else doubt
    if trial_id not in known:
        near = get_close_matches(trial_id, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {_some(list(known))}"
        raise InputError(f"--trial {cut(trial_id)}: {sweep.name} has no such trial; {hint}")
    return known[trial_id], None


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def weights_of(folder: SweepFolder, trial: TrialResult) -> Path:
    """The folder with what the trial trained.

    Raises:
        InputError: it has none, or damaged ones; the reason is told.
    """
    remote.fetch_trial(folder, trial.trial_id)
    root = folder.trial(trial.trial_id).root
    where = root / trial.adapter if trial.adapter else folder.trial(trial.trial_id).adapter
    _require_readable(where)
    if any(where.glob("*.safetensors")):
        if outside := next((file for file in where.iterdir() if not folder.holds(file)), None):
            raise InputError(f"{outside} leads out of the sweep's folder: put the file there, or take the link away")
        _require_whole(where)
        return where
    why = f" ({trial.reason})" if trial.reason else ""
    status = trial.status.value.replace("_", " ")
    raise InputError(
        f"trial {trial.trial_id} has no adapter in {where}: it is {status}{why}, and one is saved at the first "
        "evaluation; name another with --trial"
    )


def _require_whole(weights: Path) -> None:
    from safetensors import SafetensorError, safe_open

    for file in weights.glob("*.safetensors"):
        try:
            # What it says of itself is compared with its length; no weights are read.
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError as error:
            raise InputError(
                f"the adapter in {weights} is damaged ({file.name}: {error}): name another with --trial"
            ) from error


def _require_readable(weights: Path) -> None:
    """What may not be read is not to be taken for what is not there, and a pipe is not waited for."""
    try:
        for file in weights.iterdir():
            descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            os.close(descriptor)
            if not is_file:
                raise InputError(
                    f"the adapter in {weights} is damaged ({file.name} is no file): name another with --trial"
                )
    except PermissionError as error:
        raise InputError(
            f"{error.filename} may not be read by this account: give it the right to, or name another with --trial"
        ) from error
    except OSError:
        # There is none, or no file: what that means is told by what is looked for in it.
        return
