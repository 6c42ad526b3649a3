"""A trial's best weights put to use: answers to fixed prompts, and the tasks of lm-eval."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from orchestrator.config.sweep_config import DataConfig, EvaluateConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import InputError
from orchestrator.results.evaluation import Evaluation, Sample


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    """One trial's evaluation, as the node gets it that has room for it."""

    trial_id: str
    config: TrialConfig
    asked: EvaluateConfig
    weights: str
    """The folder of its adapter, or of the whole model."""
    chats: bool
    """Whether a prompt is a user's turn of the model's chat template."""
    best_ms: int | None
    """When the point was made whose adapter it is."""


def require(asked: EvaluateConfig) -> None:
    """Check before anything starts.

    Raises:
        InputError: lm-eval is asked for and not installed.
    """
    if asked.tasks and find_spec("lm_eval") is None:
        raise InputError("evaluate.tasks needs lm-eval: pip install 'lm-eval>=0.4.13,<0.5', or leave tasks out")


def chats(data: DataConfig) -> bool:
    """Prompts are written as the model was trained."""
    return data.format == "messages"


def evaluate(task: EvaluationTask, model_folder: Path) -> Evaluation:
    """Load the trial's base, in its own precision, with what it trained; answer and score.

    Raises:
        ModelError: the base cannot be loaded so.
    """
    from transformers import AutoTokenizer

    from orchestrator.training import device as devices
    from orchestrator.training import model as models
    from orchestrator.training.deepspeed_config import compute_dtype

    device = devices.choose(0, None, None)
    dtype = compute_dtype(task.config.precision, devices.half_precision(device))
    model = models.load_trained(task.config, model_folder, Path(task.weights), dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    started = time.monotonic()
    samples = tuple(
        Sample(prompt=prompt, completion=_answer(model, tokenizer, prompt, task)) for prompt in task.asked.prompts
    )
    scores = _scores(model, tokenizer, task.asked) if task.asked.tasks else {}
    seconds = time.monotonic() - started
    return Evaluation(asked=task.asked, samples=samples, scores=scores, seconds=seconds, best_ms=task.best_ms)


def _answer(model: Any, tokenizer: Any, prompt: str, task: EvaluationTask) -> str:
    """Greedy, so that trials differ by what they learned and nothing else."""
    import torch

    if task.chats:
        turn = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    known = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        written = model.generate(
            **known, max_new_tokens=task.asked.max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad
        )
    answer: str = tokenizer.decode(written[0, known["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer


def _scores(model: Any, tokenizer: Any, asked: EvaluateConfig) -> dict[str, float]:
    """Every number that lm-eval gives, by `TASK/METRIC`; one that has a filter has it after a comma."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer),
        tasks=list(asked.tasks),
        limit=asked.examples,
        task_manager=TaskManager(include_path=asked.task_folder),
        log_samples=False,
    )
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and not metric.startswith(("alias", "sample"))
    }
