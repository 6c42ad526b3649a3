"""What the machine that runs the sweep is doing, as MLflow's own system metrics on the parent run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

FINISH_LIMIT_S = 2.0


@contextmanager
def logged(tracking_uri: str, run_id: str) -> Iterator[None]:
    """Sample every 10 s while the block runs, and go on where an earlier run of the sweep left off.

    A server that does not answer ends the samples and nothing else.
    """
    # It tells of its start and its end, that there is no GPU, and of a database that fails.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=tracking_uri)
    monitor.start()
    try:
        yield
    finally:
        # With a silent server it waits for each of its requests, past the 30 s that Kubernetes gives to end (3.17.2).
        finishing = threading.Thread(target=monitor.finish, daemon=True)
        finishing.start()
        finishing.join(FINISH_LIMIT_S)
