"""The tokenised data: made once a sweep, read by every worker, cut into the same batches whoever reads it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from orchestrator.config.sweep_config import DataConfig
from orchestrator.errors import DataError, counted
from orchestrator.results.files import read_record, sync
from orchestrator.training.data_rows import Row, fingerprint, missing_columns, read_rows
from orchestrator.training.data_tokens import tokenize
from orchestrator.training.tokenizer import load_tokenizer

Split = Literal["train", "eval"]
Ints = npt.NDArray[np.int64]

NAMED_SKIPS = 20
"""So many of the rows left out are named; all are counted."""
_RELEASE = 1
"""Part of the inputs' hash: raise it when the same inputs come out as other tokens."""
_FILES = ("tokens", "labels", "offsets")
_PURPOSES: dict[Split, str] = {"train": "train", "eval": "evaluate"}


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What `prepare` wrote."""

    train_rows: int
    eval_rows: int
    train_tokens: int
    skipped: tuple[tuple[str, str], ...]
    """(where, why) of the first rows that could not be used."""
    skipped_count: int
    hash: str
    """Of the tokens themselves: the same text under the same tokenizer has the same."""
    inputs_hash: str
    least_tokens: dict[Split, int] = field(default_factory=dict)
    """The shortest sequence in which a row of the split has something to learn; not known of older folders."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Ragged rows, one after the other."""

    tokens: npt.NDArray[np.int32]
    labels: npt.NDArray[np.bool_]
    offsets: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, order: Ints) -> _Rows:
        spans = [slice(self.offsets[row], self.offsets[row + 1]) for row in order]
        lengths = np.array([span.stop - span.start for span in spans], dtype=np.int64)
        return _Rows(
            np.concatenate([self.tokens[span] for span in spans]),
            np.concatenate([self.labels[span] for span in spans]),
            np.concatenate([[0], np.cumsum(lengths)]),
        )


def prepare(data: DataConfig, model_folder: Path, out: Path) -> DataSummary:
    """Tokenise the data into `out`, or find it there from an earlier call with the same inputs.

    Raises:
        DataError: a source cannot be read, has no usable row, or not the columns of its format.
    """
    inputs_hash = _inputs_hash(data, model_folder)
    if (present := read_summary(out)) and present.inputs_hash == inputs_hash and _is_whole(out, present):
        return present
    # Rows are cut to sequence_length when they are loaded: a longer one is no matter to warn of.
    tokenizer = load_tokenizer(model_folder, model_max_length=10**9)
    skipped: list[Row] = []
    train = _collect(data.train, "train", data, tokenizer, skipped)
    if isinstance(data.eval, str):
        held_out = _collect(data.eval, "eval", data, tokenizer, skipped)
    else:
        train, held_out = _split(train, data.eval, data.train)
    summary = DataSummary(
        train_rows=len(train),
        eval_rows=len(held_out),
        train_tokens=len(train.tokens),
        skipped=tuple((row.where, row.why) for row in skipped[:NAMED_SKIPS]),
        skipped_count=len(skipped),
        hash=_content_hash(train, held_out),
        inputs_hash=inputs_hash,
        least_tokens={"train": int(_least_tokens(train).min()), "eval": int(_least_tokens(held_out).min())},
    )
    _write(out, {"train": train, "eval": held_out}, summary)
    return summary


def require_something_to_learn(summary: DataSummary, sequence_length: int) -> None:
    """Refuse, before anything is launched, what no trial of this length or a shorter one could learn from.

    Raises:
        DataError: with the length that it takes.
    """
    for split, least in summary.least_tokens.items():
        if least > sequence_length:
            raise DataError(_nothing_within(split, sequence_length, f"raise sequence_length to {least} at least"))


def left_out_within(folder: Path, lengths: Iterable[int]) -> Iterator[str]:
    """What trials of these lengths leave out of what `prepare` wrote, since what counts in it lies beyond, in words."""
    least = {purpose: _least_tokens(_open(folder, split)) for split, purpose in _PURPOSES.items()}
    for length in sorted(set(lengths)):
        for purpose, taken in least.items():
            if without := np.count_nonzero(taken > length):
                yield (
                    f"at sequence_length {length} {without} of {counted(len(taken), 'row')} to {purpose} on cannot be "
                    "used, since what is to be learned lies beyond it: raise it"
                )


def _nothing_within(split: Split, sequence_length: int, mend: str) -> str:
    return f"data: no row to {_PURPOSES[split]} on has anything to learn within {sequence_length} tokens: {mend}"


def _least_tokens(rows: _Rows) -> Ints:
    """Of each row, of which something counts, the shortest beginning in which something does."""
    counting, starts = np.flatnonzero(rows.labels), np.asarray(rows.offsets[:-1])
    least: Ints = counting[np.searchsorted(counting, starts)] - starts + 1
    return least


