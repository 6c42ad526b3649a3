"""The right name for a wrong one: what is spelled nearly so, or what other tools of this field call the same thing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from orchestrator.errors import cut

OTHER_NAMES = {
    # transformers' TrainingArguments, PEFT's LoraConfig, TRL's SFTConfig, Ray Tune's, and what people write by hand
    "attn_implementation": "attention",
    "batch_size": "global_batch_size",
    "epochs": "max_steps",
    "eval_steps": "eval_every",
    "grace": "grace_steps",
    "grace_period": "grace_steps",
    "gradient_accumulation_steps": "global_batch_size",
    "lora_alpha": "alpha",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_schedule",
    "max_length": "sequence_length",
    "max_seq_length": "sequence_length",
    "num_train_epochs": "max_steps",
    "optim": "optimizer",
    "per_device_train_batch_size": "micro_batch_size",
    "r": "rank",
    "use_dora": "dora",
    "use_rslora": "rslora",
    # precisions
    "4bit": "nf4",
    "8bit": "int8",
    "fp4": "nf4",
    "int4": "nf4",
    "qlora": "nf4",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean rank?`, or nothing where no known name is near."""
    names = [str(k) for k in known]
    other = OTHER_NAMES.get(name.lower())
    found = [other] if other in names else difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {cut(found[0])}?" if found else ""
