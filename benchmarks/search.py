"""How much training each search needs to come within 1 % of the best configuration of a table of real curves.

    python -m benchmarks.search smollm2 --seeds 20

Every search runs over the same table (made by `benchmarks/search_curves.py`: LoRA adapters of a real small language
model, or small perceptrons), two trials at a time on a simulated clock in which a step takes one unit: what is
proposed, when it is stopped and what is told back is decided by the real code, and only the training is looked up.

- grid: every configuration to its end, in random order.
- random+asha: Ray Tune's own `ASHAScheduler` with random search, without replacement.
- optuna: Optuna's `TPESampler` and a pruner of its own, successive halving or (its default) the median, as they come.
- tpe+asha and so on: this package's search and rules, which try the middle of the space first; and, to see what that
  is worth on these tables, the same without it.

Training is counted in steps, as a share of what the grid takes. A search that does not get there within the grid's
steps counts as the whole grid (1.0). The second table is how far above the best the searches are after such shares of
the grid's steps: the median of the seeds, and their middle half.
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

from benchmarks.search_curves import TABLES, Curve, Key, Table
from benchmarks.sweeps import describe, machine, say, table
from orchestrator.config.search_space import Settings, Space, domains
from orchestrator.search.extrapolation import Extrapolation
from orchestrator.search.observation import Observation, Standing
from orchestrator.search.stopping import Halving, Heard, StopRule
from orchestrator.search.suggest import FIRST, next_settings

GRACE, FACTOR, SLOTS, WITHIN = 3, 3, 2, 0.01
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3)
"""Of the grid's steps, after which the bands are told."""


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
    table: Table
    first: tuple[Settings, ...] = FIRST
    keys: list[Key] = field(default_factory=list)
    seen: dict[int, Curve] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.space: dict[str, Any] = domains(Space.model_validate(dict(self.table.grid)))

    def propose(self) -> Key | None:
        known = [self._observation(number) for number in range(len(self.keys))]
        settings = next_settings(self.algorithm, self.space, {}, [], self.first, known, self.seed)
        if settings is None:
            return None
        self.keys.append(tuple(float(settings[name]) for name in self.table.grid))
        return self.keys[-1]

    def goes_on(self, trial: int, step: int, value: float) -> bool:
        self.seen.setdefault(trial, []).append((step, value))
        heard = Heard(str(trial), str(trial), step, value, self.table.steps)
        reasons = [rule.hear(heard) for rule in self.rules]
        return not any(reasons)

    def end(self, trial: int) -> None:
        self.ended.add(trial)

    def _observation(self, number: int) -> Observation:
        grid = self.table.grid
        settings = {name: type(grid[name][0])(v) for name, v in zip(grid, self.keys[number], strict=True)}
        if number not in self.ended:
            return Observation(number, settings, Standing.OPEN)
        best, curve = math.inf, []
        for step, value in self.seen[number]:
            best = min(best, value)
            curve.append((step, best))
        standing = Standing.WHOLE if curve[-1][0] == self.table.steps else Standing.PARTIAL
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

    def __init__(self, pruner: str, seed: int, table: Table) -> None:
        import optuna

        self._table = table

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
        return tuple(float(trial.suggest_categorical(name, values)) for name, values in self._table.grid.items())

    def goes_on(self, trial: int, step: int, value: float) -> bool:
        self._best[trial] = min(value, self._best.get(trial, math.inf))
        self._trials[trial].report(value, step)
        if step < self._table.steps and self._trials[trial].should_prune():
            self._pruned.add(trial)
            return False
        return True

    def end(self, trial: int) -> None:
        from optuna.trial import TrialState

        if trial in self._pruned:
            self._study.tell(self._trials[trial], state=TrialState.PRUNED)
        else:
            self._study.tell(self._trials[trial], self._best[trial])


