"""How long MLflow is waited for, what of it is tried again, and whose a failure is."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import TypeVar

from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy.exc import OperationalError

from orchestrator.errors import StorageError
from orchestrator.sweep import failure_policy

Answer = TypeVar("Answer")
ANSWER_LIMIT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
"""MLflow's own variable: seconds for each of its calls, a file's upload too."""
WHOLE_ANSWER_LIMIT_S = 60.0


def twice(ask: Callable[[], Answer]) -> Answer:
    """Once more where the server fails: what is asked looks first whether it is there (`keep_mlflow_short`)."""
    try:
        return ask()
    except Exception as error:
        if not is_servers(error):
            raise
    time.sleep(failure_policy.pause_s(1))
    # Not while the first error is handled: one of another thread would lose what it was caused by.
    return ask()


def in_time(ask: Callable[[], Answer], uri: str) -> Answer:
    """What a server answers: MLflow's own limit is one for each read, and an answer may come a byte at a time."""
    if not uri.startswith("http"):
        return ask()
    answer: Future[Answer] = Future()

    def wait() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()
    limit_s = max(WHOLE_ANSWER_LIMIT_S, 3 * float(os.environ[ANSWER_LIMIT]))
    if not wait_for([answer], limit_s).done:
        raise TimeoutError(f"no whole answer in {limit_s:g} s")
    return answer.result()


@contextlib.contextmanager
def time_to_upload(files: Iterable[Path], late: int = 0) -> Iterator[None]:
    """Within it MLflow waits as long as the largest of these files may take."""
    # It reads the variable at each call, and its calls for files take no other limit (3.17.2, http_artifact_repo.py).
    keep_mlflow_short()
    before = os.environ[ANSWER_LIMIT]
    largest_bytes = max((file.stat().st_size for file in files), default=0)
    os.environ[ANSWER_LIMIT] = str(math.ceil(failure_policy.upload_limit_s(float(before), largest_bytes, late)))
    try:
        yield
    finally:
        os.environ[ANSWER_LIMIT] = before


def keep_mlflow_short() -> None:
    """In its tries and in what it says."""
    # MLflow itself would try for four minutes, and make a run twice where only the answer was late (3.17.2,
    # utils/request_utils.py): the Tracker tries again itself, and looks first whether it is there.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault(ANSWER_LIMIT, "10")
    # Every run that ends is told on stdout otherwise, where the sweep's answer goes alone.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # A new database tells of its tables otherwise.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    # Of a database that is locked or fails, statement and stack: the Tracker tells it in a line.
    logging.getLogger("mlflow.store.db.utils").addFilter(_is_without_stack)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Of a model that is logged, each step of it.
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    # Of a server that is away, each try that is made again: the Tracker tells once that it is away.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def _is_without_stack(record: logging.LogRecord) -> bool:
    return record.exc_info is None


def is_servers(error: Exception) -> bool:
    """Whether it tells of the server, or of the database or package that it needs, and is no slip of ours."""
    is_known = isinstance(error, MlflowException | OSError | ImportError) or is_misread(error)
    return is_known or type(error).__module__.startswith("sqlalchemy")


def is_misread(error: Exception) -> bool:
    """Whether an answer was JSON of other types than MLflow's, which it does not tell in an error of its own."""
    return type(error).__module__.startswith("google.protobuf")


def may_come_up(error: BaseException | None) -> bool:
    """Whether no server answered, or the database refused the connection: a login or a package comes not by itself."""
    # MLflow tells what its HTTP client met by its words alone (3.17.2, utils/rest_utils.py).
    met = error.__context__ if isinstance(error, MlflowException) else error
    return isinstance(met, RequestException | OperationalError)


def failure_meant(error: Exception) -> failure_policy.TrackingFailure:
    """What follows from it: a server that is away is asked again, one that refuses is told of."""
    if isinstance(error, StorageError):
        return "away"
    if is_servers(error) and not isinstance(error, ImportError):
        return failure_policy.tracking_failure(getattr(error, "error_code", None))
    return "refused"
