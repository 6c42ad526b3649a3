"""The driver's side of a sweep in an object store: what the driver wrote goes there, what the trials wrote comes here.

A thread does it, so that no trial waits for the store; only a trial's end waits until the trial's own files are here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from orchestrator.errors import StorageError
from orchestrator.results import lease
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import TrialResult, TrialStatus
from orchestrator.results.remote import Mirror, Wanted, is_checkpoint, is_record, is_result
from orchestrator.sweep.folder_lock import Tenure

log = logging.getLogger(__name__)
RETRY_S = 5.0
LOOK_S = 30.0
"""So often at least the store is asked for what the running trials wrote: that it is away is noticed by it too."""
AWAY_LIMIT_S = 300.0
"""A store that is away for so long ends the sweep, as it ends a trial that waits for it."""
END_LIMIT_S = 120.0
"""So long it may be away at the end of the sweep, and INTERRUPTED_END_LIMIT_S at that of one that was interrupted."""
INTERRUPTED_END_LIMIT_S = 5.0


class Carrier:
    """Does nothing for a folder that all nodes share."""

    def __init__(self, folder: SweepFolder, tenure: Tenure) -> None:
        self._folder, self._tenure = folder, tenure
        self._mirror = Mirror(folder.root, folder.remote) if folder.remote else None
        self._running: set[str] = set()
        self._ended: set[str] = set()
        self._written: set[str] = set()
        """Trials of which the driver wrote something since it was last carried over."""
        self._unfetched: set[str] = set()
        """Trials that ended while the store was away."""
        self._untold: dict[str, Callable[[], None]] = {}
        """By trial, how who waits for that hears of its end, once the store has its record and its files are here."""
        self._lock = threading.Lock()
        self._away_since_s: float | None = None
        self._why_away: StorageError | None = None
        self._end_limit_s = END_LIMIT_S
        self._is_given_up = False
        self._wake, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        """Read what the store has of this sweep: all but what only trials and exports need.

        Raises:
            StorageError: the store does not answer.
        """
        if self._mirror:
            self._mirror.pull(is_record, exact=True)
            self._thread.start()

    def track(self, record: TrialResult) -> None:
        """Take note that a record was written."""
        if record.status is TrialStatus.RUNNING:
            self._running.add(record.trial_id)
        else:
            self._running.discard(record.trial_id)
        if not record.needs_checkpoint:
            self._ended.add(record.trial_id)
        self.wrote(record.trial_id)

    def wrote(self, trial_id: str) -> None:
        """Take note that the driver wrote something into a trial's folder."""
        self._written.add(trial_id)
        self._wake.set()

    def forget_checkpoints(self, trial_id: str) -> None:
        """Remove those of a trial that nobody will begin with any more."""
        self._folder.trial(trial_id).forget_checkpoints()
        if self._mirror:
            self._ended.add(trial_id)
            self._wake.set()

    def fetch(self, trial_id: str) -> bool:
        """Whether what the trial's workers wrote is here now; else it comes once the store is there again."""
        if self._mirror is None:
            return True
        if self._away_since_s is None:
            try:
                self._pull(trial_id, is_result)
                return True
            except StorageError as error:
                self._note_away(error)
        log.warning("trial %s: its files are in the store and not here yet", trial_id)
        self._unfetched.add(trial_id)
        return False

    def once_stored(self, tell: Callable[[TrialResult], None]) -> Callable[[TrialResult], None]:
        """`tell`, but of a trial's end it is told when the store has the record, and what the trial wrote is here.

        Whoever goes on with the sweep knows no more than the store does: what it makes again must not have been told.
        """
        if self._mirror is None:
            return tell

        def track(record: TrialResult) -> None:
            if not record.status.is_final and record.trial_id not in self._unfetched:
                tell(record)
                return
            self._written.add(record.trial_id)
            with self._lock:
                self._untold[record.trial_id] = partial(tell, record)
            self._wake.set()

        return track

    def away(self) -> StorageError | None:
        """Why the store does not answer, where it has not for longer than we wait."""
        since_s = self._away_since_s
        return self._why_away if since_s is not None and time.monotonic() - since_s > AWAY_LIMIT_S else None

    def hurry(self) -> None:
        """The sweep was interrupted, and who did it waits for its end."""
        self._end_limit_s = INTERRUPTED_END_LIMIT_S

    def push(self) -> None:
        """Carry over all that was written here.

        Raises:
            StorageError: the store cannot be written.
        """
        if self._mirror and not self._tenure.is_lost:
            self._mirror.push()

    def finish(self) -> None:
        """Carry over the rest, for which a store that is away is waited a bounded time; what is written later needs
        another call.

        Raises:
            StorageError: it stayed away, which is told and waited for once.
        """
        if self._mirror is None or self._tenure.is_lost or self._is_given_up:
            return
        limit_s = 0.0 if self.away() else self._end_limit_s
        until_s = time.monotonic() + limit_s
        self._ending.set()
        self._wake.set()
        # It may be within a request that nobody answers.
        self._thread.join(max(RETRY_S, limit_s))
        while not self._thread.is_alive():
            try:
                self._carry()
                return
            except StorageError as error:
                self._why_away = error
                if time.monotonic() + RETRY_S > until_s:
                    break
                time.sleep(RETRY_S)
        self._is_given_up = True
        raise StorageError(
            f"{self._why_away or f'storage {self._folder.shown} does not answer'}. What the store has is safe: run the "
            "same command again once it answers"
        )

    def _work(self) -> None:
        while not self._ending.is_set():
            self._wake.wait(LOOK_S)
            self._wake.clear()
            try:
                self._carry()
            except StorageError as error:
                self._note_away(error)
                self._ending.wait(RETRY_S)
            else:
                if self._away_since_s is not None:
                    log.warning("storage %s answers again", self._folder.shown)
                self._away_since_s = None

    def _note_away(self, error: StorageError) -> None:
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
            log.warning("%s; it is tried again for %.0f s", error, AWAY_LIMIT_S)
        self._why_away = error
        self._wake.set()

    def _carry(self) -> None:
        if self._tenure.is_lost:
            return
        # Of these the final record goes with this push; of one that ends meanwhile the next will tell, and its
        # checkpoint stays until then.
        ended = tuple(self._ended)
        with self._lock:
            untold = dict(self._untold)
        self._push_written()
        for trial_id in tuple(self._unfetched):
            self._pull(trial_id, is_result)
            self._unfetched.discard(trial_id)
        self._tell(untold)
        for trial_id in tuple(self._running):
            self._pull(trial_id, is_record)
        self._forget_checkpoints(ended)

    def _tell(self, untold: Mapping[str, Callable[[], None]]) -> None:
        for trial_id, tell in untold.items():
            with self._lock:
                if self._untold[trial_id] is not tell:
                    # Its record was written anew meanwhile.
                    continue
                del self._untold[trial_id]
            tell()

    def _push_written(self) -> None:
        """What belongs to the trials that were written, since a walk through thousands at each would take all the time.

        At the end of the sweep all of it.
        """
        assert self._mirror
        if self._ending.is_set():
            self._mirror.push()
            return
        written = {self._written.pop() for _ in range(len(self._written))}
        try:
            self._mirror.push(within=[self._inside(trial_id) for trial_id in written])
        except StorageError:
            self._written |= written
            raise

    def _pull(self, trial_id: str, wanted: Wanted) -> None:
        assert self._mirror
        ours = self._folder.trial(trial_id).result.name
        self._mirror.pull(lambda path: wanted(path) and path.name != ours, under=self._inside(trial_id))

    def _forget_checkpoints(self, ended: Iterable[str]) -> None:
        assert self._mirror
        for trial_id in ended:
            self._mirror.remove(is_checkpoint, under=self._inside(trial_id))
            self._ended.discard(trial_id)

    def _inside(self, trial_id: str) -> str:
        return self._folder.inside(self._folder.trial(trial_id).root)


@contextmanager
def carried(folder: SweepFolder, tenure: Tenure) -> Iterator[Carrier]:
    """Be the only one at work in the folder's store, if it has one, with what it holds at hand.

    Raises:
        FolderError: another run is at work there.
        StorageError: the store does not answer, or did not take everything at the end.
    """
    carrier = Carrier(folder, tenure)
    if folder.remote is None:
        yield carrier
        return
    with lease.held(folder.remote, tenure.lose):
        carrier.start()
        try:
            yield carrier
        finally:
            if folder.sweep_file.exists():
                carrier.finish()
