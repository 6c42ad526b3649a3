"""Train every configuration of a small grid to its end and keep the curves as data for `benchmarks/search.py`.

    python -m benchmarks.search_curves perceptrons
    python -m benchmarks.search_curves smollm2 --storage FOLDER --limit-s 840

A search that asks for a configuration is given its curve, so that twenty seeds of eight searches cost no training. What
is in the file, or in the sweep's folder, already is not trained again.

- perceptrons: scikit-learn's multilayer perceptron on its digits data, a minute or two on one CPU core. Its width
  stands as `rank`, its regularisation is none, an epoch is a step.
- smollm2: LoRA adapters of the real small language model on the running Python's documentation, as one sweep of this
  package, which the same command goes on with until all have trained; about a quarter of an hour on two CPU cores.
- regressors: multilayer perceptrons of two layers, with other settings, on scikit-learn's diabetes data. Nothing in
  this package was chosen by them: they say how far what was seen on the other two carries.
- adapters: low-rank adapters of a perceptron that has learned scikit-learn's digits and is to read them mirrored, over
  five settings: a grid as large as those that searches are for. Committed before any search had seen a curve of it;
  that rungs compare best evaluations comes of what it showed.
- letters: the same on text: a perceptron that has learned which letter comes next in Python's documentation, and is to
  learn it of scikit-learn's. Committed after the last change to what searches do, before any had seen a curve of it.
- lcbench-TASK: published curves, so nobody's choice here: perceptrons for tabular data as LCBench trained them (Zimmer
  et al. 2021, Auto-PyTorch Tabular), as YAHPO Gym's model of them tells (Pfisterer et al. 2022), on the three data sets
  that its suite takes of LCBench. `--model` is the folder lcbench of github.com/slds-lmu/yahpo_data (here at efdab90,
  of the Apache licence), and needs onnxruntime. Width stands as `rank`, an epoch is a step, the loss is the
  validation's cross entropy; three layers, momentum 0.9. Committed before any search had seen a curve of them.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gzip
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from benchmarks.sweeps import run_sweep, say

DATA = Path(__file__).parent / "data"
Key = tuple[float, ...]
Curve = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Table:
    """A grid of configurations and where their curves lie."""

    file: Path
    grid: Mapping[str, Sequence[float]]
    steps: int

    def keys(self) -> list[Key]:
        """Every configuration's values."""
        return [tuple(map(float, values)) for values in itertools.product(*self.grid.values())]

    def curves(self) -> dict[Key, Curve]:
        """Every configuration that is there, with its steps and evaluation losses."""
        found: dict[Key, Curve] = {}
        if self.file.exists():
            with self._open("rt") as opened:
                for row in csv.DictReader(opened):
                    key = tuple(float(row[name]) for name in self.grid)
                    found.setdefault(key, []).append((int(row["step"]), float(row["eval_loss"])))
        return found

    def add(self, values: Sequence[Any], curve: Curve) -> None:
        """Append one configuration's curve."""
        is_new = not self.file.exists()
        with self._open("at") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            if is_new:
                writer.writerow([*self.grid, "step", "eval_loss"])
            writer.writerows([*values, step, f"{loss:.4f}"] for step, loss in curve)

    def _open(self, mode: Literal["rt", "at"]) -> IO[str]:
        opens: Callable[..., IO[str]] = gzip.open if self.file.suffix == ".gz" else open
        return opens(self.file, mode, newline="", encoding="utf-8")


