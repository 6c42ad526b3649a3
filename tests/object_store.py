"""A real S3 server, moto's; what names it stands in the environment, as for AWS's own."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import requests

from tests.tracking_servers import free_port
from tests.waiting import wait_until

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer

BUCKET = "bucket"


@contextmanager
def started_store(host: str = "127.0.0.1") -> Iterator[dict[str, str]]:
    """A store with one bucket, at an address of ours; yields the variables that name it, which are set here too."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", host, "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with _reached_at(host, port) as variables:
            yield variables
    finally:
        process.kill()
        process.wait()


@contextmanager
def fragile_store() -> Iterator[ThreadedMotoServer]:
    """As `started_store`, within this process: what was `stop`ped has its objects when it is `start`ed again."""
    from moto.server import ThreadedMotoServer

    host, port = "127.0.0.1", free_port()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = ThreadedMotoServer(host, port, verbose=False)
    store.start()
    try:
        wait_until(lambda: _answers(host, port), bool, 60)
        # Moto keeps the objects of an earlier store in this process.
        requests.post(f"http://{host}:{port}/moto-api/reset", timeout=10).raise_for_status()
        with _reached_at(host, port):
            yield store
    finally:
        if _answers(host, port):
            store.stop()


@contextmanager
def _reached_at(host: str, port: int) -> Iterator[dict[str, str]]:
    variables = {
        "AWS_ACCESS_KEY_ID": "an-id",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        wait_until(lambda: _answers(host, port), bool, 60)
        _make_bucket(variables["AWS_ENDPOINT_URL"])
        yield variables
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def _make_bucket(endpoint: str) -> None:
    from pyarrow import fs

    store = fs.S3FileSystem(region="us-east-1", endpoint_override=endpoint, allow_bucket_creation=True)
    store.create_dir(BUCKET)
