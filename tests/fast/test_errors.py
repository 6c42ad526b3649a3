from __future__ import annotations

import pickle
import re

import pytest

from orchestrator import errors
from orchestrator.errors import OrchestratorError, Problem

REMEDY = re.compile(r"lower|mend|name|write|set|did you mean", re.IGNORECASE)
EXAMPLES = [
    errors.SweepFileError("a.yaml", (Problem("trial.rnk", "is no key; did you mean rank?", 3),)),
    errors.TrialOutOfMemoryError(3, 2**34, 2**30, 8),
    errors.TrialDivergedError(7, float("nan")),
    errors.TrialFailedError("RuntimeError: boom", "trials/x/log.txt"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_survives_pickling_and_names_a_remedy(error: OrchestratorError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))
    assert REMEDY.search(str(error))


def test_exit_codes_are_the_contracts() -> None:
    assert errors.SweepFileError.exit_code == errors.ModelError.exit_code == errors.FolderError.exit_code == 2
    assert errors.ClusterUnreachableError.exit_code == errors.StorageError.exit_code == 3
    assert errors.SweepInterruptedError.exit_code == 130
