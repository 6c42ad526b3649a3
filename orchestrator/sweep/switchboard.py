"""The one actor between the sweep, its trials and their workers: tasks and stops go out, reports come back.

Workers wait on it (a long poll) in place of asking again and again, so a stop reaches them in milliseconds; they send
without waiting, so a report costs the training loop nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from orchestrator.results.records import TrialStatus
from orchestrator.training.task import TrialEnd, TrialProgress, TrialTask, WorkerNode, WorkerPlace

STOPPED = TrialEnd(TrialStatus.STOPPED, "stopped", None)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A trial for one worker of a group."""

    turn: int
    """How many trials the group had before, this one included."""
    task: TrialTask
    place: WorkerPlace


@dataclass(slots=True)
class _Turn:
    """One trial on one group."""

    task: TrialTask
    events: asyncio.Queue[TrialProgress | TrialEnd] = field(default_factory=asyncio.Queue)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    ends: dict[int, TrialEnd] = field(default_factory=dict)


@dataclass(slots=True)
class _Group:
    workers: int
    store_host: str
    store_port: int
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    begun: int = 0
    """How many trials the group has been given."""
    turns: dict[int, _Turn] = field(default_factory=dict)
    """By number, from 1: the newest, and what is not over of those before. A group may serve thousands."""
    nodes: dict[int, WorkerNode] = field(default_factory=dict)
    """Where each worker lies, once it has come up."""
    room: object = None
    """Ray's placement group of all its workers, likewise."""
    closed: bool = False
    lost: TrialEnd | None = None
    """Its workers are gone: how a trial ends there."""

    @property
    def newest(self) -> _Turn | None:
        return self.turns.get(self.begun)

    def begin(self, turn: _Turn) -> None:
        """Make it the newest."""
        self.turns = {number: before for number, before in self.turns.items() if not before.over.is_set()}
        self.begun += 1
        self.turns[self.begun] = turn


