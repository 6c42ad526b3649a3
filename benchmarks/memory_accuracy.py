"""How far the memory estimate is from what published runs measured.

    python benchmarks/memory_accuracy.py [benchmarks/data/measured_points.csv] [-v]

Each run is asked for as a user would: a line for `orchestrator estimate` with the run's settings and nothing about the
framework that ran it. LitGPT's sharded runs are shown and not counted: its FSDP gathers the whole model at once, which
no setting says. Held out: the constants are fitted again without a source, or a model, and judged on that alone; what
the estimate counts was chosen with all of them in view, so errors on runs that nobody has seen may be larger.
Beside ours stand the rule of thumb (16 bytes a weight for bf16 LoRA's 2, QLoRA's 0.5, each with a fifth on top) and
DeepSpeed's estimator, which takes all weights as trained.

Last come published runs that no constant was fitted to (`benchmarks/data/unseen_points.jsonl`): those whose source, or
its code, states all settings; those of which something is assumed, as each line says; and those of libraries that do
what no setting of ours says.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.planning import memory
from orchestrator.planning.estimate import estimate_lines
from orchestrator.planning.model_shape import shape_of

GIB = 2**30
ENOUGH = 3
"""Of four runs, those that reserve no more than the fitted share: told too low costs a run, told too high some room."""
UNSEEN = 0.20
"""How much the interval is wider, each way, than the fitted points' 5 % and 95 % quantiles."""
LORA_DROPOUT = {"litgpt_resource_tables": 0.05, "fsdp_qlora": 0.1}
"""The defaults of litgpt/finetune/lora.py and of fsdp_qlora's train.py, which their tables do not print."""
OFFLOADED = {"param": "optimizer_and_parameters", "optimizer": "optimizer"}
Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Constants:
    """What is fitted, by its names in `orchestrator.planning.memory`."""

    fragmentation: float = memory.FRAGMENTATION
    fragmentation_sharded: float = memory.FRAGMENTATION_SHARDED
    low: float = memory.REST_LOW
    """The interval's ends, over what is predicted beside the weights."""
    high: float = memory.REST_HIGH


@dataclass(frozen=True, slots=True)
class Point:
    """One measured peak and what is predicted of it, in bytes."""

    row: Row
    measured: float
    counted: float
    """Our parts, but for the framework's, and of them the weights."""
    weights: float
    stays: float
    """Weights, adapter and optimizer states, in bytes: nothing of them comes and goes."""
    outside: float
    """Bytes on the GPU outside of torch's allocator."""
    rule_of_thumb: float
    deepspeed: float
    kept: Point | None
    """The same with its weights on the GPU, where they are offloaded: more is not reserved than that takes."""

    @property
    def is_expressible(self) -> bool:
        """Whether the settings say how the run went."""
        return not (self.row["source"].startswith("litgpt") and self.row["zero_stage"] == "fsdp")

    def predicted(self, constants: Constants) -> float:
        """Bytes by the row's own measure; with the constants that the estimate has, this is what it says."""
        allocated = self.weights + self.rest
        reserved = allocated + (allocated - self.stays) * self._fragmentation(constants)
        if self.kept:
            reserved = min(reserved, self.kept.predicted(constants))
        needed = allocated + (allocated - self.stays) * memory.GAPS
        return min(reserved, max(_gpu_bytes(self.row) - self.outside, needed))

    @property
    def rest(self) -> float:
        """Bytes allocated beside the weights."""
        return self.counted - self.weights + memory.WORKSPACE_BYTES

    def _fragmentation(self, constants: Constants) -> float:
        if self.row["metric"] != "max_reserved":
            return 0.0
        return float(getattr(constants, self.fragmentation_constant))

    @property
    def fragmentation_constant(self) -> str:
        """The name of what holds of its reserved bytes."""
        return "fragmentation_sharded" if self.row["zero_stage"] == "fsdp" else "fragmentation"

    @property
    def reserved_beyond(self) -> float:
        """Bytes reserved beyond what is counted, over what comes and goes."""
        allocated = self.weights + self.rest
        return (self.measured - allocated) / (allocated - self.stays)

    def error(self, constants: Constants) -> float:
        """Relative; below 0 where more was needed than predicted."""
        return self.predicted(constants) / self.measured - 1

    def is_covered(self, constants: Constants) -> bool:
        """Whether the interval holds it."""
        return constants.low <= self.rest_over_predicted(constants) <= constants.high

    def rest_over_predicted(self, constants: Constants) -> float:
        """What was allocated beside the weights, over what is predicted of it."""
        share = self._fragmentation(constants)
        allocated = (self.measured + share * self.stays) / (1 + share)
        return (allocated - self.weights) / self.rest


