"""Hostile input in bulk: four kinds of it, each made out of good input by a seed and given to what has to read it.

`python -m tests.fuzz --seconds 600 --seed 1` goes on for as long as it is told; CI takes a fixed few (tests/fast).
Whatever happens must be an error of ours, with a message of a readable length, in bounded time.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import itertools
import json
import os
import random
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.sweep_config import DataConfig, EvaluateConfig
from orchestrator.config.sweep_file import load, to_yaml
from orchestrator.errors import InputError, OrchestratorError
from orchestrator.planning.estimate import estimate_lines
from orchestrator.reporting import report
from orchestrator.reporting.status import render_status
from orchestrator.results.evaluation import Evaluation, Sample, write_evaluation
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import TrialStatus
from orchestrator.results.storage import newest_sweep
from orchestrator.sweep.delivered import Delivered, is_owed, write_delivered
from orchestrator.sweep.resume import read_earlier, require_same_question
from orchestrator.training import data_rows
from tests.fast.cases import LLAMA_2_7B
from tests.made_up_sweep import simulated, write_made_up

ROOT = Path(__file__).parent.parent
LIMIT_S = 30.0
LONGEST_MESSAGE = 20_000
Target = Callable[[random.Random, Path], None]
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.0, -0.5, 1e-400, 1e308, float("nan"), float("inf"),
    "", " ", "x" * 5000, "../../etc/passwd", "/dev/zero", "<script>alert(1)</script>", "{{7*7}}", "${HOME}", "$(id)",
    "%s%n", "\x1b[31m", "\r\n", "\u202e", "𝔘", "1e-4", "0x10", "nan", "2x", "0x", "auto", "full", "null", "9" * 400,
    [], [[]], [None], {}, {"choice": []}, {"choice": [1], "when": {}}, {"uniform": [1]}, {"log_uniform": [1e-5, 1e-3]},
    {"int": [1, 2**70]}, {"": ""}, {"when": {"rank": []}}, ["a"] * 2000, {"a": {"b": {"c": {"d": {}}}}},
)  # fmt: skip
BYTES = (b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b"- ", b": ", b"{", b"[" * 2000, b"&a [*a]", b"!!python/object:x",
         b"\xef\xbb\xbf", b"\x1b[2J", b'"', b"'", b"\r", b"<<: *a\n", b"9" * 6000)  # fmt: skip


def sweep_file(rng: random.Random, folder: Path) -> None:
    """A sweep file is refused, or loads, has trials, and reads back as the same."""
    source = rng.choice(sorted((ROOT / "search_spaces").glob("*.yaml")))
    file = folder / "sweep.yaml"
    if rng.random() < 0.4:
        file.write_bytes(_spoilt(rng, source.read_bytes()))
    else:
        raw = yaml.safe_load(source.read_text())
        for _ in range(rng.randint(0, 4)):
            raw = _mutated(rng, raw)
        with contextlib.suppress(yaml.YAMLError, UnicodeError, ValueError):
            file.write_text(yaml.safe_dump(raw), encoding="utf-8", errors="surrogatepass")
    if not file.exists():
        return
    key = rng.choice(
        ["trial.rank", "space", "name", "search.repeats", "budget.trials", "exclude", "trial.alpha", "a.b"]
    )
    overrides = [f"{key}={json.dumps(rng.choice(HOSTILE))[:9000]}"] if rng.random() < 0.3 else []
    sweep = load(file, overrides)
    file.write_text(to_yaml(sweep), encoding="utf-8")
    again = load(file)
    assert again.domains == sweep.domains
    assert to_yaml(again) == to_yaml(sweep)


_SWEEP = simulated(
    [2.0, 2.5], 2, 0, status_of=lambda place, repeat: TrialStatus.COMPLETED if place else TrialStatus.FAILED
)


def results_folder(rng: random.Random, folder: Path) -> None:
    """Status, report and resume of a spoilt sweep folder: an error of ours or an answer, and the folder as it was."""
    sweep = whole_folder(folder)
    for _ in range(rng.randint(1, 3)):
        _spoil_file(rng, sweep.root, rng.choice([path for path in sweep.root.rglob("*") if path.name != "trials"]))
    before = _tree(sweep.root)
    read_all(sweep)
    assert _tree(sweep.root) == before, "reading changed the folder"


def whole_folder(folder: Path) -> SweepFolder:
    """Of a sweep that has ended, with every kind of record."""
    sweep = write_made_up(folder / "sweep", _SWEEP, 4)
    sweep.sweep_file.write_text((ROOT / "search_spaces" / "demo.yaml").read_text())
    sweep.plan.write_text('{"trials": []}')
    asked = EvaluateConfig(prompts=["Why?"])
    samples = (Sample(prompt="Why?", completion="<script>alert(1)</script>"),)
    write_evaluation(next(sweep.trials()), Evaluation(asked=asked, samples=samples, seconds=1.0))
    write_delivered(sweep, Delivered(server="sqlite:///x", sweep_id="s", is_complete=False))
    return sweep


def read_all(sweep: SweepFolder) -> None:
    """By all that read a sweep's folder."""
    readers: tuple[Callable[[], object], ...] = (
        lambda: render_status(sweep),
        lambda: _rendered(sweep),
        lambda: _earlier(sweep),
        lambda: newest_sweep(sweep.root.parent),
        lambda: is_owed(sweep),
    )
    for reader in readers:
        with contextlib.suppress(OrchestratorError):
            reader()


