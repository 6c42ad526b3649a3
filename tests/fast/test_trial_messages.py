from __future__ import annotations

import errno
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from orchestrator.results.files import is_storage_failure
from orchestrator.results.records import TrialStatus
from orchestrator.sweep import failure_policy
from orchestrator.sweep.trial_messages import SilentError, messages
from orchestrator.training.task import Alive, TrialEnd

END = TrialEnd(TrialStatus.COMPLETED, None, None)


def works_then_hangs(pipe: Connection, signs: int, last_sign: bool) -> None:
    for _ in range(signs):
        pipe.send(Alive())
    if last_sign:
        pipe.send(END)
        return
    time.sleep(600)


@pytest.fixture
def reports() -> Iterator[tuple[Connection, Connection]]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    yield receiver, sender
    receiver.close()
    sender.close()


def started(sender: Connection, signs: int, last_sign: bool = False) -> multiprocessing.Process:
    process = multiprocessing.Process(target=works_then_hangs, args=(sender, signs, last_sign), daemon=True)
    process.start()
    return process


def test_a_process_that_works_is_heard_to_its_end(reports: tuple[Connection, Connection]) -> None:
    process = started(reports[1], 3, last_sign=True)
    assert list(messages(reports[0], process, 60)) == [END]
    process.join()


@pytest.mark.parametrize(("signs", "limit"), [(0, "START_LIMIT_S"), (3, "SILENCE_LIMIT_S")])
def test_a_process_that_hangs_is_told_from_one_that_is_late(
    reports: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch, signs: int, limit: str
) -> None:
    process = started(reports[1], signs)
    try:
        with pytest.raises(TimeoutError, match=r"budget\.trial_hours .*remove its folder to have it run") as late:
            list(messages(reports[0], process, 1.0))
        assert not isinstance(late.value, SilentError)
        for _ in range(signs):
            reports[1].send(Alive())
        monkeypatch.setattr(failure_policy, limit, 0.2)
        with pytest.raises(SilentError, match="it hung: no step for"):
            list(messages(reports[0], process, None))
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EROFS, "Read-only file system"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail] file write failed: Stale file handle"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_a_full_or_vanished_disk_is_told_from_a_bug(error: Exception, is_one: bool) -> None:
    assert is_storage_failure(error) is is_one