def read(path: Path) -> list[Row]:
    """The rows that have a measured peak."""
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row["peak_gib"] and row["oom"] == "0"]


def points_of(rows: Sequence[Row]) -> list[Point]:
    """Ask for an estimate of each row."""
    answers = estimate_lines([json.dumps(natural_line(row)) for row in rows], _no_hub)
    kept = [row | {"offload": "optimizer"} for row in rows if row["offload"] == "param"]
    bounds = iter(points_of(kept)) if kept else iter(())
    return [
        _point(row, json.loads(answer), next(bounds) if row["offload"] == "param" else None)
        for row, answer in zip(rows, answers, strict=True)
    ]


def _no_hub(model: str) -> Mapping[str, Any]:
    raise AssertionError(f"every line has its model's config, but {model} is named")


def _point(row: Row, told: Mapping[str, Any], kept: Point | None) -> Point:
    parts, shape, gpus = told["parts"], shape_of(_config(row)), int(row["num_gpus"])
    weights = float(row["params_b"]) * 1e9 * (0.5 if row["quant"].startswith("nf4") else 2)
    point = Point(
        row,
        measured=float(row["peak_gib"]) * GIB,
        counted=told["allocated_bytes"] - memory.WORKSPACE_BYTES,
        weights=parts["weights"],
        stays=parts["weights"] + parts["adapter"] + parts["optimizer"],
        outside=told["device_bytes"] - told["reserved_bytes"],
        rule_of_thumb=1.2 * weights,
        deepspeed=zero3_model_states(shape.parameters, shape.embedding_parameters, gpus)
        if row["zero_stage"] == "fsdp"
        else zero2_model_states(shape.parameters, gpus),
        kept=kept,
    )
    said = told["reserved_bytes" if row["metric"] == "max_reserved" else "allocated_bytes"]
    assert abs(point.predicted(Constants()) / said - 1) < 1e-6, "the constants' arithmetic is not the estimate's"
    return point


def natural_line(row: Row) -> dict[str, Any]:
    """What a user would ask: FSDP is ZeRO-3, all else one engine without sharding."""
    trial = {
        "rank": int(row["rank"]),
        "target_modules": _targets(row),
        # canifinetune's one "lora" row names a quantisation that its bf16-sized load (0.93 GiB) shows was not used.
        "precision": "nf4" if row["quant"].startswith("nf4") and row["method"] == "qlora" else "bf16",
        "optimizer": "adamw_8bit" if "8bit" in row["optimizer"] else "adamw",
        "micro_batch_size": int(row["micro_batch"]),
        "global_batch_size": int(row["micro_batch"]) * int(row["num_gpus"]),
        "sequence_length": int(row["seq_len"]),
        "gradient_checkpointing": row["grad_checkpointing"] == "1",
        "attention": row["attention"],
        **({"zero_stage": 3} if row["zero_stage"] == "fsdp" else {"engine": "ddp"}),
        **({"offload": OFFLOADED[row["offload"]]} if row["offload"] in OFFLOADED else {}),
        **({"lora_dropout": LORA_DROPOUT[row["source"]]} if row["source"] in LORA_DROPOUT else {}),
    }
    return {
        "id": row["row_id"],
        "model": _config(row),
        "trial": trial,
        "workers": int(row["num_gpus"]),
        "gpu_memory_bytes": _gpu_bytes(row),
    }


def _gpu_bytes(row: Row) -> int:
    found = re.search(r"(\d+)GB", row["gpu"])
    assert found, f"{row['row_id']} names no GPU's size"
    return int(found.group(1)) * GIB


def _targets(row: Row) -> Any:
    if row["source"] == "fsdp_qlora":
        return row["target_modules"].split(";")
    if row["source"] == "canifinetune":
        return "attention"
    return ["query_key_value"] if _config(row)["model_type"] == "gpt_neox" else ["q_proj", "v_proj"]


