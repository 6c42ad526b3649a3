"""Following a job over connections that break; the server is a stand-in that breaks them when it is told to."""

from __future__ import annotations

import asyncio
import platform
import signal
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("ray")

import aiohttp
import ray
from aiohttp import web

from orchestrator.errors import ClusterUnreachableError, InputError
from orchestrator.submit import server
from orchestrator.submit.server import JobServer, follow

LOG = ["one\n", "two\nthree\n", "four\n"]


class JobApi:
    """Ray's job API as far as `follow` asks it: every connection but the last breaks after its first lines."""

    def __init__(self) -> None:
        self.version: object = {"version": "4", "ray_version": ray.__version__, "ray_commit": ""}
        self.metadata: object = {"data": {"pythonVersion": platform.python_version()}}
        self.jobs: object = []
        self.connections_left = 3
        self.end: dict[str, object] = {"status": "SUCCEEDED", "driver_exit_code": 0}
        self.first_line_takes_s = 0.0
        self.failing_questions = 0
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        self.connections_left -= 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await asyncio.sleep(self.first_line_takes_s)
        for lines in LOG if not self.connections_left else LOG[: 3 - self.connections_left]:
            await socket.send_str(lines)
        return socket

    async def _job(self, request: web.Request) -> web.Response:
        if self.failing_questions:
            self.failing_questions -= 1
            raise web.HTTPServiceUnavailable
        running = {"status": "RUNNING", "driver_exit_code": None}
        return web.json_response(
            {"type": "SUBMISSION", "entrypoint": "", **(running if self.connections_left else self.end)}
        )

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response(self.version)

    async def _metadata(self, request: web.Request) -> web.Response:
        return web.json_response(self.metadata)

    async def _jobs(self, request: web.Request) -> web.Response:
        return web.json_response(self.jobs)

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/v0/cluster_metadata", self._metadata)
        app.router.add_get("/api/jobs/", self._jobs)
        app.router.add_get("/api/jobs/j", self._job)
        app.router.add_get("/api/jobs/j/logs/tail", self._tail)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    def start(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def fall_silent(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)

    def close(self) -> None:
        self.fall_silent()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobApi]:
    monkeypatch.setattr(server, "RETRY_S", 0.01)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    api = JobApi()
    api.start()
    yield api
    api.close()


def test_a_connection_that_breaks_is_opened_again_and_no_line_is_lost_or_shown_twice(api: JobApi) -> None:
    shown: list[str] = []
    assert follow(JobServer(api.address), "j", shown.append, print) == 0
    assert "".join(shown) == "".join(LOG)
    assert api.connections_left == 0


def test_the_address_that_is_given_outweighs_rays_variables(api: JobApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert follow(JobServer(f"{api.address}/"), "j", lambda lines: None, print) == 0


def test_a_job_that_the_cluster_could_not_run_is_told_with_its_reason(api: JobApi) -> None:
    api.end = {"status": "FAILED", "driver_exit_code": None, "message": "the environment cannot be made"}
    with pytest.raises(ClusterUnreachableError, match=r"job j .*the environment cannot be made"):
        follow(JobServer(api.address), "j", lambda lines: None, print)


@pytest.mark.parametrize("exit_code", [-9, 137])
def test_a_driver_that_was_killed_is_told_as_a_job_that_the_cluster_ended(api: JobApi, exit_code: int) -> None:
    message = f"Job entrypoint command failed with exit code {exit_code}"
    api.end = {"status": "FAILED", "driver_exit_code": exit_code, "message": message}
    with pytest.raises(ClusterUnreachableError, match=f"job j was ended by the cluster: {message}") as caught:
        follow(JobServer(api.address), "j", lambda lines: None, print)
    assert caught.value.exit_code == 3


def test_packages_that_the_cluster_lacks_are_told_with_the_flag_that_installs_them(api: JobApi) -> None:
    api.end = {"status": "FAILED", "driver_exit_code": 1, "message": "ModuleNotFoundError: No module named 'peft'"}
    said: list[str] = []
    assert follow(JobServer(api.address), "j", lambda lines: None, said.append) == 1
    assert "--install-requirements" in said[0]


def test_a_cluster_that_falls_silent_is_given_up_after_its_limit(api: JobApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LOST_LIMIT_S", 0.2)
    reached = JobServer(api.address)
    api.fall_silent()
    with pytest.raises(ClusterUnreachableError, match="job j goes on where its head lives"):
        follow(reached, "j", lambda lines: None, print)


def test_a_log_that_was_read_for_longer_than_the_limit_of_a_silent_cluster_counts_nothing_towards_it(
    api: JobApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LOST_LIMIT_S", 0.2)
    api.first_line_takes_s, api.failing_questions = 0.3, 2
    assert follow(JobServer(api.address), "j", lambda lines: None, print) == 0
    assert api.failing_questions == 0


def test_a_reader_that_goes_away_ends_the_showing(api: JobApi) -> None:
    def gone(lines: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        follow(JobServer(api.address), "j", gone, print)


def test_a_ctrl_c_that_comes_together_with_a_line_ends_the_showing(
    api: JobApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = aiohttp.ClientWebSocketResponse.receive

    async def interrupted(socket: aiohttp.ClientWebSocketResponse) -> aiohttp.WSMessage:
        message = await receive(socket)
        signal.raise_signal(signal.SIGINT)
        return message

    monkeypatch.setattr(aiohttp.ClientWebSocketResponse, "receive", interrupted)
    said: list[str] = []
    assert follow(JobServer(api.address), "j", lambda lines: None, said.append) == 130
    assert "job j goes on" in said[0]


def test_a_second_signal_close_behind_the_first_cuts_nothing_of_what_is_said(api: JobApi) -> None:
    """As `timeout -s INT` sends them."""
    said: list[str] = []

    def say(line: str) -> None:
        signal.raise_signal(signal.SIGINT)
        said.append(line)

    def show(lines: str) -> None:
        raise KeyboardInterrupt

    assert follow(JobServer(api.address), "j", show, say) == 130
    assert [line.split()[0] for line in said] == ["no", "stop"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_cluster_of_another_ray_is_refused(api: JobApi) -> None:
    api.version = {"version": "4", "ray_version": "2.9.3", "ray_commit": ""}
    with pytest.raises(InputError, match=r"runs Ray 2\.9\.3.*made for Ray"):
        JobServer(api.address)


def test_something_that_is_no_dashboard_is_told(api: JobApi) -> None:
    with pytest.raises(ClusterUnreachableError, match="not as Ray's dashboard"):
        JobServer(f"{api.address}/elsewhere")


@pytest.mark.parametrize(
    "answers",
    [
        *({"version": version} for version in ({}, [], None, {"ray_version": 2})),
        *({"metadata": metadata} for metadata in ([], {"data": None}, {"data": {"pythonVersion": "weird"}})),
        *({"jobs": jobs} for jobs in ([{"a": 1}], {"a": 1}, None)),
    ],
    ids=str,
)
def test_something_that_answers_in_json_and_is_no_dashboard_is_told(api: JobApi, answers: dict[str, object]) -> None:
    vars(api).update(answers)
    with pytest.raises(ClusterUnreachableError, match=r"answers, but not as Ray's dashboard .*check --address"):
        JobServer(api.address).jobs()