PERCEPTRONS = Table(
    DATA / "search_curves_perceptrons.csv",
    {
        "rank": [2, 4, 8, 16, 32],
        "global_batch_size": [16, 64],
        "learning_rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
    },
    steps=27,
)
SMOLLM2 = Table(
    DATA / "search_curves_smollm2.csv",
    {"rank": [2, 8], "alpha": [4.0, 16.0, 64.0], "learning_rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]},
    steps=27,
)
REGRESSORS = Table(
    DATA / "search_curves_regressors.csv",
    {
        "rank": [4, 16, 64],
        "global_batch_size": [8, 32],
        "weight_decay": [0.0, 0.01, 1.0],
        "learning_rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    },
    steps=27,
)
ADAPTERS = Table(
    DATA / "search_curves_adapters.csv",
    {
        "rank": [1, 2, 4, 8, 16],
        "alpha": [2.0, 8.0, 32.0, 128.0],
        "lora_dropout": [0.0, 0.2],
        "global_batch_size": [8, 32, 128],
        "learning_rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
    },
    steps=27,
)
LETTERS = Table(
    DATA / "search_curves_letters.csv",
    {
        "rank": [1, 2, 4, 8, 16],
        "alpha": [2.0, 8.0, 32.0, 128.0],
        "global_batch_size": [16, 64],
        "learning_rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
    },
    steps=27,
)
LCBENCH = {
    task: Table(
        DATA / f"search_curves_lcbench-{task}.csv.gz",
        {
            "rank": [64, 256, 1024],
            "lora_dropout": [0.0, 0.25, 0.5],
            "global_batch_size": [16, 64, 256],
            "weight_decay": [1e-5, 0.05, 0.1],
            "learning_rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        },
        steps=52,
    )
    for task in ("167168", "189873", "189906")
}
"""By OpenML's number of the task: those of YAHPO Gym's single-objective suite, v1.0."""
TABLES = {
    "perceptrons": PERCEPTRONS,
    "smollm2": SMOLLM2,
    "regressors": REGRESSORS,
    "adapters": ADAPTERS,
    "letters": LETTERS,
    **{f"lcbench-{task}": table for task, table in LCBENCH.items()},
}
SMOLLM2_SWEEP: dict[str, Any] = {
    "name": "search-curves",
    "model": "builtin:smollm2-135m",
    "data": {"train": "builtin:python-docs", "eval": 0.009, "format": "text"},
    "trial": {
        "precision": "fp32",
        "engine": "ddp",
        "lr_schedule": "constant",
        "sequence_length": 64,
        "packing": True,
        "global_batch_size": 1,
        "micro_batch_size": 1,
        "max_steps": SMOLLM2.steps,
        "eval_every": 3,
    },
    "space": dict(SMOLLM2.grid),
    "resources": {"workers_per_trial": 1, "cpus_per_worker": 1},
}


def train_perceptron(rank: int, global_batch_size: int, learning_rate: float) -> Iterator[tuple[int, float]]:
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
    for step in range(1, PERCEPTRONS.steps + 1):
        model.partial_fit(train_x, train_y, classes=np.arange(10))
        yield step, float(log_loss(eval_y, model.predict_proba(eval_x)))


def train_regressor(
    rank: int, global_batch_size: int, weight_decay: float, learning_rate: float
) -> Iterator[tuple[int, float]]:
    """Step and squared error on the rows that are held back, as a share of their variance; two layers of `rank`."""
    from sklearn.datasets import load_diabetes
    from sklearn.metrics import mean_squared_error
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPRegressor
    from sklearn.preprocessing import scale

    rows, found = load_diabetes(return_X_y=True)
    train_x, eval_x, train_y, eval_y = train_test_split(scale(rows), scale(found), train_size=300, random_state=0)
    model = MLPRegressor(
        hidden_layer_sizes=(rank, rank),
        alpha=weight_decay,
        batch_size=global_batch_size,
        learning_rate_init=learning_rate,
        activation="tanh",
        random_state=0,
    )
    for step in range(1, REGRESSORS.steps + 1):
        model.partial_fit(train_x, train_y)
        yield step, float(mean_squared_error(eval_y, model.predict(eval_x)))


@dataclass(frozen=True, slots=True)
class Adaptation:
    """A perceptron of three layers, frozen, and what an adapter is to teach it: rows and their classes."""

    base: Any
    train: tuple[Any, Any]
    held_back: tuple[Any, Any]


@functools.cache
def mirrored_digits() -> Adaptation:
    """A perceptron that reads digits, and mirrored digits."""
    import torch
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    torch.manual_seed(0)
    found, labels = load_digits(return_X_y=True)
    rows, answers = torch.tensor(found / 16, dtype=torch.float32), torch.tensor(labels)
    base = perceptron(rows[:800], answers[:800], classes=10, epochs=30)
    mirrored = rows.view(-1, 8, 8).flip(2).flatten(1)
    return Adaptation(base, (mirrored[800:1100], answers[800:1100]), (mirrored[1100:], answers[1100:]))


@functools.cache
def other_letters() -> Adaptation:
    """A perceptron that says the letter after six of Python's documentation, and what describes scikit-learn's data."""
    from pydoc_data.topics import topics

    import torch
    from sklearn import datasets
    from torch.nn.functional import one_hot

    torch.set_num_threads(1)
    torch.manual_seed(0)
    known = "".join(topics[name] for name in sorted(topics))[:30_000]
    loaders = (datasets.load_diabetes, datasets.load_breast_cancer, datasets.load_wine)
    new = "".join(loader().DESCR for loader in loaders)
    letters = sorted({*known, *new})

    def windows(text: str, count: int) -> tuple[Any, Any]:
        numbers = torch.tensor([letters.index(letter) for letter in text]).unfold(0, 7, 1)
        numbers = numbers[torch.randperm(len(numbers))[:count]]
        return one_hot(numbers[:, :6], len(letters)).float().flatten(1), numbers[:, 6]

    base = perceptron(*windows(known, 8000), classes=len(letters), epochs=4)
    rows, answers = windows(new, 1300)
    return Adaptation(base, (rows[:300], answers[:300]), (rows[300:], answers[300:]))


def perceptron(rows: Any, answers: Any, *, classes: int, epochs: int) -> Any:
    """Three layers, trained and frozen."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    base = nn.Sequential(
        nn.Linear(rows.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes)
    )
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(rows)).split(32):
            optimizer.zero_grad()
            cross_entropy(base(rows[part]), answers[part]).backward()
            optimizer.step()
    return base.requires_grad_(requires_grad=False)


def train_adapter(
    adaptation: Callable[[], Adaptation],
    steps: int,
    rank: int,
    alpha: float,
    global_batch_size: int,
    learning_rate: float,
    lora_dropout: float = 0.0,
) -> Iterator[tuple[int, float]]:
    """Step and loss on the rows that are held back; an epoch is a step. LoRA (Hu et al. 2021) on every layer."""
    import torch
    from torch.nn.functional import cross_entropy, dropout, relu

    given = adaptation()
    (train_x, train_y), (eval_x, eval_y) = given.train, given.held_back
    torch.manual_seed(0)
    layers = [given.base[number] for number in (0, 2, 4)]
    downs = [torch.nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5) for layer in layers]
    ups = [torch.nn.Parameter(torch.zeros(layer.out_features, rank)) for layer in layers]
    optimizer = torch.optim.AdamW([*downs, *ups], lr=learning_rate, weight_decay=0.0)

    def logits(rows: Any, *, training: bool) -> Any:
        for number, (layer, down, up) in enumerate(zip(layers, downs, ups, strict=True)):
            adapted = dropout(rows, lora_dropout, training=training) @ down.T @ up.T * (alpha / rank)
            rows = layer(rows) + adapted
            rows = rows if number == len(layers) - 1 else relu(rows)
        return rows

    for step in range(1, steps + 1):
        for part in torch.randperm(len(train_x)).split(global_batch_size):
            optimizer.zero_grad()
            cross_entropy(logits(train_x[part], training=True), train_y[part]).backward()
            optimizer.step()
        with torch.no_grad():
            yield step, float(cross_entropy(logits(eval_x, training=False), eval_y))


def look_up_lcbench(folder: Path, task: str, **settings: float) -> Iterator[tuple[int, float]]:
    """Epoch and cross entropy; inputs and outputs are in the order of yahpo_gym's benchmarks/lcbench.py."""
    import numpy as np

    session, number = _lcbench_model(folder, task)
    steps = LCBENCH[task].steps
    others = ("global_batch_size", "learning_rate")
    settled = [*(settings[name] for name in others), 0.9, settings["weight_decay"], 3]
    rows = [[epoch, *settled, settings["rank"], settings["lora_dropout"]] for epoch in range(1, steps + 1)]
    numbers, reals = session.get_inputs()
    given = {numbers.name: np.full((steps, 1), number, np.int32), reals.name: np.array(rows, np.float32)}
    for epoch, told in enumerate(session.run(None, given)[0], start=1):
        yield epoch, float(told[2])


@functools.cache
def _lcbench_model(folder: Path, task: str) -> tuple[Any, int]:
    from onnxruntime import InferenceSession

    encoding = json.loads((folder / "encoding.json").read_text(encoding="utf-8"))
    return InferenceSession(str(folder / "model.onnx")), encoding["OpenML_task_id"][task]


def make_small(table: Table, train: Callable[..., Iterator[tuple[int, float]]], limit_s: float) -> int:
    """Append the curves that are not there yet; how many are still missing when the time is over."""
    import sklearn.neural_network  # noqa: F401  # takes long, and is no training

    started, done = time.monotonic(), table.curves()
    missing = [v for v in itertools.product(*table.grid.values()) if tuple(map(float, v)) not in done]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count, values in enumerate(missing):
            if time.monotonic() - started > limit_s:
                return len(missing) - count
            table.add(values, list(train(**dict(zip(table.grid, values, strict=True)))))
    return 0


def make_smollm2(storage: Path, limit_s: float) -> int:
    """Go on with the sweep for so long; write the file once all of it has trained. How many trials are missing."""
    ran = run_sweep(storage, {**SMOLLM2_SWEEP, "budget": {"hours": limit_s / 3600}})
    found = {}
    for trial in ran.sweep.trials:
        points = ran.folder.trial(trial.trial_id).read_metrics()
        curve = [(point.step, point.eval_loss) for point in points if point.eval_loss is not None]
        if trial.status.is_final:
            found[tuple(getattr(trial.config, name) for name in SMOLLM2.grid)] = curve
    missing = len(SMOLLM2.keys()) - len(found)
    if not missing:
        SMOLLM2.file.unlink(missing_ok=True)
        for values in itertools.product(*SMOLLM2.grid.values()):
            SMOLLM2.add(values, found[values])
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--storage", type=Path, default=Path("sweeps"), help="where the sweep of smollm2 lies")
    parser.add_argument("--model", type=Path, default=Path(), metavar="FOLDER", help="the model of LCBench's curves")
    parser.add_argument("--limit-s", type=float, default=3600, help="stop after so long; the same command goes on")
    arguments = parser.parse_args()
    makers = {
        "perceptrons": functools.partial(make_small, PERCEPTRONS, train_perceptron),
        "regressors": functools.partial(make_small, REGRESSORS, train_regressor),
        "adapters": functools.partial(
            make_small, ADAPTERS, functools.partial(train_adapter, mirrored_digits, ADAPTERS.steps)
        ),
        "letters": functools.partial(
            make_small, LETTERS, functools.partial(train_adapter, other_letters, LETTERS.steps)
        ),
        "smollm2": functools.partial(make_smollm2, arguments.storage),
        **{
            f"lcbench-{task}": functools.partial(
                make_small, table, functools.partial(look_up_lcbench, arguments.model, task)
            )
            for task, table in LCBENCH.items()
        },
    }
    if missing := makers[arguments.table](arguments.limit_s):
        say(f"{missing} are missing: run the same command again")


if __name__ == "__main__":
    main()
