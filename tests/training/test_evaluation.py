"""Trained weights put to use: in the precision that they were trained in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.config.sweep_config import EvaluateConfig
from orchestrator.results.evaluation import Evaluation
from orchestrator.results.folders import SweepFolder
from orchestrator.results.storage import read_sweep
from orchestrator.training import evaluation
from orchestrator.training.evaluation import EvaluationTask
from tests.training.test_export import a_sweep

PROMPTS = ("The list is", "A function")


def evaluated(folder: SweepFolder, tiny_model: Path, *, chats: bool) -> Evaluation:
    (trial,) = read_sweep(folder)[0].trials
    asked = EvaluateConfig(prompts=PROMPTS, max_new_tokens=5)
    weights = str(folder.trial(trial.trial_id).adapter)
    found = evaluation.evaluate(EvaluationTask(trial.trial_id, trial.config, asked, weights, chats, 17), tiny_model)
    assert (found.asked, found.best_ms) == (asked, 17)
    assert [sample.prompt for sample in found.samples] == list(PROMPTS)
    return found


@pytest.mark.parametrize("settings", [{}, {"rank": "full"}], ids=["adapter", "all weights"])
def test_prompts_are_answered_with_what_was_trained(settings: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, settings)
    weights = next(folder.trials()).adapter
    if settings:
        model = AutoModelForCausalLM.from_pretrained(weights)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), weights)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    ids = model.eval().generate(input_ids=inputs, max_new_tokens=5, do_sample=False)
    expected = tokenizer.decode(ids[0, inputs.shape[1] :], skip_special_tokens=True)
    assert evaluated(folder, tiny_model, chats=False).samples[0].completion == expected


def test_a_quantised_trial_answers_a_users_turn(tiny_model: Path, tmp_path: Path) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, {"precision": "nf4"})
    plain, turn = (evaluated(folder, tiny_model, chats=chats) for chats in (False, True))
    assert plain.samples != turn.samples