def _rendered(folder: SweepFolder) -> None:
    built = report.build(folder)
    report.render_text(built)
    json.loads(report.render_json(built))
    page = report.render_html(built)
    assert "<script>alert" not in page


def _earlier(folder: SweepFolder) -> None:
    if earlier := read_earlier(folder):
        require_same_question(folder, earlier.sweep, earlier.sweep)


def data_file(rng: random.Random, folder: Path) -> None:
    """A data file's rows are read or told; the columns of those that can be read are a mapping."""
    rows: list[Any] = [{"text": f"row {i}", "prompt": "p", "completion": "c", "messages": []} for i in range(6)]
    for _ in range(rng.randint(0, 3)):
        rows[rng.randrange(len(rows))] = _mutated(rng, rng.choice(rows))
    kind = rng.choice(["jsonl", "csv", "txt", "parquet"])
    file = folder / f"rows.{kind}"
    if kind == "parquet":
        file.write_bytes(_spoilt(rng, _parquet()))
    elif kind == "csv":
        file.write_bytes(_spoilt(rng, b"text,prompt\na,b\n'c',\"d\n\"\n"))
    else:
        file.write_bytes(_spoilt(rng, "".join(json.dumps(row) + "\n\n" for row in rows).encode()))
    data = DataConfig(train=str(file), format=rng.choice(["text", "prompt_completion", "messages"]))
    data_rows.check(data)
    for row in itertools.islice(data_rows.read_rows(str(file), "train"), 1000):
        assert row.columns is None or isinstance(row.columns, dict)


_PARQUET: list[bytes] = []


def _parquet() -> bytes:
    if not _PARQUET:
        import io

        import pyarrow
        import pyarrow.parquet

        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "messages": [[], [1]]}), out)
        _PARQUET.append(out.getvalue())
    return _PARQUET[0]


def estimate_line(rng: random.Random, folder: Path) -> None:
    """Each line has one answer, which is JSON that every reader takes; the line after it is not harmed."""
    trial = {"rank": 8, "alpha": "2x", "micro_batch_size": 1, "zero_stage": 2}
    good = {"id": 1, "model": LLAMA_2_7B, "trial": trial, "workers": 2, "gpu_memory_bytes": 2**34}
    raw: Any = good
    for _ in range(rng.randint(1, 4)):
        raw = _mutated(rng, raw)
    line = json.dumps(raw).encode()
    line = _spoilt(rng, line).replace(b"\n", b" ") if rng.random() < 0.4 else line
    answers = list(estimate_lines([line, json.dumps(good).encode()], _no_model))
    parsed = [json.loads(answer, parse_constant=_refuse) for answer in answers]
    assert len(parsed) == 1 + bool(line.strip())
    assert "allocated_bytes" in parsed[-1]
    for answer in parsed[:-1]:
        assert len(str(answer.get("error", ""))) < 2000, "a message nobody reads"


