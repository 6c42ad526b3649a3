"""How far the memory estimate is from what published runs measured.

    python benchmarks/memory_accuracy.py [benchmarks/data/measured_points.csv]

Each row of another framework is brought to our settings by what that framework does (see `_trial`, `_adapted`); no row
is fitted on its own. Beside ours stand the rule of thumb (16 bytes a weight for bf16 LoRA's 2, QLoRA's 0.5, each with a
fifth on top) and DeepSpeed's estimator, which takes all weights as trained.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.memory import (
    FRAGMENTATION,
    FRAGMENTATION_SHARDED,
    MemoryEstimate,
    _bytes_of,
    estimate,
    memory_parts,
)
from orchestrator.planning.model_shape import ModelShape, shape_of

GIB = 2**30
Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Point:
    """One measured row and what is predicted of it, in bytes."""

    row: Row
    measured: float
    ours: float
    low: float
    high: float
    rule_of_thumb: float
    deepspeed: float


def read(path: Path) -> list[Row]:
    """The rows that have a measured peak."""
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row["peak_gib"] and row["oom"] == "0"]


def point(row: Row) -> Point:
    """Bring a row to our settings and predict it."""
    shape = shape_of(_config(row))
    trial = _trial(row)
    told = _adapted(row, trial, shape, _estimated(row, trial, shape))
    allocated, low, high = told
    # Without sharding too, FSDP copies its flat parameters' gradients from layer to layer.
    reserved = FRAGMENTATION_SHARDED if row["source"] == "fsdp_qlora" else FRAGMENTATION
    factor = reserved if row["metric"] == "max_reserved" else 1.0
    weights = float(row["params_b"]) * 1e9 * (0.5 if row["quant"].startswith("nf4") else 2)
    return Point(
        row,
        float(row["peak_gib"]) * GIB,
        allocated * factor,
        low * factor,
        high * factor,
        rule_of_thumb=1.2 * weights,
        deepspeed=zero3_model_states(shape.parameters, shape.embedding_parameters, int(row["num_gpus"]))
        if row["zero_stage"] == "fsdp"
        else zero2_model_states(shape.parameters, int(row["num_gpus"])),
    )


def _estimated(row: Row, trial: TrialConfig, shape: ModelShape) -> MemoryEstimate:
    told = estimate(trial, shape, int(row["num_gpus"]), "cuda", has_bf16=True)
    if row["source"] != "canifinetune" or not trial.precision.is_quantized:
        return told
    # Its loop has no autocast: after prepare_model_for_kbit_training attention, adapters and head compute in fp32.
    width = replace(_bytes_of(trial, "cuda", has_bf16=True), attention=4, adapter_input=4, logits=4)
    parts = memory_parts(trial, shape, 1, width)
    assert told.allocated_bytes is not None
    assert told.low_bytes is not None
    assert told.high_bytes is not None
    more = parts.total / told.allocated_bytes
    low, high = int(told.low_bytes * more), int(told.high_bytes * more)
    return replace(told, allocated_bytes=parts.total, low_bytes=low, high_bytes=high, parts=parts)


def zero2_model_states(parameters: int, gpus: int) -> int:
    """DeepSpeed's `estimate_zero2_model_states_mem_needs`, a GPU, without offload (deepspeed 0.19.8)."""
    return 4 * parameters + 16 * parameters // gpus


def zero3_model_states(parameters: int, largest_layer: int, gpus: int) -> int:
    """DeepSpeed's `estimate_zero3_model_states_mem_needs`, a GPU, without offload (deepspeed 0.19.8)."""
    return 4 * largest_layer + 18 * parameters // gpus


def _config(row: Row) -> dict[str, Any]:
    name = row["model"].lower()
    family = (
        "qwen2"
        if "qwen2" in name
        else "phi"
        if "phi-1.5" in name
        else "gpt_neox"
        if "stablelm alpha" in name
        else "llama"
    )
    # LitGPT builds StableLM Alpha as GPT-NeoX; both name their fields as Llama does.
    return {
        "model_type": family,
        "hidden_size": int(row["hidden"]),
        "num_hidden_layers": int(row["layers"]),
        "num_attention_heads": int(row["heads"]),
        "num_key_value_heads": int(row["kv_heads"]),
        "intermediate_size": int(row["intermediate"]),
        "vocab_size": int(row["vocab"]),
        "tie_word_embeddings": row["tie_embeddings"] == "1",
        "attention_bias": True,
        # LitGPT's phi calls torch's own kernel.
        "hidden_act": "gelu",
    }  # fmt: skip


def _trial(row: Row) -> TrialConfig:
    # canifinetune's one "lora" row names a quantisation that its bf16-sized load (0.93 GiB) shows was not used.
    nf4, family = row["quant"].startswith("nf4") and row["method"] == "qlora", _config(row)["model_type"]
    targets: Any = tuple(row["target_modules"].split(";")) if row["source"] == "fsdp_qlora" else "attention"
    if row["source"].startswith("litgpt"):
        # Its query and value adapters hang on the fused projection, so that one input is kept.
        targets = ("query_key_value",) if family == "gpt_neox" else ("q_proj", "v_proj")
    plain = row["source"] == "canifinetune"
    sharded = row["zero_stage"] == "fsdp"
    return TrialConfig(
        rank=int(row["rank"]),
        target_modules=targets,
        precision="nf4" if nf4 else "bf16",
        # canifinetune is transformers and PEFT in a plain loop; the other two keep all in bf16, as DeepSpeed does.
        engine="ddp" if plain else "deepspeed",
        zero_stage=3 if sharded else 0,
        offload="none",
        attention="sdpa",
        optimizer="adamw_8bit" if plain else "adamw",
        lora_dropout=0.05 if row["source"].startswith("litgpt") else 0.0,
        micro_batch_size=int(row["micro_batch"]),
        global_batch_size=int(row["micro_batch"]) * int(row["num_gpus"]),
        sequence_length=int(row["seq_len"]),
        gradient_checkpointing=row["grad_checkpointing"] == "1",
    )


