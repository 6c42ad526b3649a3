from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace

import pytest

pytest.importorskip("ray")

from orchestrator.config.trial_config import TrialConfig
from orchestrator.results.records import TrialStatus
from orchestrator.sweep.switchboard import Switchboard, combined_end
from orchestrator.training.task import TrialEnd, TrialTask, WorkerNode

COMPLETED = TrialEnd(TrialStatus.COMPLETED, None, None)
FAILED = TrialEnd(TrialStatus.FAILED, "boom", None)
TASK = TrialTask("t-0", TrialConfig(), "model", "data", "trials/t-0", "eval_loss", "min")
LIMIT_S = 1.0


def play(scene: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 5))  # type: ignore[arg-type]


async def a_group_at_work(workers: int) -> Switchboard:
    board = Switchboard()
    await board.open_group("g", workers, "host", 1)
    await board.assign("g", TASK)
    return board


def test_a_worker_that_waits_gets_the_next_trial_with_its_place() -> None:
    async def scene() -> None:
        board = Switchboard()
        await board.open_group("g", 2, "host", 7)
        waiting = asyncio.create_task(board.next_assignment("g", 1, 1, 0))
        await board.assign("g", TASK)
        assignment = await waiting
        assert assignment is not None
        assert assignment.task == TASK
        place = assignment.place
        assert (place.rank, place.world_size, place.store_host, place.store_port) == (1, 2, "host", 7)

    play(scene())


def test_a_trial_ends_once_all_its_workers_have() -> None:
    async def scene() -> None:
        board = await a_group_at_work(2)
        await board.send("g", 1, 0, COMPLETED)
        end = asyncio.create_task(board.next_event("t-0"))
        await asyncio.sleep(0)
        assert not end.done()
        await board.send("g", 1, 1, COMPLETED)
        assert await end == COMPLETED

    play(scene())


def test_a_worker_that_fails_stops_the_others_which_wait_for_it() -> None:
    async def scene() -> None:
        board = await a_group_at_work(2)
        other = asyncio.create_task(board.wait_for_stop("g", 1))
        await board.send("g", 1, 1, FAILED)
        await other
        assert other.done()

    play(scene())


def test_a_worker_that_stops_at_its_generations_end_lets_the_others_write_their_checkpoint() -> None:
    async def scene() -> None:
        board = await a_group_at_work(2)
        other = asyncio.create_task(board.wait_for_stop("g", 1))
        await board.send("g", 1, 1, TrialEnd(TrialStatus.STOPPED, "its generation ended", None))
        await asyncio.sleep(0)
        assert not other.done()
        await board.send("g", 1, 0, TrialEnd(TrialStatus.PREEMPTED, "the storage failed", None))
        assert (await board.next_event("t-0")).status is TrialStatus.PREEMPTED
        await other

    play(scene())


def test_a_group_that_has_served_many_trials_holds_none_of_them() -> None:
    async def scene() -> None:
        board = await a_group_at_work(1)
        for number in range(1, 51):
            assignment = await board.next_assignment("g", 0, 0, number - 1)
            assert assignment is not None
            assert assignment.turn == number
            await board.send("g", number, 0, COMPLETED)
            assert await board.next_event("t-0") == COMPLETED
            await board.assign("g", TASK)
        assert list(board._groups["g"].turns) == [51]
        # Nobody waits for what is over.
        await board.wait_for_stop("g", 7)

    play(scene())


def test_a_trial_that_was_stopped_from_outside_is_held_until_its_group_has_the_next_or_goes() -> None:
    async def scene() -> None:
        board = await a_group_at_work(1)
        assert not await board.stop("t-0", 0.01)
        await board.send("g", 1, 0, TrialEnd(TrialStatus.STOPPED, "stopped", None))
        assert await board.stop("t-0", LIMIT_S)
        assert (await board.next_event("t-0")).status is TrialStatus.STOPPED

        await board.assign("g", replace(TASK, trial_id="t-1"))
        await board.send("g", 2, 0, TrialEnd(TrialStatus.STOPPED, "stopped", None))
        await board.assign("g", replace(TASK, trial_id="t-2"))
        assert list(board._running) == ["t-2"]
        await board.send("g", 3, 0, TrialEnd(TrialStatus.STOPPED, "stopped", None))
        await board.close_group("g")
        assert board._running == {}

    play(scene())


def test_a_worker_that_is_late_finds_the_trial_that_it_has_not_ended() -> None:
    async def scene() -> None:
        board = await a_group_at_work(2)
        await board.send("g", 1, 0, COMPLETED)
        assert not await board.stop("t-0", 0.01)
        await board.assign("g", replace(TASK, trial_id="t-1"))
        late = await board.next_assignment("g", 1, 1, 0)
        assert late is not None
        assert (late.turn, late.task.trial_id) == (1, "t-0")
        await board.wait_for_stop("g", 1)

    play(scene())


def test_a_stop_is_confirmed_only_when_the_workers_have_ended() -> None:
    async def scene() -> None:
        board = await a_group_at_work(1)
        stop = asyncio.create_task(board.stop("t-0", LIMIT_S))
        await board.wait_for_stop("g", 1)
        assert not stop.done()
        await board.send("g", 1, 0, TrialEnd(TrialStatus.STOPPED, "stopped", None))
        assert await stop

    play(scene())


def test_a_stop_that_nobody_hears_returns_after_its_limit() -> None:
    async def scene() -> None:
        board = await a_group_at_work(1)
        assert not await board.stop("t-0", 0.01)

    play(scene())