def read_summary(folder: Path) -> DataSummary | None:
    """What an earlier `prepare` wrote; None where there is none, or one that is damaged."""
    try:
        # Not pydantic's own JSON reader: it refuses half a surrogate pair, which a file's name may hold.
        return TypeAdapter(DataSummary).validate_python(json.loads(read_record(folder / "summary.json")))
    except (OSError, ValueError, RecursionError):
        return None


def _is_whole(folder: Path, summary: DataSummary) -> bool:
    """Whether the arrays are those that the summary was written for."""
    try:
        train, held_out = (_open(folder, split) for split in ("train", "eval"))
        return _content_hash(train, held_out) == summary.hash
    except (OSError, ValueError, TypeError, EOFError, OverflowError, RecursionError, MemoryError, zipfile.BadZipFile):
        # What numpy says of files that are none of its own, or not whole.
        return False


def _open(folder: Path, split: Split) -> _Rows:
    rows = _Rows(*(np.load(folder / f"{split}.{name}.npy", mmap_mode="r") for name in _FILES))
    for array, kind in ((rows.tokens, np.int32), (rows.labels, np.bool_), (rows.offsets, np.int64)):
        if array.dtype != kind or array.ndim != 1:
            raise ValueError(f"{split}: not the array that was written")
    return rows


def _inputs_hash(data: DataConfig, model_folder: Path) -> str:
    digest = hashlib.sha256(f"{_RELEASE} {data.model_dump_json()} {fingerprint(data.train)}".encode())
    if isinstance(data.eval, str):
        digest.update(fingerprint(data.eval).encode())
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"):
        if (file := model_folder / name).is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _collect(source: str, split: Split, data: DataConfig, tokenizer: Any, skipped: list[Row]) -> _Rows:
    seen: dict[str, None] = {}
    tokens, labels, failed = [], [], 0
    for outcome in tokenize(_noting_columns(read_rows(source, split), seen), data.format, tokenizer):
        if isinstance(outcome, Row) or not outcome[2].any():
            row = outcome if isinstance(outcome, Row) else Row(outcome[0].where, None, "nothing in it to learn")
            failed += 1
            skipped.append(row)
            continue
        tokens.append(outcome[1])
        labels.append(outcome[2])
    if not tokens:
        raise DataError(_nothing_usable(source, data, tuple(seen), failed, skipped))
    lengths = [len(row) for row in tokens]
    return _Rows(np.concatenate(tokens), np.concatenate(labels), np.concatenate([[0], np.cumsum(lengths)]))


def _noting_columns(rows: Iterable[Row], seen: dict[str, None]) -> Iterator[Row]:
    for row in rows:
        if row.columns is not None:
            seen.update(dict.fromkeys(map(str, row.columns)))
        yield row


def _nothing_usable(source: str, data: DataConfig, seen: Sequence[str], failed: int, skipped: Sequence[Row]) -> str:
    if told := missing_columns(source, data.format, seen):
        return told
    example = f", the first ({skipped[-failed].where}) because {skipped[-failed].why}" if failed else ""
    return f"data {source} has no usable row: {failed} could not be used{example}. Mend the rows or name another source"


def _split(rows: _Rows, fraction: float, source: str) -> tuple[_Rows, _Rows]:
    """Hold a fraction of the rows back; the same rows whatever the trial's seed, so that trials can be compared."""
    if len(rows) < 2:
        raise DataError(f"data {source} has one usable row: give more, or an eval source of its own")
    order = np.random.default_rng(0).permutation(len(rows))
    held_out = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    return rows.take(np.sort(order[held_out:])), rows.take(np.sort(order[:held_out]))


def _content_hash(*splits: _Rows) -> str:
    digest = hashlib.sha256()
    for rows in splits:
        for array in (rows.tokens, rows.labels, rows.offsets):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _write(out: Path, splits: dict[Split, _Rows], summary: DataSummary) -> None:
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for split, rows in splits.items():
            for name in _FILES:
                np.save(partial / f"{split}.{name}.npy", getattr(rows, name))
        (partial / "summary.json").write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")
        for file in partial.iterdir():
            sync(file)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise DataError(f"cannot write the tokenised data to {out} ({error}): name another --storage") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Dataset:
    """One split under one sequence length: sequences, each of one row or, packed, of several."""

    tokens: npt.NDArray[np.int32]
    labels: npt.NDArray[np.bool_]
    starts: Ints
    """Of each row, where it begins in `tokens`."""
    lengths: Ints
    """Of each row, cut to the sequence length."""
    bounds: Ints
    """Sequence i holds the rows from bounds[i] to bounds[i + 1]."""
    sequence_tokens: Ints
    sequence_labels: Ints
    """Tokens of each sequence that count in the loss."""

    def __len__(self) -> int:
        return len(self.bounds) - 1