def _no_model(name: str) -> dict[str, Any]:
    raise InputError(f"no model {name[:80]}: name another")


def _refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


def _spoilt(rng: random.Random, text: bytes) -> bytes:
    """Cut, joined, with a byte changed, a piece put in or taken twice."""
    for _ in range(rng.randint(1, 3)):
        at, to = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        piece, byte = rng.choice(BYTES), bytes([rng.randrange(256)])
        text = rng.choice(
            [
                text[:at],
                text[at:],
                text[:at] + piece + text[at:],
                text[:at] + piece + text[to:],
                text[:at] + byte + text[at + 1 :],
                text[:to] + text[at:],
            ]
        )
    return text


def _mutated(rng: random.Random, value: Any) -> Any:
    """The value with one thing in it replaced, taken away, renamed or put elsewhere."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return rng.choice(HOSTILE)
    holder, key = rng.choice(places)
    other_holder, other_key = rng.choice(places)
    kind = rng.randrange(5)
    if kind <= 1:
        holder[key] = rng.choice(HOSTILE)
    elif kind == 2:
        del holder[key]
    elif kind == 3 and isinstance(holder, dict):
        holder[rng.choice([str(key)[:-1], f"{key}s", "", "\x1b[0m", "<b>", "__class__", "x" * 300])] = holder.pop(key)
    else:
        holder[key] = copy.deepcopy(other_holder[other_key])
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def _spoil_file(rng: random.Random, root: Path, path: Path) -> None:
    kind = rng.randrange(9)
    if path.is_file() and not path.is_symlink() and kind < 4:
        if path.suffix == ".json" and kind < 3:
            with contextlib.suppress(ValueError, RecursionError):
                path.write_text(json.dumps(_mutated(rng, json.loads(path.read_bytes()))))
                return
        path.write_bytes(_spoilt(rng, path.read_bytes()))
        return
    if not path.exists():
        return
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if kind == 4:
        path.mkdir()
    elif kind == 5:
        path.symlink_to(rng.choice([path, Path("/dev/zero"), Path("/nowhere"), Path("/"), root]))
    elif kind == 6:
        os.mkfifo(path)
    elif kind == 7:
        files = sorted(other for other in root.rglob("*") if other.is_file() and not other.is_symlink())
        if files:
            path.write_bytes(rng.choice(files).read_bytes())
    elif kind == 8:
        path.write_bytes(rng.choice(BYTES) * 100)


def _tree(root: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_size) for path in root.rglob("*"))


TARGETS: dict[str, Target] = {
    "sweep_file": sweep_file,
    "results_folder": results_folder,
    "data_file": data_file,
    "estimate_line": estimate_line,
}


def attack(target: Target, seed: int) -> str:
    """One input; `refused` or `taken`, or whatever should not have been raised."""
    rng = random.Random(f"{target.__name__} {seed}")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    started = time.monotonic()
    try:
        target(rng, folder)
        told = "taken"
    except OrchestratorError as error:
        told = "refused"
        if len(str(error)) > LONGEST_MESSAGE:
            raise AssertionError(f"a message of {len(str(error)):,} characters") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    took_s = time.monotonic() - started
    assert took_s < LIMIT_S, f"it took {took_s:.0f} s"
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--target", choices=TARGETS, action="append")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    until = time.monotonic() + arguments.seconds
    for seed in itertools.count(arguments.seed * 10**9):
        if time.monotonic() > until:
            break
        for name in arguments.target or TARGETS:
            # A hang is told with its place, and ends the run.
            faulthandler.dump_traceback_later(2 * LIMIT_S, exit=True)
            try:
                counts[f"{name} {attack(TARGETS[name], seed)}"] += 1
            except Exception as error:
                counts[f"{name} CRASHED"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                print(
                    f"{name} seed {seed}: {type(error).__name__}: {str(error)[:200]} at {where.filename}:{where.lineno}"
                )
    print(json.dumps(dict(sorted(counts.items())), indent=1))


if __name__ == "__main__":
    main()
