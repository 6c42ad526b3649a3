"""What early stopping saves and what it costs: ASHA against the full grid on the same real space, over several seeds.

    python -m benchmarks.early_stopping                       # 3 seeds of 18 trials, twice: about 10 minutes on 2 cores
    python -m benchmarks.early_stopping --seeds 5 --json early_stopping.json

Both sweeps of a seed train builtin:tiny-llama (rank, learning rate and target modules searched) on the documentation
strings of Python's library, the same seed, data and engine; only `scheduler:` differs. A trial trains the same in both
until it is stopped (the script compares their curves), so ASHA's best can at best equal the grid's.

- steps: optimizer steps that ASHA's trials took, as a share of the grid's.
- best loss: the lowest evaluation loss found by each; the difference is what stopping cost.
- rank: where the trial that ASHA found best stands in the full grid (1: the same answer).
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.sweeps import Ran, best_loss, describe, losses, machine, measure_and_tell, run_sweep, say, table


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both sweeps of one seed."""

    seed: int
    trials: int
    grid_steps: int
    asha_steps: int
    stopped: int
    """Trials that ASHA stopped."""
    grid_loss: float
    asha_loss: float
    spread: float
    """Of the grid: its median trial's best loss, less the best of all."""
    rank: int
    same_curves: bool
    """Whether every trial's losses were the same in both, as far as ASHA let it go."""
    grid_s: float
    """From the first trial's first work to the last one's end; each sweep's start-up is left out."""
    asha_s: float

    @property
    def steps_share(self) -> float:
        return self.asha_steps / self.grid_steps

    @property
    def loss_difference(self) -> float:
        return self.asha_loss - self.grid_loss


def sweep_of(arguments: argparse.Namespace, seed: int, scheduler: str) -> dict[str, Any]:
    """The sweep file."""
    asha = {"grace_steps": arguments.grace_steps, "reduction_factor": arguments.reduction_factor}
    return {
        "name": f"{scheduler}-{seed}",
        "model": "builtin:tiny-llama",
        "data": {"train": "builtin:python-docstrings", "eval": 0.01, "format": "prompt_completion"},
        "trial": {
            "precision": "fp32",
            "lr_schedule": "constant",
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "sequence_length": 64,
            "max_steps": arguments.steps,
            "eval_every": arguments.grace_steps,
            "seed": 1000 * seed,
        },
        "space": {
            "rank": [2, 8, 32],
            "target_modules": ["attention", "all-linear"],
            "learning_rate": arguments.learning_rates,
        },
        "scheduler": {"asha": asha} if scheduler == "asha" else {"fifo": {}},
        "resources": {
            "workers_per_trial": 1,
            "gpus_per_worker": 0,
            "cpus_per_worker": 1,
            "max_concurrent": arguments.slots,
        },
    }


def compare(grid: Ran, asha: Ran, seed: int) -> Comparison:
    """Both sweeps, trial by trial."""
    grid_best = {t.trial_id: best_loss([t]) for t in grid.sweep.trials}
    found = min(asha.sweep.trials, key=lambda trial: best_loss([trial]))
    in_order = sorted(grid_best, key=lambda trial_id: grid_best[trial_id])
    statuses = Counter(trial.status.value for trial in asha.sweep.trials)
    return Comparison(
        seed=seed,
        trials=len(grid_best),
        grid_steps=sum(trial.steps for trial in grid.sweep.trials),
        asha_steps=sum(trial.steps for trial in asha.sweep.trials),
        stopped=statuses["stopped"],
        grid_loss=best_loss(grid.sweep.trials),
        asha_loss=best_loss(asha.sweep.trials),
        spread=statistics.median(grid_best.values()) - min(grid_best.values()),
        rank=1 + in_order.index(found.trial_id),
        same_curves=all(same_curve(grid, asha, trial_id) for trial_id in grid_best),
        grid_s=working_s(grid),
        asha_s=working_s(asha),
    )


def same_curve(grid: Ran, asha: Ran, trial_id: str) -> bool:
    """Whether ASHA's curve is the beginning of the grid's."""
    whole, part = (losses(ran.folder.trial(trial_id)) for ran in (grid, asha))
    return whole[: len(part)] == part


def working_s(ran: Ran) -> float:
    """From the first trial's first work to the last one's end."""
    works = ran.works()
    return max(work.ended for work in works) - min(work.started for work in works)


def run_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every seed, both ways."""
    about, found = machine(), []
    say(describe(about))
    for seed in range(arguments.seeds):
        ran = {name: run_sweep(folder, sweep_of(arguments, seed, name)) for name in ("grid", "asha")}
        one = compare(ran["grid"], ran["asha"], seed)
        found.append(one)
        say(f"seed {seed}: {one.steps_share:.0%} of the steps, best loss {one.loss_difference:+.4f}, rank {one.rank}")
    return {
        "machine": about,
        "sweep": sweep_of(arguments, 0, "asha"),
        "mean": {
            "steps_share": statistics.mean(one.steps_share for one in found),
            "loss_difference": statistics.mean(one.loss_difference for one in found),
            "worst_loss_difference": max(one.loss_difference for one in found),
            "same_answer": sum(one.rank == 1 for one in found) / len(found),
        },
        "seeds": [
            {**asdict(one), "steps_share": one.steps_share, "loss_difference": one.loss_difference} for one in found
        ],
    }


def render(result: dict[str, Any]) -> str:
    """The table."""
    header = ["seed", "trials", "stopped", "steps used", "best loss, grid", "ASHA", "difference", "rank", "time"]
    rows = [
        [
            str(one["seed"]),
            one["trials"],
            one["stopped"],
            f"{one['steps_share']:.0%}",
            f"{one['grid_loss']:.4f}",
            f"{one['asha_loss']:.4f}",
            f"{one['loss_difference']:+.4f}",
            one["rank"],
            f"{one['asha_s'] / one['grid_s']:.0%}",
        ]
        for one in result["seeds"]
    ]
    mean, sweep = result["mean"], result["sweep"]
    return "\n".join(
        [
            f"ASHA ({sweep['scheduler']['asha']}) against the full grid, {sweep['trial']['max_steps']} steps a trial; "
            + describe(result["machine"]),
            "",
            table(header, rows),
            "",
            f"mean: {mean['steps_share']:.0%} of the training steps, best loss {mean['loss_difference']:+.4f} "
            f"(at worst {mean['worst_loss_difference']:+.4f}; best to median trial of the grid: "
            f"{statistics.mean(one['spread'] for one in result['seeds']):.4f}); "
            f"the grid's best trial found in {mean['same_answer']:.0%} of the seeds",
            f"curves identical in both: {'yes' if all(one['same_curves'] for one in result['seeds']) else 'NO'}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=81, help="of a trial that nothing stops (default: %(default)s)")
    parser.add_argument("--grace-steps", type=int, default=9, help="that every trial gets (default: %(default)s)")
    parser.add_argument("--reduction-factor", type=int, default=3)
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[1e-3, 1e-2, 5e-2], help="searched (default: %(default)s)"
    )
    parser.add_argument("--slots", type=int, default=2, help="trials at a time (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    arguments = parser.parse_args()
    measure_and_tell("early-stopping", arguments, run_all, render)


if __name__ == "__main__":
    main()
