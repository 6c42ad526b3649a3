"""Train every configuration of a small grid to its end and keep the curves as data for `benchmarks/search.py`.

    python -m benchmarks.search_curves

A search that asks for a configuration is given its curve, so that twenty seeds of six searches cost no training. The
model is scikit-learn's multilayer perceptron on its digits data, a minute or two on one CPU core, no language model.
Its width stands as `rank`, its regularisation is none, an epoch is a step. What is in the file already is not trained
again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from benchmarks.sweeps import say

FILE = Path(__file__).parent / "data" / "search_curves.csv"
GRID = {
    "rank": [2, 4, 8, 16, 32],
    "global_batch_size": [16, 64],
    "learning_rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
}
STEPS = 27
Curve = list[tuple[int, float]]


def train(rank: int, global_batch_size: int, learning_rate: float) -> Iterator[tuple[int, float]]:
    """Step and loss on the rows that are held back."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.metrics import log_loss
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier

    rows, labels = load_digits(return_X_y=True)
    train_x, eval_x, train_y, eval_y = train_test_split(rows / 16, labels, train_size=400, random_state=0)
    model = MLPClassifier(
        (rank,), alpha=0, batch_size=global_batch_size, learning_rate_init=learning_rate, random_state=0
    )
    for step in range(1, STEPS + 1):
        model.partial_fit(train_x, train_y, classes=np.arange(10))
        yield step, float(log_loss(eval_y, model.predict_proba(eval_x)))


def curves(file: Path = FILE) -> dict[tuple[float, ...], Curve]:
    """Every configuration's values, in the grid's order, with its steps and evaluation losses."""
    found: dict[tuple[float, ...], Curve] = {}
    if file.exists():
        with file.open(newline="", encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                key = tuple(float(row[name]) for name in GRID)
                found.setdefault(key, []).append((int(row["step"]), float(row["eval_loss"])))
    return found


def train_missing(file: Path, limit_s: float) -> int:
    """Append the curves that are not there yet; how many are still missing when the time is over."""
    import sklearn.neural_network  # noqa: F401  # takes long, and is no training

    started, done = time.monotonic(), curves(file)
    missing = [values for values in itertools.product(*GRID.values()) if tuple(map(float, values)) not in done]
    with file.open("a", newline="", encoding="utf-8") as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = csv.writer(opened, lineterminator="\n")
        if not done:
            writer.writerow([*GRID, "step", "eval_loss"])
        for count, values in enumerate(missing):
            if time.monotonic() - started > limit_s:
                return len(missing) - count
            rows = [[*values, step, f"{loss:.4f}"] for step, loss in train(*values)]  # type: ignore[arg-type]
            writer.writerows(rows)
            opened.flush()
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--limit-s", type=float, default=3600, help="stop after so long; the same command goes on")
    arguments = parser.parse_args()
    if missing := train_missing(arguments.file, arguments.limit_s):
        say(f"{missing} are missing: run the same command again")


if __name__ == "__main__":
    main()
