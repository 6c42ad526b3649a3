"""An adapter merged into its base; torch, transformers and peft are imported where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from orchestrator.config.trial_config import Precision
from orchestrator.errors import InputError, ModelError, StorageError, cut
from orchestrator.results.records import TrialResult
from orchestrator.training.quiet import quiet_libraries


@quiet_libraries()
def merge(base: str, adapter: Path, trial: TrialResult, to: Path) -> None:
    """W + B·A·scaling in the weights' own dtype.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; peft 0.21.2, tuners/tuners_utils.py, merge_and_unload.
    """
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    dtype = merged_dtype(trial.config.precision)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"the base model in {base} cannot be loaded: {error}") from error
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:
        # PEFT checks nothing of what it reads: of a damaged file come a KeyError, a TypeError and more.
        raise InputError(
            f"the adapter in {adapter} is damaged, or not one of {base} ({cut(str(error))}): name another with --trial"
        ) from error
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the adapter of trial {trial.trial_id} cannot be merged into {base}: {error}; "
            "leave --merge out, or name another with --trial"
        ) from error
    try:
        merged.save_pretrained(to)
    except SafetensorError as error:
        raise StorageError(f"cannot write {to} ({error}): free some space there, or name another --to") from error


def merged_dtype(precision: Precision) -> Literal["float32", "bfloat16", "float16", "auto"]:
    """The dtype of the trial's own weights; `auto` is that of the base as published.

    A quantised base is merged unquantised: adding to 4 or 8 bits would round the adapter away.
    """
    if precision.is_quantized:
        return "auto"
    if precision is Precision.BF16:
        return "bfloat16"
    return "float16" if precision is Precision.FP16 else "float32"
