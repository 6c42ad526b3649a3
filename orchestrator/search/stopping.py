"""Who is stopped early: rules that hear every evaluation and say why a trial should go no further.

A rule's state is what it has heard and said. After an interruption it hears the curves on disk again, with what it said
then, and decides on as if there had been none.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import itemgetter
from statistics import fmean, median
from typing import Protocol

from orchestrator.results.ties import as_good_as


@dataclass(frozen=True, slots=True)
class Heard:
    """One evaluation of one trial."""

    trial_id: str
    configuration_id: str
    at: float
    """Optimizer steps, tokens or seconds of training: what the scheduler counts."""
    value: float | None
    """Lower is better; None where it is no number."""
    end: float
    """Where the trial ends if nobody stops it, counted as `at`."""


class StopRule(Protocol):
    """Decides about one evaluation after the other."""

    def hear(self, heard: Heard) -> str | None:
        """Why the trial should stop, or None."""

    def recall(self, heard: Heard, said: str | None) -> None:
        """Hear again what this was said to before an interruption; it may have come in another order then."""


@dataclass(frozen=True, slots=True)
class Recalled:
    """An evaluation on disk."""

    time_ms: int
    heard: Heard
    is_answered: bool
    """False where the sweep may have been cut off before a rule heard of it."""
    said: str | None
    """Why the rule stopped the trial then; None where it did not."""


class Halving:
    """Asynchronous successive halving. Source: Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning.

    At its first evaluation at or past a rung a configuration is compared with all that came there before it, each by
    its best evaluation so far, which is what counts of a trial in the end: a bad moment loses nothing. One of `factor`
    goes on, rounded up, since who is stopped is lost for good; ties do, and so does the first. Its repeats follow it:
    all of a configuration go on, or none. A value that is no number is stopped and takes no place in a rung. (Tune's
    own ASHA compares the last values, and lets a trial without a number run: ray 2.60.0.)

    Past half of its way nobody is stopped: what that saves is less than what was spent, and of proposals that are all
    good the best may be the one that rises late (docs/decisions/0004-adaptive-search.md).
    """

    def __init__(self, grace: float, factor: int, unit: str) -> None:
        self._grace, self._factor, self._unit = grace, factor, unit
        self._falls: dict[str, list[tuple[float, float]]] = {}
        self._rungs: dict[int, list[float]] = {}
        self._verdicts: dict[tuple[int, str], str | None] = {}

    def hear(self, heard: Heard) -> str | None:
        """Judge at the highest rung that the evaluation has reached."""
        if heard.value is None:
            return no_number(heard, self._unit)
        return self._verdict(heard, heard.value, self._judge)

    def recall(self, heard: Heard, said: str | None) -> None:
        """Its configuration's place in the rung, and the verdict of then."""
        if heard.value is not None:
            self._verdict(heard, heard.value, lambda *_: said)

    def _verdict(
        self, heard: Heard, value: float, judge: Callable[[list[float], float, Heard], str | None]
    ) -> str | None:
        best = self._best(heard, value)
        if heard.at < self._grace:
            return None
        rung = _rung(heard.at / self._grace, self._factor)
        if (rung, heard.configuration_id) not in self._verdicts:
            there = self._rungs.setdefault(rung, [])
            bisect.insort(there, best)
            self._verdicts[rung, heard.configuration_id] = judge(there, best, heard)
        return self._verdicts[rung, heard.configuration_id]

    def _best(self, heard: Heard, value: float) -> float:
        """Of the trial so far; of a trial that begins anew what it had beyond here is forgotten."""
        falls = self._falls.setdefault(heard.trial_id, [])
        while falls and falls[-1][0] >= heard.at:
            falls.pop()
        if not falls or value < falls[-1][1]:
            falls.append((heard.at, value))
        return falls[-1][1]

    def _judge(self, there: list[float], value: float, heard: Heard) -> str | None:
        better = bisect.bisect_left(there, value, key=as_good_as)
        if better < math.ceil(len(there) / self._factor) or heard.at > heard.end / 2:
            return None
        return f"{better} of {len(there)} configurations were better at {heard.at:g} {self._unit}"


class Hyperband:
    """Successive halving in brackets that begin later and later, for settings that show their worth late.

    Source: Li et al. 2018, Hyperband; asynchronous as in Li et al. 2020. A configuration's bracket follows from its
    name, so that it is the same after an interruption; each bracket gets `factor` times fewer than the one before.
    """

    def __init__(self, grace: float, factor: int, brackets: int, unit: str) -> None:
        self._factor = factor
        self._brackets = [Halving(grace * factor**bracket, factor, unit) for bracket in range(brackets)]

    def hear(self, heard: Heard) -> str | None:
        """Judge in the configuration's own bracket."""
        return self._brackets[self.bracket_of(heard.configuration_id)].hear(heard)

    def recall(self, heard: Heard, said: str | None) -> None:
        """In the same bracket."""
        self._brackets[self.bracket_of(heard.configuration_id)].recall(heard, said)

    def bracket_of(self, configuration_id: str) -> int:
        """The bracket that its name falls into."""
        place = int.from_bytes(hashlib.sha256(configuration_id.encode()).digest()[:4], "big") / 2**32
        shares = [self._factor**-bracket for bracket in range(len(self._brackets))]
        passed = 0.0
        for bracket, share in enumerate(shares):
            passed += share / sum(shares)
            if place < passed:
                return bracket
        return len(shares) - 1


