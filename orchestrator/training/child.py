"""The process of one trial: forked from a template that holds the imports, and never longer-lived than its worker."""

from __future__ import annotations

import ctypes
import signal
from multiprocessing.connection import Connection

from orchestrator.training.task import Alive, TrialEnd, TrialProgress, TrialTask, WorkerPlace

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_child(task: TrialTask, place: WorkerPlace, reports: Connection) -> None:
    """Run one worker's part of a trial and send its reports through the pipe."""
    # The parent is the template, which ends with the worker: a killed worker takes its trial along, GPU memory and all.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C in the terminal reaches every process of the group: the sweep alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from orchestrator.training import worker_process

    def send(message: TrialProgress | TrialEnd | Alive) -> None:
        reports.send(message)

    worker_process.run(task, place, send)