def _adapted(row: Row, trial: TrialConfig, shape: ModelShape, told: MemoryEstimate) -> tuple[float, float, float]:
    """What another framework keeps otherwise."""
    assert told.allocated_bytes is not None
    allocated = float(told.allocated_bytes)
    parts = told.parts
    if row["source"] != "canifinetune":
        # Gradients and Adam's states in bf16 and no fp32 copy: 2 bytes a weight in place of 4, and 4 in place of 12.
        allocated -= parts.gradients / 2 + parts.optimizer * 2 / 3
    if row["source"].startswith("litgpt"):
        # The head's chunks of 128 tokens, kept in bf16 with their bf16 log-softmax; one chunk's gradients at a time.
        tokens = trial.sequence_length * int(row["micro_batch"])
        allocated += shape.vocabulary * (4 * tokens + 4 * 128) - parts.logits
        # Its fused projection: the value that is kept is a view of query, key and value.
        if not trial.gradient_checkpointing and _config(row)["model_type"] != "gpt_neox":
            allocated += 2 * (shape.heads + shape.kv_heads) * shape.head_dim * tokens * shape.layers
        if row["quant"].startswith("nf4"):
            # bitsandbytes of that time kept each 4-bit product's input (autograd/_functions.py: ctx.tensors = (A, B)).
            allocated += 2 * (2 * shape.hidden + shape.intermediate) * tokens * shape.layers
        if row["zero_stage"] == "fsdp":
            # One unit: the whole model is gathered beside the shard.
            allocated += shape.parameters * 2 - parts.communication
    if row["source"] == "fsdp_qlora":
        # transformers of March 2024 held fp32 logits (16 bytes each); FSDP's root unit keeps embedding and head.
        at_loss = parts.logits > 3 * shape.vocabulary * trial.sequence_length * int(row["micro_batch"])
        allocated += parts.logits * (16 / 14 - 1) if at_loss else parts.logits
        allocated += 2 * min(shape.embedding_parameters, shape.head_parameters) if row["zero_stage"] == "fsdp" else 0
    if row["offload"] == "param":
        # FSDP's CPU offload keeps the shards in host memory.
        allocated -= parts.weights + parts.adapter + parts.gradients / 2 + parts.optimizer / 3
    share = allocated / told.allocated_bytes
    assert told.low_bytes is not None
    assert told.high_bytes is not None
    return allocated, told.low_bytes * share, told.high_bytes * share


def table(points: Sequence[Point], group: Callable[[Point], str]) -> str:
    """Errors by group."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for p in points:
        groups[group(p)].append(p)
        groups["all"].append(p)
    lines = [
        "| | points | mean abs error | worst | under by > 5 % | in 90 % interval | rule of thumb | DeepSpeed's |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, members in sorted(groups.items(), key=lambda item: (item[0] == "all", item[0])):
        errors = [p.ours / p.measured - 1 for p in members]
        lines.append(
            f"| {name} | {len(members)} | {statistics.mean(map(abs, errors)):.1%} | {max(errors, key=abs):+.1%} | "
            f"{sum(e < -0.05 for e in errors) / len(errors):.0%} | "
            f"{sum(p.low <= p.measured <= p.high for p in members) / len(members):.0%} | "
            f"{statistics.mean(abs(p.rule_of_thumb / p.measured - 1) for p in members):.0%} | "
            f"{statistics.mean(abs(p.deepspeed / p.measured - 1) for p in members):.0%} |"
        )
    return "\n".join(lines)


def main(path: Path, verbose: bool) -> None:
    """Print the tables."""
    points = [point(row) for row in read(path)]
    for title, group in (
        ("source and metric", lambda p: f"{p.row['source']}, {p.row['metric']}"),
        ("precision", lambda p: p.row["quant"] if p.row["quant"] != "none" else p.row["compute_dtype"]),
        ("range", lambda p: "below 8 GiB" if p.measured < 8 * GIB else "8 GiB and more"),
    ):
        print(f"\nBy {title}\n\n{table(points, group)}")
    errors = sorted(abs(p.ours / p.measured - 1) for p in points)
    print(f"\nnine of ten points are within {errors[int(0.9 * len(errors))]:.1%}")
    if verbose:
        print()
        for p in points:
            print(
                f"{p.row['row_id'][:60]:60} {p.measured / GIB:7.2f} {p.ours / GIB:7.2f} {p.ours / p.measured - 1:+.1%}"
            )


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "-v"]
    main(
        Path(arguments[0]) if arguments else Path(__file__).parent / "data" / "measured_points.csv",
        verbose="-v" in sys.argv,
    )