class Switchboard:
    """An asynchronous Ray actor: no method blocks, so any number of groups may wait at a time."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}
        self._running: dict[str, _Turn] = {}
        self._all_stopped = False

    # --- the trial's side ---

    async def open_group(self, group_id: str, workers: int, store_host: str, store_port: int) -> None:
        """Make a group known, before its workers start."""
        self._groups[group_id] = _Group(workers, store_host, store_port)

    async def assign(self, group_id: str, task: TrialTask) -> None:
        """Hand the next trial to all workers of a group."""
        group = self._groups[group_id]
        if group.newest:
            # Of one that the scheduler stopped nobody may have asked for the end.
            self._forget(group.newest)
        turn = _Turn(task)
        group.begin(turn)
        self._running[task.trial_id] = turn
        if self._all_stopped:
            # A slot that waited before another attempt comes too late.
            self._finish(turn, STOPPED)
        elif group.lost:
            self._finish(turn, group.lost)
        async with group.changed:
            group.changed.notify_all()

    async def next_event(self, trial_id: str) -> TrialProgress | TrialEnd:
        """The next thing that the trial reports; its end is the last."""
        turn = self._running[trial_id]
        event = await turn.events.get()
        if isinstance(event, TrialEnd):
            self._forget(turn)
        return event

    async def stop(self, trial_id: str, limit_s: float) -> bool:
        """Stop a trial; True once all its workers have ended it, False after `limit_s` without."""
        turn = self._running.get(trial_id)
        if turn is None:
            return True
        turn.stop.set()
        try:
            await asyncio.wait_for(turn.over.wait(), limit_s)
        except TimeoutError:
            return False
        return True

    async def stop_all(self, limit_s: float) -> None:
        """Stop every trial that runs, and every one that is still to come.

        After `limit_s` their slots wait no longer for workers that wait for a store.
        """
        self._all_stopped = True
        turns = list(self._running.values())
        for turn in turns:
            turn.stop.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(turn.over.wait() for turn in turns)), limit_s)
        for turn in turns:
            if not turn.over.is_set():
                self._finish(turn, STOPPED)

    async def abandon(self, trial_id: str, limit_s: float, but: str | None = None) -> None:
        """Close the group of a slot that died with this trial; nothing where there is none, or it is group `but`.

        Returns once the trial's processes are gone: nobody else may write into its folder before.
        """
        for group_id, group in list(self._groups.items()):
            if group_id != but and group.newest and group.newest.task.trial_id == trial_id:
                await self.stop(trial_id, limit_s)
                await self.close_group(group_id)

    async def close_group(self, group_id: str) -> None:
        """Let the workers of a group go home."""
        group = self._groups.pop(group_id, None)
        if group is None:
            return
        group.closed = True
        if group.newest:
            group.newest.stop.set()
            if group.newest.over.is_set():
                self._forget(group.newest)
        async with group.changed:
            group.changed.notify_all()

    async def lose_group(self, group_id: str, reason: str, ranks: Collection[int]) -> object:
        """A worker or its node died: the trial of that group will hear no more from it.

        ranks: the workers that died, where that is known.
        Returns the room that it came up in, None where it is not known.
        """
        group = self._groups.get(group_id)
        if group is None:
            return None
        nodes = [node for rank, node in group.nodes.items() if rank in ranks or len(group.nodes) == 1]
        group.lost = TrialEnd(TrialStatus.PREEMPTED, reason, None, node=next(iter(nodes), None))
        if group.newest and not group.newest.over.is_set():
            self._finish(group.newest, group.lost)
        return group.room

    async def life(self) -> None:
        """Returns never: who waits for it hears of this actor's death."""
        await asyncio.Event().wait()

    # --- the worker's side ---

    async def come_up(self, group_id: str, rank: int, node: WorkerNode, room: object = None) -> None:
        """A worker is there, before all else that could fail; `room` is Ray's placement group."""
        if group := self._groups.get(group_id):
            group.nodes[rank] = node
            group.room = room

    async def next_assignment(self, group_id: str, rank: int, local_rank: int, turn: int) -> Assignment | None:
        """Wait for the trial after number `turn`; None: the group is closed."""
        group = self._groups.get(group_id)
        if group is None:
            return None
        async with group.changed:
            await group.changed.wait_for(lambda: group.closed or group.begun > turn)
        if group.closed:
            return None
        turn = min(number for number in group.turns if number > turn)
        meeting = f"{group_id}/{turn}"
        place = WorkerPlace(rank, group.workers, local_rank, group.store_host, group.store_port, meeting)
        return Assignment(turn, group.turns[turn].task, place)

    async def wait_for_stop(self, group_id: str, turn: int) -> None:
        """Return when the workers of this turn must end it, or when it is over anyway."""
        group = self._groups.get(group_id)
        if group and (waited_for := group.turns.get(turn)):
            await waited_for.stop.wait()

    async def send(self, group_id: str, turn_number: int, rank: int, message: TrialProgress | TrialEnd) -> None:
        """A worker reports."""
        group = self._groups.get(group_id)
        turn = group.turns.get(turn_number) if group else None
        if group is None or turn is None or turn.over.is_set():
            return
        if isinstance(message, TrialProgress):
            turn.events.put_nowait(message)
            return
        turn.ends[rank] = replace(message, node=group.nodes.get(rank))
        if message.status not in (TrialStatus.COMPLETED, TrialStatus.STOPPED):
            # The others wait for this one in a collective operation: end them too. One that stopped at its generation's
            # end has none to come, and the first may still be writing the checkpoint that the next one begins with.
            turn.stop.set()
        if len(turn.ends) == group.workers:
            self._finish(turn, combined_end(turn.ends))

    def _forget(self, turn: _Turn) -> None:
        # A slot that died may still be waiting for it, with another at work on its trial.
        if self._running.get(turn.task.trial_id) is turn:
            del self._running[turn.task.trial_id]

    def _finish(self, turn: _Turn, end: TrialEnd) -> None:
        turn.events.put_nowait(end)
        turn.over.set()
        turn.stop.set()


def combined_end(ends: dict[int, TrialEnd]) -> TrialEnd:
    """One end out of all workers' ends: a cause outweighs its consequences.

    A worker that ends takes the others with it: they were stopped, or failed in a collective operation. So did those of
    one that was killed, or whose storage failed, which may pass.
    """
    weight = [
        TrialStatus.OUT_OF_MEMORY,
        TrialStatus.DIVERGED,
        TrialStatus.PREEMPTED,
        TrialStatus.FAILED,
        TrialStatus.STOPPED,
        TrialStatus.COMPLETED,
    ]
    rank = min(ends, key=lambda rank: (weight.index(ends[rank].status), not ends[rank].may_pass, rank))
    first = ends.get(0)
    end = ends[rank]
    return replace(end, progress=end.progress or (first.progress if first else None))
