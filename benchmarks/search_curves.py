"""Train every configuration of a small grid to its end, one after the other, and keep the curves as data.

    python -m benchmarks.search_curves

`benchmarks/search.py` lets searches choose among them: a search that asks for a configuration is given its curve, so
that twenty seeds of five searches cost no training. Trials of a tiny Llama on the documentation strings of Python's
library, each in a process of its own, on a CPU, plain data parallelism, no Ray. What is in the file already is not
trained again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import tempfile
import time
from pathlib import Path

from benchmarks.sweeps import say
from orchestrator.config.sweep_config import DataConfig
from orchestrator.config.trial_config import TrialConfig

FILE = Path(__file__).parent / "data" / "search_curves.csv"
GRID = {
    "rank": [2, 8, 32, 128],
    "target_modules": ["attention", "all-linear"],
    "learning_rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 1e-1],
}
SHARED = {
    "precision": "fp32",
    "engine": "ddp",
    "lr_schedule": "linear",
    "global_batch_size": 8,
    "micro_batch_size": 8,
    "sequence_length": 64,
    "max_steps": 81,
    "eval_every": 3,
}
COLUMNS = [*GRID, "step", "eval_loss"]


def train_all(file: Path, limit_s: float) -> int:
    """Append the curves that are not there yet; how many are still missing when the time is over."""
    from orchestrator.training import data, model_source
    from tests.training.launch import make_task, run_trial

    started = time.monotonic()
    done = {key for key, _ in curves(file)} if file.exists() else set()
    missing = [values for values in itertools.product(*GRID.values()) if tuple(map(str, values)) not in done]
    with tempfile.TemporaryDirectory() as folder, file.open("a", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        if not done:
            writer.writerow(COLUMNS)
        model = model_source.materialize(model_source.resolve("builtin:tiny-llama"))
        tokens = Path(folder) / "data"
        data.prepare(
            DataConfig(train="builtin:python-docstrings", eval=0.01, format="prompt_completion"), model, tokens
        )
        for count, values in enumerate(missing):
            if time.monotonic() - started > limit_s:
                return len(missing) - count
            config = TrialConfig.model_validate(SHARED | dict(zip(GRID, values, strict=True)))
            outcome = run_trial(make_task(config, model, tokens, Path(folder) / str(count)))
            rows = [[*values, p.step, f"{p.eval_loss:.5f}"] for p in outcome.points if p.eval_loss is not None]
            writer.writerows(rows)
            opened.flush()
            say(f"{count + 1} of {len(missing)}: {values} {outcome.end.status} {rows[-1][-1] if rows else ''}")
    return 0


def curves(file: Path = FILE) -> list[tuple[tuple[str, ...], list[tuple[int, float]]]]:
    """Every configuration's values, as text, with its steps and evaluation losses."""
    found: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    with file.open(newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            key = tuple(row[name] for name in GRID)
            found.setdefault(key, []).append((int(row["step"]), float(row["eval_loss"])))
    return list(found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--limit-s", type=float, default=3600, help="stop after so long; the same command goes on")
    arguments = parser.parse_args()
    if missing := train_all(arguments.file, arguments.limit_s):
        say(f"{missing} are missing: run the same command again")


if __name__ == "__main__":
    main()
