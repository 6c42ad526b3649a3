"""Every error that the orchestrator raises on purpose, each with its exit code or its trial status.

OrchestratorError
├── InputError                  exit 2: what the user wrote cannot be done; nothing was started
│   ├── SweepFileError          the sweep file, all its problems at once
│   ├── ModelError              the model cannot be found, read or adapted
│   ├── DataError               the data cannot be found or read
│   └── FolderError             a sweep folder that cannot be used so
├── UnreachableError            exit 3: something outside did not answer
│   ├── ClusterUnreachableError
│   ├── TrackingUnreachableError
│   └── StorageError
├── SweepInterruptedError       exit 130: Ctrl-C, SIGTERM or SIGHUP; the state is saved
└── TrialError                  one trial ended badly; the sweep goes on
    ├── TrialOutOfMemoryError   status out_of_memory
    ├── TrialDivergedError      status diverged
    ├── TrialFailedError        status failed
    └── TemplateError           status preempted

All fields go to `Exception.args` by position, so that an error survives pickling from worker to driver.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

LONGEST_SHOWN = 200
"""Characters of a value that a message repeats."""


def counted(count: float, noun: str) -> str:
    """`1 trial`, `3 trials`, `0.5 CPUs`."""
    return f"{count if isinstance(count, int) else f'{count:g}'} {noun}{'' if count == 1 else 's'}"


def apart(size: float, others: Iterable[float], unit: float, digits: int) -> str:
    """A size in its unit, with as many digits, so many at least, as tell it from the others: that it breaks a bound is
    not seen where both read the same."""
    other = [value for value in others if value != size]
    for more in range(digits, 10):
        told = f"{size / unit:.{more}f}"
        if told not in [f"{value / unit:.{more}f}" for value in other]:
            break
    return told


def cut(text: str) -> str:
    """As much of a text as a message repeats."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"


def shown(value: Any) -> str:
    """A value as a message repeats it: a long one is cut."""
    return cut(repr(value))


def printable(text: str) -> str:
    """A text that does nothing to the terminal it is written to: control characters but line ends are escaped."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _is_harmless(character: str) -> bool:
    # Spaces of any width are not printable to Python; they group the digits of our own numbers.
    return character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs"


class OrchestratorError(Exception):
    """Something went wrong in a way that a person can act on."""

    exit_code: ClassVar[int] = 1


class InputError(OrchestratorError):
    """What the user wrote cannot be done; nothing was started."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a sweep file."""

    path: str
    """The key's full path, as `space.rank[2]`."""
    message: str
    line: int | None = None


class SweepFileError(InputError):
    """A sweep file with at least one problem; all of them are told at once."""

    def __init__(self, file: str, problems: tuple[Problem, ...]) -> None:
        super().__init__(file, problems)
        self.file, self.problems = file, problems

    def __str__(self) -> str:
        return "\n".join(
            f"{self.file}:{problem.line}: {problem.path}: {problem.message}"
            if problem.line
            else f"{self.file}: {problem.path}: {problem.message}"
            for problem in self.problems
        )


class ModelError(InputError):
    """The model cannot be found or read, or does not have what the sweep file asks of it."""


class DataError(InputError):
    """The data cannot be found or read, or holds no usable row."""


class FolderError(InputError):
    """A sweep folder that does not exist, is damaged, or belongs to another sweep."""


class UnreachableError(OrchestratorError):
    """The cluster, the tracking server or the storage did not answer."""

    exit_code = 3


class ClusterUnreachableError(UnreachableError):
    """No Ray cluster answered."""


class TrackingUnreachableError(UnreachableError):
    """The MLflow server did not answer."""


class StorageError(UnreachableError):
    """The storage cannot be read or written."""


class SweepInterruptedError(OrchestratorError):
    """Ctrl-C, SIGTERM or SIGHUP ended the sweep; its state is saved and the same command goes on."""

    exit_code = 130


class TrialError(OrchestratorError):
    """One trial ended badly."""


class TrialOutOfMemoryError(TrialError):
    """A worker ran out of memory at `step`, while it held `held_bytes` and asked for `asked_bytes` (None: unknown)."""

    def __init__(self, step: int, held_bytes: int, asked_bytes: int | None, micro_batch_size: int) -> None:
        super().__init__(step, held_bytes, asked_bytes, micro_batch_size)
        self.step, self.held_bytes, self.asked_bytes = step, held_bytes, asked_bytes
        self.micro_batch_size = micro_batch_size

    def __str__(self) -> str:
        asked = f", {self.asked_bytes / 2**30:.2f} GiB more asked for" if self.asked_bytes else ""
        return (
            f"out of memory at step {self.step} with {self.held_bytes / 2**30:.2f} GiB held{asked}; "
            f"lower micro_batch_size (now {self.micro_batch_size}) or sequence_length, "
            "or set gradient_checkpointing: true"
        )


class TrialDivergedError(TrialError):
    """The loss of `step`, or its gradient norm, was NaN or infinite."""

    def __init__(self, step: int, value: float, what: str = "loss") -> None:
        super().__init__(step, value, what)
        self.step, self.value, self.what = step, value, what

    def __str__(self) -> str:
        remedy = "lower learning_rate or max_grad_norm, or use bf16"
        return f"the {self.what} became {self.value} at step {self.step}; {remedy}"


class TemplateError(TrialError):
    """The process that a trial was forked from is of no use to it; another may be."""


class CheckpointError(TrialError):
    """The checkpoint of another trial that a trial should begin with cannot be used."""


class TrialFailedError(TrialError):
    """A worker raised an error of its own, or died."""

    def __init__(self, what: str, log: str) -> None:
        super().__init__(what, log)
        self.what, self.log = what, log

    def __str__(self) -> str:
        return f"{self.what}; the whole story is in {self.log}: mend its cause there and run the sweep again"


def first_line(error: BaseException, otherwise: str | None = None) -> str:
    """The first line of its message that says something; where none does `otherwise`, or the name of its kind."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), otherwise or type(error).__name__)
