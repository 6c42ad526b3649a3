"""What may change between two runs in one folder, and what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.sweep_file import to_yaml
from orchestrator.errors import FolderError
from orchestrator.results.records import TrialStatus
from orchestrator.results.storage import SweepFolder, write_atomically
from orchestrator.sweep.resume import changes, kept, read_earlier, require_same_question
from tests.made_up_sweep import simulated, write_made_up

BASE: dict[str, Any] = {
    "name": "made-up",
    "model": "builtin:tiny-llama",
    "data": {"train": "builtin:python-docs"},
    "trial": {"max_steps": 20},
    "space": {"rank": [4, 8]},
}
FOLDER = SweepFolder(Path("sweeps/made-up"))


def sweep(**keys: Any) -> SweepConfig:
    return SweepConfig.model_validate(BASE | keys)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"trial": {"max_steps": 40}}, "trial.max_steps was 20, now 40"),
        ({"trial": {"max_steps": 20, "learning_rate": 0.01}}, "trial.learning_rate was 0.0002, now 0.01"),
        ({"model": "builtin:smollm2-135m"}, "model was builtin:tiny-llama, now builtin:smollm2-135m"),
        ({"objective": {"metric": "loss"}}, "objective was metric='eval_loss'"),
        ({"data": {"train": "builtin:python-docs", "eval": 0.5}}, "data was "),
    ],
    ids=str,
)
def test_a_change_after_which_results_cannot_be_compared_is_refused_with_the_difference(
    keys: dict[str, Any], told: str
) -> None:
    with pytest.raises(FolderError) as caught:
        require_same_question(FOLDER, sweep(), sweep(**keys))
    assert told in str(caught.value)
    assert "--name" in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"space": {"rank": [4, 8, 16]}},
        {"space": {"rank": [4]}},
        {"space": {}, "trial": {"max_steps": 20, "rank": 4}},
        {"search": {"repeats": 3}},
        {"budget": {"hours": 1}},
        {"resources": {"max_concurrent": 1}},
        {"scheduler": {"asha": {"grace_steps": 5}}},
        {"question": "another"},
    ],
    ids=str,
)
def test_a_change_of_what_is_searched_or_spent_goes_on(keys: dict[str, Any]) -> None:
    assert list(changes(sweep(), sweep(**keys), knows_hardware=False)) == []
    require_same_question(FOLDER, sweep(), sweep(**keys))


def test_a_precision_that_follows_the_hardware_is_compared_once_it_is_known() -> None:
    before = sweep().on_hardware(has_gpus=False)
    require_same_question(FOLDER, before, sweep())
    require_same_question(FOLDER, before, sweep().on_hardware(has_gpus=False))
    with pytest.raises(FolderError, match=r"trial\.precision was fp32, now bf16"):
        require_same_question(FOLDER, before, sweep(trial={"max_steps": 20, "precision": "bf16"}))


def test_on_other_hardware_a_precision_that_follows_it_is_another(tmp_path: Path) -> None:
    before = sweep().on_hardware(has_gpus=False)
    with pytest.raises(FolderError, match=r"trial\.precision was fp32, now bf16"):
        require_same_question(FOLDER, before, sweep().on_hardware(has_gpus=True), knows_hardware=True)


def test_results_without_their_sweep_file_are_not_written_over(tmp_path: Path) -> None:
    folder = write_made_up(tmp_path, simulated([2.0], 1, 0))
    with pytest.raises(FolderError, match=r"holds results and no sweep\.yaml"):
        read_earlier(folder)


def test_results_that_the_file_no_longer_asks_for_stay_and_open_trials_are_closed(tmp_path: Path) -> None:
    statuses = [TrialStatus.COMPLETED, TrialStatus.RUNNING, TrialStatus.INFEASIBLE, TrialStatus.COMPLETED]
    made_up = simulated([2.0, 2.1, 2.2, 2.3], 1, 0, status_of=lambda place, _: statuses[place])
    folder = write_made_up(tmp_path, made_up)
    write_atomically(folder.sweep_file, to_yaml(sweep()))
    earlier = read_earlier(folder)
    assert earlier is not None
    completed, running, _, planned = (trial.trial_id for trial in made_up.trials)
    left = kept(earlier, frozenset({planned}))
    assert {identity: record.status for identity, record in left.items()} == {
        completed: TrialStatus.COMPLETED,
        running: TrialStatus.CANCELLED,
    }
    assert left[running].reason


def test_a_folder_whose_summary_is_lost_goes_on_from_the_trials_records(tmp_path: Path) -> None:
    made_up = simulated([2.0, 2.1], 1, 0)
    folder = write_made_up(tmp_path, made_up)
    write_atomically(folder.sweep_file, to_yaml(sweep()))
    folder.results_json.write_text("{")
    earlier = read_earlier(folder)
    assert earlier is not None
    assert earlier.result is None
    assert set(earlier.trials) == {trial.trial_id for trial in made_up.trials}