def _config(row: Row) -> dict[str, Any]:
    name = row["model"].lower()
    # LitGPT builds StableLM Alpha as GPT-NeoX; both name their fields as Llama does.
    known = {"qwen2": "qwen2", "phi-1.5": "phi", "stablelm alpha": "gpt_neox", "mistral": "mistral"}
    return {
        "model_type": next((family for part, family in known.items() if part in name), "llama"),
        "hidden_size": int(row["hidden"]),
        "num_hidden_layers": int(row["layers"]),
        "num_attention_heads": int(row["heads"]),
        "num_key_value_heads": int(row["kv_heads"]),
        "intermediate_size": int(row["intermediate"]),
        "vocab_size": int(row["vocab"]),
        "tie_word_embeddings": row["tie_embeddings"] == "1",
        # LitGPT's is torch's, in one step.
        "hidden_act": "gelu" if "phi" in name else "silu",
    }


def zero2_model_states(parameters: int, gpus: int) -> int:
    """DeepSpeed's `estimate_zero2_model_states_mem_needs`, a GPU, without offload (deepspeed 0.19.8)."""
    return 4 * parameters + 16 * parameters // gpus


def zero3_model_states(parameters: int, largest_layer: int, gpus: int) -> int:
    """DeepSpeed's `estimate_zero3_model_states_mem_needs`, a GPU, without offload (deepspeed 0.19.8)."""
    return 4 * largest_layer + 18 * parameters // gpus


def fitted(points: Sequence[Point]) -> Constants:
    """Fragmentation as what `ENOUGH` of four runs have no more of, where there are any, and the interval's ends."""
    beyond: dict[str, list[float]] = defaultdict(list)
    for p in points:
        if p.row["metric"] == "max_reserved":
            beyond[p.fragmentation_constant].append(p.reserved_beyond)
    quarters = {name: statistics.quantiles(shares, n=4, method="inclusive") for name, shares in beyond.items()}
    known = replace(Constants(), **{name: cuts[ENOUGH - 1] for name, cuts in quarters.items()})
    over = sorted(p.rest_over_predicted(known) for p in points if p.row["metric"] == "max_allocated")
    outside = int(0.05 * (len(over) - 1))
    return replace(known, low=over[outside] - UNSEEN, high=over[-1 - outside] + UNSEEN)


def held_out(points: Sequence[Point], field: str) -> list[tuple[Point, Constants]]:
    """Each point, with constants fitted on all points that have another value of this field."""
    pairs = []
    for value in dict.fromkeys(p.row[field] for p in points):
        constants = fitted([p for p in points if p.row[field] != value])
        pairs += [(p, constants) for p in points if p.row[field] == value]
    return pairs