def load(folder: Path, split: Split, sequence_length: int, packing: bool) -> Dataset:
    """Open what `prepare` wrote, memory-mapped.

    Raises:
        DataError: cut to this length, no row has anything left to learn.
    """
    rows = _open(folder, split)
    starts = np.asarray(rows.offsets[:-1])
    lengths = np.minimum(np.diff(rows.offsets), sequence_length)
    counting = np.concatenate([[0], np.cumsum(rows.labels, dtype=np.int64)])
    row_labels = counting[starts + lengths] - counting[starts]
    kept = np.flatnonzero(row_labels)
    if not len(kept):
        raise DataError(_nothing_within(split, sequence_length, "raise sequence_length"))
    starts, lengths, row_labels = starts[kept], lengths[kept], row_labels[kept]
    bounds = _packed(lengths, sequence_length) if packing else np.arange(len(kept) + 1)
    first = bounds[:-1]
    return Dataset(
        rows.tokens,
        rows.labels,
        starts,
        lengths,
        bounds,
        np.add.reduceat(lengths, first),
        np.add.reduceat(row_labels, first),
    )


def _packed(lengths: Ints, sequence_length: int) -> Ints:
    """Next-fit: rows stay in their order, and a sequence ends where the next row does not fit."""
    bounds, filled = [0], 0
    for row, length in enumerate(lengths.tolist()):
        if filled + length > sequence_length:
            bounds.append(row)
            filled = 0
        filled += length
    return np.array([*bounds, len(lengths)], dtype=np.int64)


def global_batch(dataset: Dataset, step: int, size: int, seed: int) -> Ints:
    """The sequences of optimizer step `step` (from 0), in the order that the seed gives.

    Whoever asks gets the same, so that neither workers nor micro-batches change what a step learns from.
    """
    positions = np.arange(step * size, (step + 1) * size)
    epochs, within = np.divmod(positions, len(dataset))
    return np.array(
        [_order(len(dataset), int(epoch), seed)[place] for epoch, place in zip(epochs, within, strict=True)],
        dtype=np.int64,
    )


@functools.lru_cache(maxsize=4)
def _order(count: int, epoch: int, seed: int) -> Ints:
    return np.random.default_rng((seed, epoch)).permutation(count)


def worker_slice(sequences: Ints, rank: int, workers: int, micro_batch_size: int) -> list[Ints]:
    """A worker's micro-batches of a global batch."""
    mine = len(sequences) // workers
    return np.split(sequences[rank * mine : (rank + 1) * mine], range(micro_batch_size, mine, micro_batch_size))


def evaluation_batches(dataset: Dataset, rank: int, workers: int, micro_batch_size: int) -> Iterator[tuple[Ints, bool]]:
    """A worker's batches of the whole split, and whether each counts.

    Every worker gets as many batches, since ZeRO-3 gathers weights in every forward pass and would wait for ever for
    a worker that makes one less; what is missing is filled with a batch that does not count.
    """
    # Alike lengths together: less padding.
    order = np.argsort(dataset.sequence_tokens, kind="stable")
    batches = [order[first : first + micro_batch_size] for first in range(0, len(order), micro_batch_size)]
    for turn in range(0, len(batches), workers):
        counts = turn + rank < len(batches)
        yield batches[turn + rank if counts else turn], counts


@dataclass(frozen=True, slots=True)
class Batch:
    """What a forward pass takes. No attention mask: the padding stands behind, where causal attention never looks."""

    input_ids: Ints
    """(sequences, longest)"""
    labels: Ints
    """(sequences, longest): the token where it counts in the loss, else -100."""
    position_ids: Ints | None
    """(sequences, longest), from 0 in each row, which tells transformers to keep packed rows apart; None unpacked."""


def collate(dataset: Dataset, sequences: Ints, packing: bool, pad_token: int) -> Batch:
    """Put sequences side by side, padded to the longest."""
    shape = (len(sequences), int(dataset.sequence_tokens[sequences].max()))
    input_ids = np.full(shape, pad_token, dtype=np.int64)
    labels = np.full(shape, -100, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    for line, sequence in enumerate(sequences):
        place = 0
        for row in range(dataset.bounds[sequence], dataset.bounds[sequence + 1]):
            start, length = dataset.starts[row], dataset.lengths[row]
            tokens = dataset.tokens[start : start + length]
            here = slice(place, place + length)
            input_ids[line, here] = tokens
            labels[line, here] = np.where(dataset.labels[start : start + length], tokens, -100)
            position_ids[line, here] = np.arange(length)
            place += length
        # A row of its own for the padding, or the last row's mask would grow over it.
        position_ids[line, place:] = np.arange(shape[1] - place)
    return Batch(input_ids, labels, position_ids if packing else None)