def searches(data: Table) -> dict[str, Callable[[int], Search]]:
    """By name, of a seed."""

    def rules(*, extrapolates: bool) -> list[StopRule]:
        more: list[StopRule] = [Extrapolation(GRACE, 0.05, "steps")] if extrapolates else []
        return [Halving(GRACE, FACTOR, "steps"), *more]

    def ours(
        algorithm: str, *, extrapolates: bool = False, first: tuple[Settings, ...] = FIRST
    ) -> Callable[[int], Search]:
        return lambda seed: Ours(algorithm, rules(extrapolates=extrapolates), seed, data, first)

    keys = data.keys()
    return {
        "grid": lambda seed: Random(keys, seed, stops=False),
        "random+asha": lambda seed: Random(keys, seed, stops=True),
        "optuna tpe+halving": lambda seed: Optuna("halving", seed, data),
        "optuna tpe+median": lambda seed: Optuna("median", seed, data),
        "tpe+asha": ours("tpe"),
        "tpe+asha+extrapolation": ours("tpe", extrapolates=True),
        "cma_es+asha": ours("cma_es"),
        "gp+asha": ours("gp"),
        "tpe+asha, no middle": ours("tpe", first=()),
        "gp+asha, no middle": ours("gp", first=()),
    }


def play(search: Search, found: dict[Key, Curve], budget: int, target: float) -> list[tuple[int, float]]:
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


def run_all(data: Table, seeds: range, names: list[str] | None) -> Iterator[tuple[str, int, list[tuple[int, float]]]]:
    """Every search with every seed."""
    found = data.curves()
    makers = searches(data)
    for name in names or makers:
        for seed in seeds:
            yield name, seed, play(makers[name](seed), found, len(found) * data.steps, target_of(data))


def target_of(data: Table) -> float:
    """Within 1 % of the best."""
    return (1 + WITHIN) * best_of(data)


def best_of(data: Table) -> float:
    """Of all configurations at all evaluations."""
    return min(value for curve in data.curves().values() for _, value in curve)


def shares_table(data: Table, kept: dict[str, dict[str, Any]]) -> str:
    """What each search needed, and as a share of what random search under ASHA needed."""
    budget, target = len(data.keys()) * data.steps, target_of(data)
    needed = {n: sorted(share_needed(told, target, budget) for told in found.values()) for n, found in kept.items()}
    plain = statistics.fmean(needed["random+asha"]) if "random+asha" in needed else None
    rows = []
    for name, shares in needed.items():
        places = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 3
        mean = statistics.fmean(shares)
        of_plain = mean / plain if plain else None
        rows.append([name, len(shares), mean, of_plain, places[1], f"{places[0]:.3g} to {places[2]:.3g}"])
    return table(["search", "seeds", "mean", "of random+asha", "median", "middle half"], rows)


def bands_table(data: Table, kept: dict[str, dict[str, Any]]) -> str:
    """How far above the best each search is, by steps spent; once it is within 1 % it is not followed any more."""
    budget, best = len(data.keys()) * data.steps, best_of(data)
    rows = []
    for name, by_seed in kept.items():
        cells = []
        for share in SHARES:
            reached = [
                min((v for spent, v in told if spent <= share * budget), default=math.inf) for told in by_seed.values()
            ]
            above = sorted(100 * (value / best - 1) for value in reached)
            low, middle, high = statistics.quantiles(above, n=4) if len(above) > 1 else above * 3
            cells.append(f"{middle:.1f} ({low:.1f} to {high:.1f})")
        rows.append([name, *cells])
    return table(["search", *(f"% above the best after {share:.0%}" for share in SHARES)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=TABLES)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the searches (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add every search's best loss by steps spent there")
    parser.add_argument("--table", action="store_true", help="print the table of what is in that file already")
    arguments = parser.parse_args()
    data = TABLES[arguments.data]
    kept: dict[str, dict[str, Any]] = {}
    if arguments.json and arguments.json.exists():
        kept = json.loads(arguments.json.read_text())
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    if not arguments.table:
        say(describe(machine()))
        for name, seed, told in run_all(data, seeds, arguments.only):
            kept.setdefault(name, {})[str(seed)] = told
            if arguments.json:
                arguments.json.write_text(json.dumps(kept) + "\n")
    told = f"{len(data.keys())} configurations of {data.steps} steps, best {best_of(data):.4f}"
    print(f"{arguments.data}: {told}; share of the grid's steps to within 1 % of it")
    print(shares_table(data, kept))
    print()
    print(bands_table(data, kept))


if __name__ == "__main__":
    main()