def table(groups: Mapping[str, Sequence[tuple[Point, Constants]]]) -> str:
    """Errors by group."""
    lines = [
        "| | points | mean abs error | mean | worst | under by > 5 % | in interval | rule of thumb | DeepSpeed's |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, members in groups.items():
        errors = [p.error(constants) for p, constants in members]
        lines.append(
            f"| {name} | {len(members)} | {statistics.mean(map(abs, errors)):.1%} | {statistics.mean(errors):+.1%} | "
            f"{max(errors, key=abs):+.1%} | {sum(e < -0.05 for e in errors) / len(errors):.0%} | "
            f"{sum(p.is_covered(constants) for p, constants in members) / len(errors):.0%} | "
            f"{statistics.mean(abs(p.rule_of_thumb / p.measured - 1) for p, _ in members):.0%} | "
            f"{statistics.mean(abs(p.deepspeed / p.measured - 1) for p, _ in members):.0%} |"
        )
    return "\n".join(lines)


def grouped(points: Sequence[Point], group: Callable[[Row], str]) -> dict[str, list[tuple[Point, Constants]]]:
    """By a name, in its order, and all of them last."""
    groups: dict[str, list[tuple[Point, Constants]]] = defaultdict(list)
    for p in sorted(points, key=lambda p: group(p.row)):
        groups[group(p.row)].append((p, Constants()))
    return {**groups, "all": [(p, Constants()) for p in points]}


def _how(row: Row) -> str:
    offload = ", weights offloaded" if row["offload"] == "param" else ""
    return f"{row['source']}, {'sharded' if row['zero_stage'] == 'fsdp' else 'one GPU each'}{offload}, {row['metric']}"


UNSEEN_POINTS = Path(__file__).parent / "data" / "unseen_points.jsonl"
UNSEEN_GROUPS = {
    "stated": "Not fitted: all settings stated",
    "assumed": "Not fitted: something assumed",
    "otherwise": "Not fitted: what no setting says",
}
TOLD = {"max_allocated": "allocated_bytes", "max_reserved": "reserved_bytes", "device": "device_bytes"}


def unseen_table(group: str, verbose: bool, *, tells_loop: bool = False) -> str:
    """The published runs of a group that nothing was fitted to, by source and kind of peak."""
    points = [json.loads(line) for line in UNSEEN_POINTS.read_text(encoding="utf-8").splitlines()]
    points = [point for point in points if point["group"] == group and (not tells_loop or "loop" in point)]
    asked = ("id", "model", "trial", "workers", "gpu_memory_bytes", *(["loop"] if tells_loop else []))
    lines = (json.dumps({key: point[key] for key in asked if point[key] is not None}) for point in points)
    errors: dict[str, list[float]] = defaultdict(list)
    covered: dict[str, list[bool]] = defaultdict(list)
    for point, answer in zip(points, map(json.loads, estimate_lines(lines, _no_hub)), strict=True):
        measured = point["measured_gib"] * GIB
        error = answer[TOLD[point["metric"]]] / measured - 1
        name = f"{point['source']}, {point['metric']}"
        for key in (name, "all"):
            errors[key].append(error)
            if point["metric"] == "max_allocated":
                covered[key].append(answer["low_bytes"] <= measured <= answer["high_bytes"])
        if verbose:
            print(f"{point['id'][:60]:60} {measured / GIB:7.2f} {error:+.1%}")
    rows = [
        f"| {name} | {len(of)} | {statistics.mean(map(abs, of)):.1%} | {statistics.mean(of):+.1%} | "
        f"{max(of, key=abs):+.1%} | {sum(e < -0.05 for e in of) / len(of):.0%} | "
        + (f"{sum(covered[name]) / len(covered[name]):.0%} |" if covered[name] else "- |")
        for name, of in sorted(errors.items(), key=lambda pair: pair[0] == "all")
    ]
    header = "| | points | mean abs error | mean | worst | under by > 5 % | allocated, in interval |"
    return "\n".join([header, "| --- | --- | --- | --- | --- | --- | --- |", *rows])


def main(path: Path, verbose: bool) -> None:
    """Print the tables."""
    every = points_of(read(path))
    points = [p for p in every if p.is_expressible]
    by_settings = {
        "source": _how,
        "precision": lambda row: row["quant"] if row["quant"] != "none" else row["compute_dtype"],
        "checkpointing": lambda row: "checkpointed" if row["grad_checkpointing"] == "1" else "all kept",
        "model": lambda row: row["model"],
    }
    for title, group in by_settings.items():
        print(f"\nBy {title}\n\n{table(grouped(points, group))}")
    print("\nHeld out\n")
    print(table({f"by {field}": held_out(points, field) for field in ("source", "model")}))
    print("\nNot counted above\n")
    print(table(grouped([p for p in every if not p.is_expressible], _how)))
    print(f"\nfitted on all that are counted: {fitted(points)}")
    for group, title in UNSEEN_GROUPS.items():
        print(f"\n{title}\n\n{unseen_table(group, verbose)}")
    print(f"\nThe stated ones again, with their loop told\n\n{unseen_table('stated', verbose, tells_loop=True)}")
    if verbose:
        print()
        for p in every:
            print(
                f"{p.row['row_id'][:60]:60} {p.measured / GIB:7.2f} {p.predicted(Constants()) / GIB:7.2f} "
                f"{p.error(Constants()):+.1%}"
            )


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "-v"]
    main(
        Path(arguments[0]) if arguments else Path(__file__).parent / "data" / "measured_points.csv",
        verbose="-v" in sys.argv,
    )