class Median:
    """A trial whose best value is worse than the median of the others' means so far is stopped.

    Source: Golovin et al. 2017, Google Vizier, section 3.2.2.
    """

    def __init__(self, grace: float, min_trials: int, unit: str) -> None:
        self._grace, self._min_trials, self._unit = grace, min_trials, unit
        self._curves: dict[str, list[tuple[float, float]]] = {}
        self._means: dict[str, list[float]] = {}
        """Of each curve up to each of its evaluations: every evaluation is compared with all other trials."""

    def hear(self, heard: Heard) -> str | None:
        """Compare with all that came as far."""
        if heard.value is None:
            return no_number(heard, self._unit)
        curve = self._note(heard, heard.value)
        if heard.at < self._grace:
            return None
        others = [
            self._means[trial_id][bisect.bisect_right(other, heard.at, key=itemgetter(0)) - 1]
            for trial_id, other in self._curves.items()
            if trial_id != heard.trial_id and other[-1][0] >= heard.at and other[0][0] <= heard.at
        ]
        best = min(value for _, value in curve)
        if len(others) < self._min_trials or best <= as_good_as(median(others)):
            return None
        return f"its best was worse than the median of {len(others)} others at {heard.at:g} {self._unit}"

    def recall(self, heard: Heard, said: str | None) -> None:  # noqa: ARG002
        """Its state is the curves: what was judged then is not judged anew, which takes a look at every other trial."""
        if heard.value is not None:
            self._note(heard, heard.value)

    def _note(self, heard: Heard, value: float) -> list[tuple[float, float]]:
        curve = continued(self._curves, heard, value)
        before = self._means.get(heard.trial_id, [])[: len(curve) - 1]
        self._means[heard.trial_id] = [*before, fmean(seen for _, seen in curve)]
        return curve


class Together:
    """Lets a rule that judges trials judge configurations: the repeat that is ahead is judged, and the rest follow it.

    So a finalist has all its seeds. Halving does so by itself.
    """

    def __init__(self, rule: StopRule) -> None:
        self._rule = rule
        self._passed: dict[str, float] = {}
        self._stopped: dict[str, tuple[float, str]] = {}

    def hear(self, heard: Heard) -> str | None:
        """The rule's verdict, or the one on the repeat that was here before."""
        verdict = self._rule.hear(heard)
        return verdict if heard.value is None else self._of_all(heard, verdict)

    def recall(self, heard: Heard, said: str | None) -> None:
        """And the configuration's verdict of then."""
        self._rule.recall(heard, said)
        if heard.value is not None:
            self._of_all(heard, said)

    def _of_all(self, heard: Heard, verdict: str | None) -> str | None:
        configuration = heard.configuration_id
        if configuration in self._stopped:
            at, reason = self._stopped[configuration]
            return reason if heard.at >= at else None
        if heard.at <= self._passed.get(configuration, -math.inf):
            return None
        if verdict:
            self._stopped[configuration] = (heard.at, verdict)
        else:
            self._passed[configuration] = heard.at
        return verdict


def no_number(heard: Heard, unit: str) -> str:
    """Why a trial without an objective goes no further."""
    return f"its objective was no number at {heard.at:g} {unit}"


def continued(curves: dict[str, list[tuple[float, float]]], heard: Heard, value: float) -> list[tuple[float, float]]:
    """The trial's curve with this evaluation; a trial that begins anew, as after an interruption, has a new one."""
    curve = [(at, seen) for at, seen in curves.get(heard.trial_id, []) if at < heard.at]
    curves[heard.trial_id] = [*curve, (heard.at, value)]
    return curves[heard.trial_id]


def replay(rule: StopRule, evaluations: Iterable[Recalled]) -> None:
    """Let a rule hear again what is on disk, in the order of the workers' clocks, and what it said to that.

    Workers that evaluate in the same moment may have been heard in another order: judged anew, who was stopped then
    might go on now, and its repeats with it.
    """
    for one in sorted(evaluations, key=lambda one: one.time_ms):
        if one.is_answered:
            rule.recall(one.heard, one.said)
        else:
            rule.hear(one.heard)


def _rung(ratio: float, factor: int) -> int:
    """The highest n of which factor^n is reached."""
    rung = 0
    while factor ** (rung + 1) <= ratio:
        rung += 1
    return rung