def test_a_lost_group_ends_its_trial_as_preempted() -> None:
    async def scene() -> None:
        board = await a_group_at_work(2)
        await board.lose_group("g", "node gone", ())
        event = await board.next_event("t-0")
        assert event == TrialEnd(TrialStatus.PREEMPTED, "node gone", None)

    play(scene())


def test_a_closed_group_sends_its_workers_home() -> None:
    async def scene() -> None:
        board = Switchboard()
        await board.open_group("g", 1, "host", 1)
        waiting = asyncio.create_task(board.next_assignment("g", 0, 0, 0))
        await asyncio.sleep(0)
        await board.close_group("g")
        assert await waiting is None
        assert await board.next_assignment("g", 0, 0, 0) is None

    play(scene())


def test_the_cause_outweighs_its_consequences() -> None:
    oom = TrialEnd(TrialStatus.OUT_OF_MEMORY, "no memory", None)
    stopped = TrialEnd(TrialStatus.STOPPED, "stopped", None)
    assert combined_end({0: FAILED, 1: oom, 2: stopped}).status is TrialStatus.OUT_OF_MEMORY
    assert combined_end({0: COMPLETED, 1: stopped}).status is TrialStatus.STOPPED


@pytest.mark.parametrize(
    "cause",
    [
        TrialEnd(TrialStatus.FAILED, "its process was killed from outside", None, may_pass=True),
        TrialEnd(TrialStatus.PREEMPTED, "the storage failed", None),
    ],
)
def test_a_trial_is_tried_again_where_the_first_worker_failed_because_of_what_came_from_outside(
    cause: TrialEnd,
) -> None:
    broken = TrialEnd(TrialStatus.FAILED, "Connection closed by peer", None)
    assert combined_end({0: broken, 1: cause}) == cause


def test_a_trial_that_is_given_to_a_group_that_is_lost_hears_so() -> None:
    async def scene() -> None:
        board = await a_group_at_work(1)
        await board.send("g", 1, 0, COMPLETED)
        assert await board.next_event("t-0") == COMPLETED
        await board.lose_group("g", "its node died", ())
        await board.assign("g", TASK)
        end = await board.next_event("t-0")
        assert isinstance(end, TrialEnd)
        assert end.status is TrialStatus.PREEMPTED

    play(scene())


def test_an_attempt_that_begins_after_all_was_stopped_ends_at_once() -> None:
    async def scene() -> None:
        board = await a_group_at_work(1)
        stopping = asyncio.create_task(board.stop_all(60.0))
        await board.wait_for_stop("g", 1)
        await board.send("g", 1, 0, FAILED)
        await stopping
        assert await board.next_event("t-0") == FAILED
        await board.assign("g", TASK)
        end = await board.next_event("t-0")
        assert isinstance(end, TrialEnd)
        assert end.status is TrialStatus.STOPPED

    play(scene())


def test_a_slot_does_not_wait_for_a_worker_that_does_not_come_to_an_end_once_all_is_stopped() -> None:
    async def scene() -> None:
        board = await a_group_at_work(1)
        await board.stop_all(0.0)
        end = await board.next_event("t-0")
        assert isinstance(end, TrialEnd)
        assert end.status is TrialStatus.STOPPED

    play(scene())


def test_an_end_names_the_node_of_the_worker_that_caused_it() -> None:
    async def scene() -> None:
        board = await a_group_at_work(2)
        for rank in (0, 1):
            await board.come_up("g", rank, WorkerNode(f"node-{rank}", "host"))
        await board.send("g", 1, 1, FAILED)
        await board.send("g", 1, 0, TrialEnd(TrialStatus.STOPPED, "stopped", None))
        end = await board.next_event("t-0")
        assert isinstance(end, TrialEnd)
        assert (end.status, end.node) == (TrialStatus.FAILED, WorkerNode("node-1", "host"))

    play(scene())


@pytest.mark.parametrize(("lost", "node"), [((1,), WorkerNode("node-1", "host")), ((), None)])
def test_a_lost_group_names_the_node_of_the_worker_that_died_where_it_is_known(
    lost: tuple[int, ...], node: WorkerNode | None
) -> None:
    async def scene() -> None:
        board = await a_group_at_work(2)
        for rank in (0, 1):
            await board.come_up("g", rank, WorkerNode(f"node-{rank}", "host"))
        await board.lose_group("g", "a worker died", lost)
        end = await board.next_event("t-0")
        assert isinstance(end, TrialEnd)
        assert end.node == node

    play(scene())


def test_the_group_of_a_slot_that_died_is_closed_before_another_slot_takes_its_trial() -> None:
    async def scene() -> None:
        board = await a_group_at_work(1)
        dead_slot = asyncio.create_task(board.next_event("t-0"))
        told = asyncio.create_task(board.wait_for_stop("g", 1))
        abandoned = asyncio.create_task(board.abandon("t-0", LIMIT_S))
        await told
        assert not abandoned.done()
        await board.send("g", 1, 0, TrialEnd(TrialStatus.STOPPED, "stopped", None))
        await abandoned
        assert await board.next_assignment("g", 0, 0, 1) is None
        await dead_slot

        await board.open_group("h", 1, "host", 1)
        await board.assign("h", TASK)
        await board.send("h", 1, 0, COMPLETED)
        assert await board.next_event("t-0") == COMPLETED

    play(scene())


def test_a_slot_that_takes_the_same_trial_again_keeps_its_own_group() -> None:
    async def scene() -> None:
        board = await a_group_at_work(1)
        await board.send("g", 1, 0, COMPLETED)
        await board.abandon("t-0", LIMIT_S, but="g")
        await board.assign("g", TASK)
        assert await board.next_assignment("g", 0, 0, 1) is not None

    play(scene())
