from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

pytest.importorskip("ray")

from orchestrator.cli import app
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.errors import InputError
from orchestrator.planning.hardware import named_gpu
from orchestrator.planning.model_shape import shape_of
from orchestrator.planning.plan import plan_sweep
from orchestrator.sweep import gpu_choice
from orchestrator.sweep.gpu_choice import candidates, chosen, has_type, type_of
from tests.fast.cases import LLAMA_2_7B

T4 = {"CPU": 16.0, "GPU": 4.0, "accelerator_type:T4": 1.0}
A100 = {"CPU": 16.0, "GPU": 8.0, "accelerator_type:A100": 1.0, "accelerator_type:A100-80G": 1.0}


@pytest.mark.parametrize(
    ("node", "kind"), [(T4, "T4"), (A100, "A100-80G"), ({"CPU": 8.0}, None), ({"CPU": 8.0, "GPU": 1.0}, None)]
)
def test_a_node_has_the_type_that_says_most(node: dict[str, float], kind: str | None) -> None:
    assert type_of(node) == kind
    assert has_type(node, kind)


def test_a_type_that_no_node_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match="has A100-80G, T4: name one of its own"):
        candidates([T4, A100], "H100")


def sweep_on(gpu: str, count: int = 4, workers: int = 1, **trial: object) -> object:
    resources = {"gpus_per_worker": 1, "workers_per_trial": workers}
    raw = {"name": "x", "model": "m", "data": {"train": "d"}, "trial": trial, "resources": resources}
    return plan_sweep(SweepConfig.model_validate(raw), shape_of(LLAMA_2_7B), named_gpu(gpu, count))


def test_the_smallest_type_is_taken_on_which_as_many_trials_run_as_on_any() -> None:
    small = {"precision": "nf4", "micro_batch_size": 1, "sequence_length": 128, "gradient_checkpointing": True}
    assert chosen({gpu: sweep_on(gpu, **small) for gpu in ("A100", "T4", "L4")}) == "T4"
    large = {"precision": "bf16", "micro_batch_size": 1, "sequence_length": 128}
    assert chosen({gpu: sweep_on(gpu, **large) for gpu in ("A100", "T4", "L4")}) == "L4"


def test_a_type_of_which_a_trial_wants_more_than_there_are_is_passed_over() -> None:
    small = {"precision": "nf4", "micro_batch_size": 1, "sequence_length": 128, "gradient_checkpointing": True}
    assert chosen({"T4": sweep_on("T4", 1, 2, **small), "L4": sweep_on("L4", 2, 2, **small)}) == "L4"


def test_the_nodes_of_a_cluster_are_not_filled_up_as_those_of_a_gpu_that_is_only_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a node with a GPU answers is its data sheet's here.
    monkeypatch.setattr(gpu_choice.ray, "remote", lambda **_: lambda look: SimpleNamespace(remote=look))
    monkeypatch.setattr(gpu_choice.ray, "get", lambda found: found)
    monkeypatch.setattr(gpu_choice.hardware_module, "this_machine", lambda: named_gpu("A100", 6))
    six = {"CPU": 96.0, "GPU": 6.0}
    assert candidates([six, six], None)[None].each_node == ((96, 6), (96, 6))


def test_a_plan_is_made_for_the_type_that_the_sweep_file_asks_for() -> None:
    command = ["plan", "search_spaces/lora_rank.yaml", "--set", "resources.accelerator=T4", "--gpus", "2", "--json"]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout)["hardware"].startswith("2 × T4")
