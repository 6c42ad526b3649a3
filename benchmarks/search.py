"""How much training each search needs to come within 1 % of the best configuration of a table of real curves.

    python -m benchmarks.search --seeds 20

Every search runs over the same table (`benchmarks/data/search_curves.csv`, made by `benchmarks/search_curves.py`), two
trials at a time on a simulated clock in which a step takes one unit: what is proposed, when it is stopped and what is
told back is decided by the real code, and only the training is looked up.

- grid: every configuration to its end, in random order.
- random+asha: Ray Tune's own `ASHAScheduler` with random search, without replacement.
- optuna: Optuna's `TPESampler` and a pruner of its own, successive halving or (its default) the median, as they come.
- tpe+asha and so on: this package's search and rules.

Training is counted in steps, as a share of what the grid takes. A search that does not get there within the grid's
steps counts as the whole grid (1.0).
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from benchmarks.search_curves import FILE, GRID, STEPS, Curve, curves
from benchmarks.sweeps import describe, machine, say, table
from orchestrator.config.search_space import Space, domains
from orchestrator.search.extrapolation import Extrapolation
from orchestrator.search.observation import Observation, Standing
from orchestrator.search.stopping import Halving, Heard, StopRule
from orchestrator.search.suggest import next_settings

Key = tuple[float, ...]
Table = dict[Key, Curve]
GRACE, FACTOR, SLOTS, WITHIN = 3, 3, 2, 0.01


class Search(Protocol):
    """What is compared."""

    def propose(self) -> Key | None:
        """The next configuration; None where there is none any more."""

    def goes_on(self, trial: int, step: int, value: float) -> bool:
        """Whether a trial trains on after this evaluation."""

    def end(self, trial: int) -> None:
        """A trial has ended or was stopped."""


@dataclass
class Ours:
    """This package's search with its rules."""

    algorithm: str
    rules: list[StopRule]
    seed: int
    keys: list[Key] = field(default_factory=list)
    seen: dict[int, Curve] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    space: dict[str, Any] = field(default_factory=lambda: domains(Space.model_validate(GRID)))

    def propose(self) -> Key | None:
        known = [self._observation(number) for number in range(len(self.keys))]
        settings = next_settings(self.algorithm, self.space, {}, [], (), known, self.seed)
        if settings is None:
            return None
        self.keys.append(tuple(float(settings[name]) for name in GRID))
        return self.keys[-1]

    def goes_on(self, trial: int, step: int, value: float) -> bool:
        self.seen.setdefault(trial, []).append((step, value))
        heard = Heard(str(trial), str(trial), step, value, STEPS)
        reasons = [rule.hear(heard) for rule in self.rules]
        return not any(reasons)

    def end(self, trial: int) -> None:
        self.ended.add(trial)

    def _observation(self, number: int) -> Observation:
        settings = {name: type(GRID[name][0])(v) for name, v in zip(GRID, self.keys[number], strict=True)}
        if number not in self.ended:
            return Observation(number, settings, Standing.OPEN)
        best, curve = math.inf, []
        for step, value in self.seen[number]:
            best = min(best, value)
            curve.append((step, best))
        standing = Standing.WHOLE if curve[-1][0] == STEPS else Standing.PARTIAL
        return Observation(number, settings, standing, (tuple(curve),))


class Random:
    """Random search without replacement; under Ray Tune's ASHA where `stops`."""

    def __init__(self, keys: list[Key], seed: int, *, stops: bool) -> None:
        self._waiting = random.Random(seed).sample(keys, len(keys))
        self._asha: Any = None
        if stops:
            from ray.tune.schedulers import ASHAScheduler

            self._asha = ASHAScheduler(
                time_attr="step", metric="loss", mode="min", grace_period=GRACE, reduction_factor=FACTOR, max_t=10**9
            )
        self._count = 0

    def propose(self) -> Key | None:
        if not self._waiting:
            return None
        if self._asha:
            self._asha.on_trial_add(None, SimpleNamespace(trial_id=self._count))
        self._count += 1
        return self._waiting.pop()

    def goes_on(self, trial: int, step: int, value: float) -> bool:
        if not self._asha:
            return True
        result = {"step": step, "loss": value}
        return bool(self._asha.on_trial_result(None, SimpleNamespace(trial_id=trial), result) == "CONTINUE")

    def end(self, trial: int) -> None:
        pass


