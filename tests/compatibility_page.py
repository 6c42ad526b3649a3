"""docs/compatibility.md out of the rules themselves: who runs with whom, and every reason with its source."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.planning.compatibility import REFUSALS, WITHOUT_FLASH_ATTENTION, WITHOUT_SDPA, Case, refusals
from orchestrator.planning.hardware import Hardware, named_gpu
from orchestrator.planning.model_shape import shape_of
from tests.fast.cases import CPU, CPU_WITH_HALF, LLAMA_2_7B, V100
from tests.fast.test_compatibility import REFUSED

MACHINES: Mapping[str, Hardware] = {
    "CPU": CPU,
    "CPU with bf16 and fp16": CPU_WITH_HALF,
    "Volta (V100), torch for CUDA 13": replace(V100, torch_knows_volta=False),
    "Volta (V100), torch for CUDA 12.6": V100,
    "Turing (T4)": named_gpu("T4", 8),
    "Ampere (A100)": named_gpu("A100", 8),
    "Ada (L4)": named_gpu("L4", 8),
    "Hopper (H100)": named_gpu("H100", 8),
    "Blackwell (B200)": named_gpu("B200", 8),
}
ENGINES: Mapping[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    **{f"ZeRO {stage}": {"zero_stage": stage} for stage in range(4)},
}
HALF = Precision.BF16
INTRODUCTION = """# What runs with what

Written by `scripts/golden` from the rules that `plan`, `run`, `estimate` and `doctor` ask
(`orchestrator/planning/compatibility.py`). A dash is refused, with its reason and a way out; all else runs. GPUs
of other makers than NVIDIA are not known.
"""


def compatibility_page() -> str:
    """The whole page."""
    h100 = MACHINES["Hopper (H100)"]
    precisions = {f"`{p}`": {"precision": p} for p in Precision}
    whole = {f"`{p}`, `rank: full`": {"precision": p, "rank": "full"} for p in Precision}
    offloads = {f"`{o}`": {"offload": o} for o in ("none", "optimizer", "optimizer_and_parameters")}
    eight_bit = {f"{name}, `adamw_8bit`": {**o, "optimizer": "adamw_8bit"} for name, o in offloads.items()}
    kernels = {f"`{k}`": {"attention": k} for k in ("eager", "sdpa", "flash_attention_2")}
    return "\n".join(
        [
            INTRODUCTION,
            *_section("Precision and device", _by_machine(precisions)),
            *_section("Attention and device", _by_machine(kernels)),
            "`sdpa` is refused for models of these families, which transformers has none for: "
            + _names(WITHOUT_SDPA)
            + ".",
            "",
            f"`flash_attention_2` likewise: {_names(WITHOUT_FLASH_ATTENTION)}.",
            "",
            *_section("Precision and engine", _by_engine({**precisions, **whole}, h100)),
            *_section("Offload and engine", _by_engine({**offloads, **eight_bit}, h100)),
            "## The rules",
            "",
            "| refused, for example | because |",
            "| --- | --- |",
            *(f"| {_example(rule.__name__)} | {_source(rule)} |" for rule in REFUSALS),
            "",
        ]
    )


def _section(title: str, lines: Sequence[str]) -> Iterator[str]:
    yield from (f"## {title}", "", *lines, "")


def _by_machine(rows: Mapping[str, dict[str, Any]]) -> list[str]:
    columns = {name: (hardware, _usual(hardware)) for name, hardware in MACHINES.items()}
    return _table(rows, {name: (hardware, {**usual, "zero_stage": 0}) for name, (hardware, usual) in columns.items()})


def _by_engine(rows: Mapping[str, dict[str, Any]], hardware: Hardware) -> list[str]:
    return _table(rows, {name: (hardware, {"precision": HALF, **engine}) for name, engine in ENGINES.items()})


def _usual(hardware: Hardware) -> dict[str, Any]:
    wanted = (Precision.BF16, Precision.FP16, Precision.FP32) if hardware.device == "cuda" else (Precision.FP32,)
    runs = (case for case in ({"precision": p} for p in wanted) if not refusals(case_of(hardware, **case)))
    return next(runs, {"precision": Precision.FP32})


def _table(rows: Mapping[str, dict[str, Any]], columns: Mapping[str, tuple[Hardware, dict[str, Any]]]) -> list[str]:
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = (
            "–" if refusals(case_of(hardware, **{**column, **row})) else "yes" for hardware, column in columns.values()
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def case_of(hardware: Hardware, **settings: Any) -> Case:
    """A trial of two workers with a model of which nothing is peculiar."""
    fixed = {"global_batch_size": 16, "micro_batch_size": 1}
    return Case(TrialConfig.model_validate(fixed | settings), shape_of(LLAMA_2_7B), hardware, 2)


def _names(families: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(families))


def _example(rule: str) -> str:
    (reason,) = refusals(REFUSED[rule][0])
    return reason


def _source(rule: Any) -> str:
    return " ".join(str(rule.__doc__).split()).removeprefix("Source: ")
