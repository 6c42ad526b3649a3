"""Trained weights put to use: in the precision that they were trained in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.config.sweep_config import EvaluateConfig
from orchestrator.training import evaluation
from orchestrator.training.evaluation import EvaluationTask
from tests.training.test_export import a_sweep

PROMPTS = ("The list is", "A function")


@pytest.mark.parametrize(
    "settings", [{}, {"precision": "nf4"}, {"rank": "full"}], ids=["adapter", "nf4 adapter", "all weights"]
)
@pytest.mark.parametrize("chats", [False, True])
def test_prompts_are_answered_with_what_was_trained(
    settings: dict[str, Any], chats: bool, tiny_model: Path, tmp_path: Path
) -> None:
    folder = a_sweep(tmp_path / "sweep", tiny_model, settings)
    (trial,) = (where for where in folder.trials())
    config = _config(folder)
    asked = EvaluateConfig(prompts=PROMPTS, max_new_tokens=5)
    task = EvaluationTask(trial.root.name, config, asked, str(trial.adapter), chats)
    found = evaluation.evaluate(task, tiny_model)
    assert [sample.prompt for sample in found.samples] == list(PROMPTS)
    assert found.asked == asked
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert all(len(tokenizer(sample.completion)["input_ids"]) <= 8 for sample in found.samples)
    if not settings and not chats:
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        model = PeftModel.from_pretrained(base, trial.adapter).eval()
        inputs = tokenizer(PROMPTS[0], return_tensors="pt")
        ids = model.generate(input_ids=inputs["input_ids"], max_new_tokens=5, do_sample=False)
        expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found.samples[0].completion == expected


def _config(folder: Any) -> Any:
    from orchestrator.results.storage import read_sweep

    return read_sweep(folder)[0].trials[0].config