class Optuna:
    """Optuna's TPE with one of its pruners."""

    def __init__(self, pruner: str, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=GRACE, reduction_factor=FACTOR)
        self._study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=halving if pruner == "halving" else optuna.pruners.MedianPruner(),
        )
        self._trials: list[Any] = []
        self._best: dict[int, float] = {}
        self._pruned: set[int] = set()

    def propose(self) -> Key | None:
        trial = self._study.ask()
        self._trials.append(trial)
        return tuple(float(trial.suggest_categorical(name, values)) for name, values in GRID.items())

    def goes_on(self, trial: int, step: int, value: float) -> bool:
        self._best[trial] = min(value, self._best.get(trial, math.inf))
        self._trials[trial].report(value, step)
        if step < STEPS and self._trials[trial].should_prune():
            self._pruned.add(trial)
            return False
        return True

    def end(self, trial: int) -> None:
        from optuna.trial import TrialState

        if trial in self._pruned:
            self._study.tell(self._trials[trial], state=TrialState.PRUNED)
        else:
            self._study.tell(self._trials[trial], self._best[trial])


def searches(keys: list[Key]) -> dict[str, Callable[[int], Search]]:
    """By name, of a seed."""

    def rules(*, extrapolates: bool) -> list[StopRule]:
        more: list[StopRule] = [Extrapolation(GRACE, 0.05, "steps")] if extrapolates else []
        return [Halving(GRACE, FACTOR, "steps"), *more]

    def ours(algorithm: str, *, extrapolates: bool = False) -> Callable[[int], Search]:
        return lambda seed: Ours(algorithm, rules(extrapolates=extrapolates), seed)

    return {
        "grid": lambda seed: Random(keys, seed, stops=False),
        "random+asha": lambda seed: Random(keys, seed, stops=True),
        "optuna tpe+halving": lambda seed: Optuna("halving", seed),
        "optuna tpe+median": lambda seed: Optuna("median", seed),
        "tpe+asha": ours("tpe"),
        "tpe+asha+extrapolation": ours("tpe", extrapolates=True),
        "cma_es+asha": ours("cma_es"),
        "gp+asha": ours("gp"),
    }


def play(search: Search, found: Table, budget: int, target: float) -> list[tuple[int, float]]:
    """Steps spent and best loss so far, at every new best, until the target is reached."""
    spent, best, told, count = 0, math.inf, [], 0
    running: list[tuple[int, int, int, Key]] = []  # when its next evaluation is due, trial, evaluations so far, which

    def launch(now: int) -> None:
        nonlocal count
        key = search.propose()
        if key is not None:
            heapq.heappush(running, (now + found[key][0][0], count, 0, key))
            count += 1

    for _ in range(SLOTS):
        launch(0)
    while running and spent < budget and best > target:
        now, trial, done, key = heapq.heappop(running)
        curve = found[key]
        step, value = curve[done]
        spent += step - (curve[done - 1][0] if done else 0)
        if value < best:
            best = value
            told.append((spent, best))
        if search.goes_on(trial, step, value) and done + 1 < len(curve):
            heapq.heappush(running, (now + curve[done + 1][0] - step, trial, done + 1, key))
            continue
        search.end(trial)
        launch(now)
    return told


def share_needed(told: list[tuple[int, float]], target: float, budget: int) -> float:
    """Of the grid's steps, until the target is reached."""
    return next((spent for spent, best in told if best <= target), budget) / budget


def run_all(seeds: range, names: list[str] | None, file: Path) -> Iterator[tuple[str, int, list[tuple[int, float]]]]:
    """Every search with every seed."""
    found = curves(file)
    target = (1 + WITHIN) * min(value for curve in found.values() for _, value in curve)
    makers = searches(list(found))
    for name in names or makers:
        for seed in seeds:
            yield name, seed, play(makers[name](seed), found, len(found) * STEPS, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the searches (default: all)")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add every search's best loss by steps spent there")
    parser.add_argument("--table", action="store_true", help="print the table of what is in that file already")
    arguments = parser.parse_args()
    found = curves(arguments.file)
    budget, best = len(found) * STEPS, min(value for curve in found.values() for _, value in curve)
    kept: dict[str, dict[str, Any]] = {}
    if arguments.json and arguments.json.exists():
        kept = json.loads(arguments.json.read_text())
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    if not arguments.table:
        say(describe(machine()))
        for name, seed, told in run_all(seeds, arguments.only, arguments.file):
            kept.setdefault(name, {})[str(seed)] = told
            if arguments.json:
                arguments.json.write_text(json.dumps(kept) + "\n")
    rows = []
    for name, by_seed in kept.items():
        shares = sorted(share_needed(told, best * (1 + WITHIN), budget) for told in by_seed.values())
        places = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 3
        rows.append([name, len(shares), statistics.fmean(shares), places[1], f"{places[0]:.3g} to {places[2]:.3g}"])
    print(
        f"{len(found)} configurations of {STEPS} steps, best {best:.4f}; share of the grid's steps to within 1 % of it"
    )
    print(table(["search", "seeds", "mean", "median", "middle half"], rows))


if __name__ == "__main__":
    main()
