from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.config.sweep_config import SweepConfig
from orchestrator.config.trial_config import TrialConfig
from orchestrator.errors import InputError, ModelError
from orchestrator.planning.cheaper import what_fits
from orchestrator.planning.compatibility import Case, refusals
from orchestrator.planning.hardware import Hardware, cpu_half_precision, named_gpu, parse_memory
from orchestrator.planning.makespan import FIRST_START_S
from orchestrator.planning.memory import (
    estimate_on,
    loading_bytes_on,
    memory_parts,
    outside_torch_bytes,
    trainable_parameters,
)
from orchestrator.planning.model_shape import ModelShape, shape_of
from orchestrator.planning.pace import Pace
from orchestrator.planning.plan import SweepPlan, gpu_memory_fraction, plan_sweep
from orchestrator.planning.plan_table import duration, render
from orchestrator.planning.planned_trial import NO_PACE, TIGHT, with_micro_batch
from orchestrator.planning.room import WorkerShape, placement
from orchestrator.planning.step_time import Placement, step_seconds
from tests.fast.cases import A100, CPU, LLAMA_2_7B, LLAMA_32_3B, SMOLLM2_135M, case
from tests.made_up_sweep import made_up_sweep, made_up_trial

SEVEN_B, THREE_B, SMOL = shape_of(LLAMA_2_7B), shape_of(LLAMA_32_3B), shape_of(SMOLLM2_135M)


def plan(hardware: Hardware, model: Any = SEVEN_B, pace: Pace = NO_PACE, **keys: Any) -> SweepPlan:
    raw = {"name": "p", "model": "builtin:tiny-llama", "data": {"train": "builtin:python-docs"}, **keys}
    sweep = SweepConfig.model_validate(raw).on_hardware(has_gpus=hardware.device == "cuda")
    return plan_sweep(sweep, model, hardware, pace)


def test_published_parameter_counts() -> None:
    assert SEVEN_B.parameters == 6_738_415_616
    assert THREE_B.parameters == 3_212_749_824
    on_queries_and_values = {"target_modules": ("q_proj", "v_proj")}
    assert trainable_parameters(TrialConfig(rank=8, **on_queries_and_values), SEVEN_B) == 4_194_304
    assert trainable_parameters(TrialConfig(rank=32, **on_queries_and_values), THREE_B) == 9_175_040


def test_a_config_that_lacks_a_field_names_it() -> None:
    with pytest.raises(ModelError, match="num_hidden_layers"):
        shape_of({key: value for key, value in LLAMA_2_7B.items() if key != "num_hidden_layers"})


def test_a_trial_that_does_not_fit_is_refused_with_numbers_and_what_would_fit() -> None:
    small = named_gpu("RTX-4090", 1)
    refused = plan(small, trial={"precision": "bf16", "micro_batch_size": 8, "sequence_length": 2048}).trials[0]
    (reason,) = refused.reasons
    assert "GiB" in reason
    assert "fits with" in reason
    assert not plan(small, trial={"precision": "nf4", "micro_batch_size": 1, "gradient_checkpointing": True}).refused


def test_an_automatic_micro_batch_is_the_largest_that_fits_and_divides() -> None:
    def chosen(hardware: Hardware) -> Any:
        return plan(hardware, trial={"precision": "bf16", "global_batch_size": 24}).trials[0].config.micro_batch_size

    large, small = chosen(named_gpu("H200", 1)), chosen(named_gpu("RTX-4090", 1))
    assert 24 % large == 24 % small == 0
    assert large > small
    for micro, hardware in ((large, named_gpu("H200", 1)), (small, named_gpu("RTX-4090", 1))):
        if micro == 24:
            continue
        following = next(n for n in range(micro + 1, 25) if 24 % n == 0)
        config = TrialConfig(precision="bf16", micro_batch_size=following)
        assert estimate_on(config, SEVEN_B, 1, hardware).device_bytes > 0.97 * hardware.gpu_memory_bytes


@pytest.mark.parametrize("gib", [1, 8, 10, 12, 16, 24, 40, 80])
def test_an_automatic_micro_batch_is_what_trying_every_number_would_find(gib: int) -> None:
    gpu = named_gpu("A100", 1, gib * 2**30)
    tried = TrialConfig(precision="nf4", sequence_length=512, global_batch_size=360, micro_batch_size="auto")
    divisors = [micro for micro in range(1, 361) if 360 % micro == 0]
    each = {micro: tried.model_copy(update={"micro_batch_size": micro}) for micro in divisors}
    fitting = [m for m in divisors if estimate_on(each[m], SEVEN_B, 1, gpu).device_bytes <= gib * 2**30]
    assert with_micro_batch(tried, SEVEN_B, gpu, 1, gib * 2**30).micro_batch_size == max(fitting, default=1)


def test_an_automatic_micro_batch_of_many_trials_and_a_large_batch_is_found_with_few_estimates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def counted(config: TrialConfig, *others: Any) -> Any:
        asked.append(config.micro_batch_size)
        return estimate_on(config, *others)

    monkeypatch.setattr("orchestrator.planning.planned_trial.estimate_on", counted)
    space = {"rank": [4, 8], "learning_rate": [n * 1e-5 for n in range(1, 101)]}
    trial = {"global_batch_size": 720_720, "micro_batch_size": "auto", "sequence_length": 512, "precision": "nf4"}
    found = plan(named_gpu("A100", 1), trial=trial, space=space)
    assert found.runs == 200
    # Of 240 divisors nine are tried for each rank, and each trial is estimated once for its record.
    assert len(asked) <= 2 * 9 + 200


def test_workers_that_outnumber_the_batch_are_estimated_with_one_sequence_each() -> None:
    alone = TrialConfig(global_batch_size=1, micro_batch_size="auto")
    assert with_micro_batch(alone, SEVEN_B, named_gpu("A100", 8), 8, 2**40).micro_batch_size == 1


def test_a_trial_is_refused_for_what_it_must_have_and_not_for_what_the_allocator_would_keep() -> None:
    hardware, room_bytes = named_gpu("RTX-4090", 1), 0.97 * named_gpu("RTX-4090", 1).gpu_memory_bytes
    lengths = range(64, 4096, 64)
    trials = plan(hardware, trial={"precision": "nf4", "micro_batch_size": 4}, space={"sequence_length": list(lengths)})
    kinds = [(bool(t.reasons), TIGHT in t.notes, t.memory.needed_bytes <= room_bytes) for t in trials.trials]
    # The longer, the worse: with room, tight, refused.
    assert kinds == sorted(kinds, key=lambda kind: kind[:2])
    assert set(kinds) == {(False, False, True), (False, True, True), (True, False, False)}
    assert all(t.memory.device_bytes <= room_bytes for t in trials.trials if not t.reasons)


def test_asha_makes_the_expected_sweep_shorter_and_the_worst_no_longer_than_the_full_grid() -> None:
    space = {"rank": [2, 4, 8, 16, 32, 64, 128, 256, 512]}
    full = plan(A100, space=space, trial={"max_steps": 900})
    halved = plan(A100, space=space, trial={"max_steps": 900}, scheduler={"asha": {"grace_steps": 100}})
    assert halved.makespan_s[1] < full.makespan_s[1]
    assert halved.makespan_s[2] == full.makespan_s[2]


def test_what_the_budget_does_not_hold_is_said_before_the_start() -> None:
    warned = plan(A100, trial={"max_steps": 10**6}, budget={"hours": 1, "gpu_hours": 1, "price_per_gpu_hour": 2})
    assert any("budget.hours" in warning for warning in warned.warnings)
    assert any("budget.gpu_hours" in warning for warning in warned.warnings)
    assert warned.cost == pytest.approx(tuple(hours * 2 for hours in warned.gpu_hours))
    assert plan(A100, trial={"max_steps": 10}, budget={"hours": 100}).warnings == ()


@pytest.mark.parametrize(
    ("hardware", "measured"),
    [(A100, "allocated_bytes"), (replace(CPU, host_memory_bytes=2**38), "device_bytes")],
    ids=["GPU", "CPU"],
)
def test_a_bound_of_memory_that_trials_are_estimated_to_break_is_told(hardware: Hardware, measured: str) -> None:
    keys: dict[str, Any] = {"space": {"rank": [8, 256]}, "trial": {"max_steps": 10, "micro_batch_size": 4}}
    lean, fat = (getattr(trial.memory, measured) for trial in plan(hardware, THREE_B, **keys).trials)
    between = f"peak_memory_bytes <= {(lean + fat) // 2}"
    (warning,) = plan(hardware, THREE_B, constraints=[between], **keys).warnings
    assert warning.startswith(f"estimated not to keep {between}: 1 of 2 trials (the least ")
    assert plan(hardware, THREE_B, constraints=[f"peak_memory_bytes <= {fat}"], **keys).warnings == ()


@pytest.mark.parametrize("hardware", [A100, replace(CPU, host_memory_bytes=2**38)], ids=["GPU", "CPU"])
def test_an_automatic_micro_batch_keeps_to_a_bound_of_memory(hardware: Hardware) -> None:
    def planned(*constraints: str) -> Any:
        return plan(hardware, THREE_B, trial={"sequence_length": 512}, constraints=list(constraints)).trials[0]

    free = planned()
    bound_bytes = int(free.memory.measured_bytes * 0.7)
    bounded = planned(f"peak_memory_bytes <= {bound_bytes}")
    assert 1 < bounded.config.micro_batch_size < free.config.micro_batch_size
    assert bounded.memory.measured_bytes <= bound_bytes
    assert planned(f"peak_memory_bytes <= {bound_bytes}", "peak_memory_bytes <= 1KiB").config.micro_batch_size == 1
    assert planned("peak_memory_bytes >= 1KiB", "tokens_per_s <= 1").config == free.config


def test_the_memory_of_a_plan_is_what_decides_and_refuses_and_not_what_the_allocator_keeps() -> None:
    space = {"zero_stage": [2, 3], "attention": ["sdpa", "eager"]}
    long = {"micro_batch_size": 1, "sequence_length": 8192}
    found = plan(named_gpu("H200", 8), THREE_B, space=space, trial=long, resources={"workers_per_trial": 8})
    two, three = (trial.memory for trial in found.trials if not trial.reasons)
    assert two.device_bytes < three.device_bytes
    assert two.needed_bytes > three.needed_bytes
    lines, needed = render(found).splitlines(), [trial.memory.needed_bytes for trial in found.trials]
    for figure in needed:
        assert sum(f"{figure / 2**30:.2f} GiB" in line or f"{figure / 2**30:.1f} GiB" in line for line in lines) == 1
    told = [trial["memory"]["needed_bytes"] for trial in json.loads(found.model_dump_json())["trials"]]
    assert told == needed


def test_a_trial_that_fits_by_its_estimate_and_not_by_the_end_of_its_range_is_marked() -> None:
    found = plan(A100, THREE_B, space={"rank": [8, 64]}, trial={"micro_batch_size": 1, "sequence_length": 8192})
    small, large = (trial.memory for trial in found.trials)
    between = (small.high_bytes + large.high_bytes + small.needed_bytes + large.needed_bytes) // 2
    between -= (small.allocated_bytes + large.allocated_bytes) // 2
    assert large.needed_bytes < between
    first, second, _, legend, *_ = render(found.model_copy(update={"worker_memory_bytes": between})).splitlines()[3:]
    assert (" GiB *" in first, " GiB *" in second) == (False, True)
    assert legend == (
        "* may not fit: the 90 % range of what it is estimated to need ends above the "
        f"{between / 2**30:.1f} GiB that are there"
    )
    assert "*" not in render(found)


def test_a_plan_that_was_written_before_it_told_what_is_needed_is_read() -> None:
    written = plan(A100)
    raw = json.loads(written.model_dump_json())
    del raw["trials"][0]["memory"]["needed_bytes"]
    assert SweepPlan.model_validate(raw) == written


def test_a_note_names_its_trials_unless_it_is_of_all_that_run() -> None:
    assert "with one worker shards nothing\n  zero_stage=2\n2 trials" in render(
        plan(A100, space={"zero_stage": [0, 2]})
    )
    assert "with one worker shards nothing\n1 trial runs" in render(plan(A100, trial={"zero_stage": 2}))


def test_a_first_plan_of_short_trials_holds_what_they_then_took() -> None:
    """Two sweeps of 38 trials of tiny-llama, 3 steps each, one at a time on 2 cores, took 56 and 47 s."""
    tiny = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = shape_of(LLAMA_2_7B | tiny | {"num_key_value_heads": 2, "vocab_size": 4096})
    trial = {"precision": "fp32", "global_batch_size": 2, "max_steps": 3, "sequence_length": 64}
    space = {"learning_rate": [n * 1e-5 for n in range(1, 39)]}
    found = plan(CPU, model, trial=trial, space=space, resources={"max_concurrent": 1})
    low_s, _, high_s = found.makespan_s
    assert low_s < 47 < 56 < high_s
    # What a trial waits for data and model is no step that could be slow.
    (first, *_) = found.trials
    assert first.seconds_range[0] < 1 < 3 <= first.seconds < first.seconds_range[1]


def test_a_trial_that_would_outrun_its_limit_is_warned_of() -> None:
    (warning,) = plan(A100, trial={"max_steps": 10**6}, budget={"trial_hours": 0.5}).warnings
    assert warning.startswith(
        "expected to run longer than budget.trial_hours (0.5) and to be ended there: 1 of 1 trials"
    )


def test_a_plan_as_text_names_every_trial_each_refusal_and_the_totals() -> None:
    space, trial = {"precision": ["nf4", "fp16"]}, {"sequence_length": 64}
    text = render(plan(CPU, model=THREE_B, space=space, trial=trial, resources={"max_concurrent": 1}))
    assert "1 trial runs" in text
    assert "refused (1): precision fp16" in text
    assert "time: about" in text


def test_a_trial_that_does_not_fit_is_told_of_the_mildest_change_of_each_setting() -> None:
    settings = {"precision": "bf16", "micro_batch_size": 8, "global_batch_size": 8, "sequence_length": 512}
    (reason,) = plan(named_gpu("RTX-4090", 1), trial=settings).trials[0].reasons
    assert reason.partition("fits with ")[2] == "micro_batch_size 2, or gradient_checkpointing"


def test_more_gpus_to_share_the_weights_among_are_named_where_there_are_some() -> None:
    settings = {"precision": "amp_bf16", "micro_batch_size": 1, "sequence_length": 256, "gradient_checkpointing": True}

    def fits(gpus: int) -> str:
        (reason,) = plan(named_gpu("RTX-4090", gpus), trial=settings).trials[0].reasons
        return reason.partition("fits with ")[2]

    assert fits(1) == "precision nf4"
    assert fits(4) == "precision nf4, or workers_per_trial 2 with zero_stage 3"


def test_no_more_workers_are_named_than_there_are_cpus_for() -> None:
    settings = {"precision": "amp_bf16", "micro_batch_size": 1, "sequence_length": 256, "gradient_checkpointing": True}
    few = replace(named_gpu("RTX-4090", 4), cpus=1)
    (reason,) = plan(few, trial=settings).trials[0].reasons
    assert reason.endswith("fits with precision nf4")


def test_a_trial_that_would_fit_with_more_of_a_gpu_or_of_its_limit_is_told_so_first() -> None:
    settings = {"precision": "nf4", "micro_batch_size": 1, "sequence_length": 2048, "gradient_checkpointing": True}

    def told(**resources: Any) -> str:
        (trial,) = plan(A100, trial=settings, resources=resources).trials
        return trial.reasons[0] if trial.reasons else "runs"

    shared = told(gpus_per_worker=0.05)
    share = re.search(r"fits with resources\.gpus_per_worker ([\d.]+)", shared)
    assert share
    assert told(gpus_per_worker=float(share[1])) == "runs"

    limited = told(memory_per_worker="3GiB")
    limit = re.search(r"resources\.memory_per_worker allows 3\.0 GiB; .*memory_per_worker ([\d.]+GiB)", limited)
    assert limit
    assert told(memory_per_worker=limit[1]) == "runs"

    both = told(gpus_per_worker=0.05, memory_per_worker="3GiB")
    assert f"resources.memory_per_worker {limit[1]} and resources.gpus_per_worker {share[1]}" in both


def test_a_trial_for_which_no_single_change_is_enough_is_told_the_fewest_together() -> None:
    settings = {"precision": "fp32", "micro_batch_size": 16, "sequence_length": 4096}
    (reason,) = plan(named_gpu("T4", 1), trial=settings).trials[0].reasons
    assert reason.endswith("fits with micro_batch_size 2 and gradient_checkpointing and precision nf4")


OF_NO_MEMORY = {
    "learning_rate": 1e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 7,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "max_steps": 333,
    "eval_every": 3,
    "seed": 99,
}


@pytest.mark.parametrize("setting", OF_NO_MEMORY)
def test_what_memory_does_not_depend_on_changes_no_estimate_refusal_or_hint(setting: str) -> None:
    settings = {"precision": "fp32", "micro_batch_size": 16, "global_batch_size": 16, "sequence_length": 4096}
    asked = case(named_gpu("T4", 1), **settings)
    other = replace(asked, config=asked.config.model_copy(update={setting: OF_NO_MEMORY[setting]}))
    assert other.config != asked.config
    assert estimate_on(other.config, SEVEN_B, 1, other.hardware) == estimate_on(
        asked.config, SEVEN_B, 1, asked.hardware
    )
    assert refusals(other) == refusals(asked)
    assert what_fits(other, 2**34, 1) == what_fits(asked, 2**34, 1)


def test_a_hint_is_of_the_trial_that_asks() -> None:
    def hint(**settings: Any) -> str | None:
        return what_fits(case(named_gpu("T4", 1), precision="fp32", sequence_length=4096, **settings), 2**34, 1)

    assert len({hint(micro_batch_size=1), hint(micro_batch_size=4), hint(micro_batch_size=4, rank=2048)}) == 3


@pytest.fixture
def asked_by_hints(monkeypatch: pytest.MonkeyPatch) -> list[TrialConfig]:
    """Each configuration that is estimated for a hint."""
    asked: list[TrialConfig] = []

    def counted(config: TrialConfig, *others: Any) -> Any:
        asked.append(config)
        return estimate_on(config, *others)

    monkeypatch.setattr("orchestrator.planning.cheaper.estimate_on", counted)
    return asked


def unlike_any(number: int) -> ModelShape:
    return shape_of(LLAMA_2_7B | {"vocab_size": 40_000 + number})


def test_a_hint_is_found_with_few_estimates(asked_by_hints: list[TrialConfig]) -> None:
    settings = {
        "precision": "fp32",
        "micro_batch_size": 64,
        "global_batch_size": 64,
        "rank": 1024,
        "attention": "eager",
    }
    asked = case(named_gpu("A100", 1), **settings, sequence_length=4096)
    sizes_gib = range(6, 46)
    told = [what_fits(replace(asked, shape=unlike_any(gib)), gib * 2**30, 1) for gib in sizes_gib]
    assert None not in told
    # To ask each milder micro-batch and rank, and all that goes together, takes 44.
    assert len(asked_by_hints) < 30 * len(sizes_gib)


def test_a_trial_on_gpus_of_many_sizes_is_estimated_once(asked_by_hints: list[TrialConfig]) -> None:
    settings = {"precision": "fp32", "micro_batch_size": 16, "sequence_length": 4096}
    for gib in range(6, 70):
        asked = case(named_gpu("A100", 1, gib * 2**30), **settings)
        what_fits(replace(asked, shape=unlike_any(-1)), gib * 2**30, 1)
    assert len(asked_by_hints) == len(set(asked_by_hints))


def test_where_no_change_leaves_room_one_that_fits_without_is_named() -> None:
    settings = {"precision": "nf4", "micro_batch_size": 2, "gradient_checkpointing": True, "rank": 8}
    asked = case(named_gpu("T4", 1), **settings, sequence_length=4096)
    one = estimate_on(asked.config.model_copy(update={"micro_batch_size": 1}), SEVEN_B, 1, asked.hardware)
    assert what_fits(asked, one.device_bytes - 1, 1) == "micro_batch_size 1 and offload optimizer"


ALL_OFFLOADED = "offload optimizer_and_parameters and zero_stage 3"


def test_shorter_sequences_are_named_where_nothing_else_is_enough_and_weights_alone_fit_nowhere() -> None:
    settings = {"precision": "nf4", "micro_batch_size": 1, "gradient_checkpointing": True, "rank": 8}
    asked = case(named_gpu("H100", 1), **settings, sequence_length=4096)
    short = estimate_on(asked.config.model_copy(update={"sequence_length": 1024}), SEVEN_B, 1, asked.hardware)
    assert what_fits(asked, short.device_bytes, 1) == f"{ALL_OFFLOADED}, or sequence_length 1024"
    no_host = replace(asked, hardware=replace(asked.hardware, host_memory_bytes=2**30))
    assert what_fits(no_host, short.device_bytes, 1) == "sequence_length 1024"
    assert what_fits(no_host, short.parts.weights, 1) is None


@pytest.mark.parametrize(("rank", "figure"), [(64, "device_bytes"), (8, "needed_bytes")], ids=["room", "no room"])
def test_the_longest_sequences_that_fit_are_named_with_the_fewest_other_changes(rank: int, figure: str) -> None:
    settings = {"precision": "nf4", "micro_batch_size": 1, "gradient_checkpointing": True, "rank": rank}
    asked = case(named_gpu("H100", 1), **settings, attention="eager", sequence_length=4096)
    half = asked.config.model_copy(update={"attention": "sdpa", "sequence_length": 2048})
    memory_bytes = getattr(estimate_on(half, SEVEN_B, 1, asked.hardware), figure)
    told = what_fits(asked, memory_bytes, 1)
    assert told == f"attention sdpa and {ALL_OFFLOADED}, or attention sdpa and sequence_length 2048"


def of_all_weights(hardware: Hardware, **settings: Any) -> str:
    trial = {"rank": "full", "micro_batch_size": 1, "gradient_checkpointing": True, "sequence_length": 512, **settings}
    (reason,) = plan(hardware, trial=trial).trials[0].reasons
    return reason.partition("fits with ")[2]


def test_where_all_weights_are_trained_a_cheaper_optimizer_and_its_offload_are_named_with_what_they_need() -> None:
    assert of_all_weights(named_gpu("H200", 1, 120 * 2**30)) == "offload optimizer, or optimizer adamw_8bit"
    plain = of_all_weights(named_gpu("A100-40GB", 1), engine="ddp")
    assert plain == "offload optimizer with engine deepspeed and zero_stage 2"
    both = of_all_weights(named_gpu("A100-40GB", 1), optimizer="adamw_8bit", zero_stage=1)
    assert both == "offload optimizer with optimizer adamw and zero_stage 2"
    assert of_all_weights(named_gpu("RTX-4090", 1), precision="fp32") == "offload optimizer and precision bf16"


def test_to_shard_weights_deepspeed_is_named_where_torch_alone_would_step() -> None:
    settings = {"precision": "bf16", "micro_batch_size": 1, "sequence_length": 512, "engine": "ddp"}

    def fits(workers: int) -> str:
        resources = {"workers_per_trial": workers}
        (reason,) = plan(named_gpu("T4", 8), trial=settings, resources=resources).trials[0].reasons
        return reason.partition("fits with ")[2]

    settings |= {"precision": "fp16"}
    assert "engine deepspeed with zero_stage 3" in fits(2)
    assert "workers_per_trial 2 with engine deepspeed and zero_stage 3" in fits(1)


def test_more_workers_are_not_named_where_trials_share_a_gpu() -> None:
    trial = {"micro_batch_size": 1, "sequence_length": 256, "gradient_checkpointing": True}
    (reason,) = plan(named_gpu("A10G", 4), trial=trial, resources={"gpus_per_worker": 0.5}).trials[0].reasons
    assert reason.endswith("fits with resources.gpus_per_worker 1, or precision nf4")


def test_quantised_weights_under_zero_3_are_refused_where_a_gpu_cannot_hold_them_whole_while_they_load() -> None:
    """DeepSpeed shards them only when each worker has loaded all of them."""

    trial = {"precision": "nf4", "micro_batch_size": 1, "sequence_length": 64, "gradient_checkpointing": True}
    loading = loading_bytes_on(TrialConfig(precision="nf4", zero_stage=3), SEVEN_B, 8, A100)

    def reasons(beside: int, stage: int) -> tuple[str, ...]:
        hardware = named_gpu("A100", 8, int((loading + beside) / 0.97) + 1)
        resources = {"workers_per_trial": 8}
        return plan(hardware, trial=trial | {"zero_stage": stage}, resources=resources).trials[0].reasons

    (told,) = reasons(-2, 3)
    assert "of memory a worker while it loads" in told
    assert reasons(0, 3) == ()
    assert "fits with zero_stage 3 and precision bf16" in reasons(-(2**28), 2)[0]


def test_trials_that_share_a_gpu_automatically_have_room_for_the_quantised_model_as_it_loads() -> None:
    trial = {"precision": "nf4", "zero_stage": 3, "micro_batch_size": 1, "sequence_length": 64}
    keys = {"trial": {**trial, "gradient_checkpointing": True}, "resources": {"gpus_per_worker": "auto"}}
    of_many_words = shape_of(LLAMA_2_7B | {"vocab_size": 250_000, "num_hidden_layers": 8})
    for size_gib in range(12, 41):
        packed = plan(named_gpu("A100", 1, size_gib * 2**30), of_many_words, space={"rank": [8, 16, 32]}, **keys)
        assert packed.runs == 3


MIXTURE = shape_of(
    LLAMA_2_7B | {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 16}
)


def test_a_quantised_mixture_that_does_not_fit_is_told_that_its_experts_are_not_quantised_and_that_bf16_fits() -> None:
    trial = {"precision": "nf4", "micro_batch_size": 1, "gradient_checkpointing": True, "target_modules": "attention"}
    (reason,) = plan(named_gpu("A100-40GB", 1), MIXTURE, trial=trial).trials[0].reasons
    assert "bitsandbytes leaves as they are and PEFT makes fp32" in reason
    assert reason.endswith("fits with precision bf16")
    assert not plan(named_gpu("A100-40GB", 1), MIXTURE, trial=trial | {"precision": "bf16"}).refused


def test_a_change_that_is_refused_itself_hides_none_of_the_others() -> None:
    settings = {"precision": "fp32", "micro_batch_size": 16, "global_batch_size": 16, "sequence_length": 512}
    bare = replace(named_gpu("A100", 1), has_bitsandbytes=False)
    assert what_fits(case(bare, **settings, rank=4096), 48 * 2**30, 1) == (
        "micro_batch_size 8 and gradient_checkpointing and offload optimizer"
    )


@pytest.mark.parametrize(
    ("hardware", "resources"),
    [
        (CPU, {"gpus_per_worker": 1}),
        (CPU, {"cpus_per_worker": 3}),
        (CPU, {"workers_per_trial": 3}),
        (named_gpu("H100", 4), {"workers_per_trial": 8}),
    ],
)
def test_trials_that_take_more_than_the_whole_cluster_has_are_refused(
    hardware: Hardware, resources: dict[str, Any]
) -> None:
    found = plan(hardware, space={"rank": [4, 8]}, resources=resources, trial={"global_batch_size": 24})
    assert all("not one can start there" in reason for trial in found.trials for reason in trial.reasons)
    assert (found.runs, found.refused, found.gpu_hours) == (0, 2, (0, 0, 0))
    assert "refused (2): a trial takes " in render(found)
    assert render(found).count("not one can start there") == 1
    assert "no trial runs; 2 are refused" in render(found)
    assert "rank=4" not in render(found), "a reason of all trials names none of them"


@pytest.mark.parametrize("resources", [{"workers_per_trial": 4}, {"cpus_per_worker": 64}])
def test_trials_that_take_the_whole_cluster_are_not_refused_for_that(resources: dict[str, Any]) -> None:
    found = plan(named_gpu("H100", 4), THREE_B, resources=resources)
    assert found.runs == 1
    assert not any("not one can start" in warning for warning in found.warnings)


def test_gpus_that_no_trial_can_take_are_told_as_unused() -> None:
    def unused(gpus: int) -> list[str]:
        found = plan(named_gpu("H100", gpus), THREE_B, resources={"workers_per_trial": 4})
        return [warning for warning in found.warnings if "stay unused" in warning]

    assert unused(6)[0].startswith("2 of 6 GPUs stay unused")
    assert unused(8) == []


def test_where_no_gpu_is_planned_for_neither_gpu_hours_nor_cost_are_told() -> None:
    resources = {"gpus_per_worker": 1, "max_concurrent": 1, "scale_up_minutes": 30}
    found = plan(CPU, SMOL, resources=resources, budget={"price_per_gpu_hour": 2.5})
    assert found.runs == 1
    assert not {"GPU-hours: ", "cost: "} & set(re.findall(r"(?m)^.*?: ", render(found)))
    assert any("name the GPU with --gpu" in warning for warning in found.warnings)
    assert not any("scale_up_minutes" in warning for warning in found.warnings)
    assert found.trials[0].cost in (None, 0.0)


def test_a_searched_micro_batch_has_one_column_and_trials_with_several_reasons_are_said_to_be_named_with_each() -> None:
    found = render(plan(A100, SMOL, space={"micro_batch_size": [1, 2]}))
    assert "micro-batch" in found
    assert "micro_batch_size" not in found
    said = "a trial that is refused for several reasons is named with each"
    assert said not in found
    trial = {"optimizer": "adamw_8bit", "offload": "optimizer", "zero_stage": 1}
    assert said in render(plan(A100, SMOL, trial=trial))


def test_a_bound_of_speed_that_even_the_best_time_breaks_is_told() -> None:
    def told(constraint: str) -> tuple[str, ...]:
        return plan(named_gpu("H100", 1), THREE_B, constraints=[constraint]).warnings

    assert told("tokens_per_s >= 1e9")[0].startswith(
        "estimated not to keep tokens_per_s >= 1e9: 1 of 1 trials (between"
    )
    assert told("tokens_per_s >= 1") == ()
    assert told("step_time_s <= 1e-6")
    assert told("step_time_s <= 1e6") == ()


def test_the_host_memory_that_is_assumed_of_a_named_gpu_is_told_where_a_trial_offloads() -> None:
    def assumed(hardware: Hardware, offload: str) -> list[str]:
        found = plan(hardware, THREE_B, trial={"zero_stage": 3, "offload": offload})
        return [line for line in found.assumptions if "host memory" in line]

    gpus = named_gpu("H100", 2)
    assert "256 GiB of host memory a node (128 GiB a GPU)" in assumed(gpus, "optimizer")[0]
    assert assumed(gpus, "none") == []
    assert assumed(replace(gpus, is_assumed=False), "optimizer") == []


def test_what_nodes_that_come_when_asked_may_hold_is_warned_of_and_runs() -> None:
    resources = {"workers_per_trial": 8, "gpus_per_worker": 1, "max_concurrent": 1, "scale_up_minutes": 10}
    found = plan(named_gpu("H100", 4), resources=resources)
    assert found.runs == 1
    assert [told for told in found.warnings if "not one can start there" in told]


def test_a_trial_for_which_nodes_may_be_large_enough_where_they_differ_is_warned_of_and_runs() -> None:
    (warning,) = plan(named_gpu("H100", 16), THREE_B, resources={"cpus_per_worker": 200}).warnings
    assert "the cluster has 256 CPUs and 16 GPUs on 2 nodes: not one can start there" in warning


def test_changes_that_fit_only_together_are_named_where_one_of_them_alone_is_refused() -> None:
    """ZeRO-3 is refused with int8, and with amp_fp16 any stage of ZeRO is."""
    settings = {"micro_batch_size": 1, "sequence_length": 512, "global_batch_size": 8}
    mixture = Case(TrialConfig(**settings, precision="int8", zero_stage=2), MIXTURE, named_gpu("L4", 8), 8)
    assert what_fits(mixture, 22 * 2**30, 8) == "zero_stage 3 and precision bf16"
    whole = case(named_gpu("A100-40GB", 8), 8, **settings, rank="full", precision="amp_fp16", zero_stage=0)
    assert what_fits(whole, 20 * 2**30, 8) == "offload optimizer and zero_stage 2 and precision bf16"


SEVENTY_B = shape_of(
    LLAMA_2_7B
    | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    | {"intermediate_size": 28672, "max_position_embeddings": 8192, "vocab_size": 128256}
)


def remedies(told: str) -> list[dict[str, Any]]:
    """The settings of each that a refusal names, by its words."""
    each = told.partition("fits with ")[2].replace(", or, with little to spare, ", ", or ").split(", or ")
    named = [[words.partition(" ") for words in re.split(" and | with ", one)] for one in each if one]
    return [{name: int(to) if to.isdigit() else to or True for name, _, to in one} for one in named]


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_quantised_weights_too_large_for_a_worker_are_told_of_half_precision_in_shards(precision: str) -> None:
    trial = {"precision": precision, "zero_stage": 2, "sequence_length": 4096, "global_batch_size": 16}
    keys = {"resources": {"workers_per_trial": 16}}
    (reason,) = plan(named_gpu("A100-40GB", 16), SEVENTY_B, trial=trial, **keys).trials[0].reasons
    assert reason.endswith("fits with gradient_checkpointing and zero_stage 3 and precision bf16")
    (remedy,) = remedies(reason)
    assert plan(named_gpu("A100-40GB", 16), SEVENTY_B, trial=trial | remedy, **keys).runs == 1


def test_where_nothing_else_is_enough_the_offload_of_parameters_is_named_unless_the_host_is_too_small() -> None:
    trial = {"precision": "nf4", "sequence_length": 4096, "gradient_checkpointing": True, "micro_batch_size": 1}
    two = named_gpu("A100-40GB", 2)
    (reason,) = plan(two, SEVENTY_B, trial=trial).trials[0].reasons
    assert {"offload": "optimizer_and_parameters", "precision": "bf16", "zero_stage": 3} in remedies(reason)
    assert "sequence_length" not in reason, "where the offload is needed all the same"
    (reason,) = plan(replace(two, host_memory_bytes=2**36), SEVENTY_B, trial=trial).trials[0].reasons
    assert "offload" not in reason


def test_int8_weights_are_told_of_nf4_at_the_full_length() -> None:
    trial = {"precision": "int8", "sequence_length": 4096, "micro_batch_size": 1, "rank": 8}
    (reason,) = plan(named_gpu("T4", 1), trial=trial).trials[0].reasons
    assert reason.endswith("fits with gradient_checkpointing and precision nf4")


def test_a_large_adapter_is_told_of_a_cheaper_optimizer_and_its_offload_before_the_mildest_lower_rank() -> None:
    trial = {"precision": "nf4", "rank": 256, "micro_batch_size": 1, "sequence_length": 512}
    trial |= {"gradient_checkpointing": True, "optimizer": "adamw"}
    hardware = named_gpu("A10G", 1, 9 * 2**30)
    (reason,) = plan(hardware, trial=trial).trials[0].reasons
    assert [next(iter(one)) for one in remedies(reason)] == ["offload", "optimizer", "rank"]
    assert remedies(reason)[-1] == {"rank": 128}


def test_every_remedy_that_a_refusal_names_runs() -> None:
    drawn, asked = random.Random(7), 0
    for _ in range(150):
        model = drawn.choice([SEVEN_B, SEVENTY_B, MIXTURE])
        hardware = named_gpu(drawn.choice(["T4", "A10G", "A100-40GB", "H100"]), drawn.choice([1, 2, 8, 16]))
        trial = {
            "precision": drawn.choice(["nf4", "int8", "bf16", "amp_bf16", "fp32", "fp16"]),
            "rank": drawn.choice([8, 64, 256, "full"]),
            "sequence_length": drawn.choice([256, 1024, 4096]),
            "micro_batch_size": drawn.choice([1, 4, 16]),
            "global_batch_size": 256,
            "zero_stage": drawn.choice([0, 1, 2, 3]),
            "target_modules": "attention",
        }
        workers = drawn.choice([n for n in (1, 2, 8) if n <= hardware.gpus])
        refused = plan(hardware, model, trial=trial, resources={"workers_per_trial": workers}).trials[0].reasons
        for remedy in [one for reason in refused for one in remedies(reason)]:
            asked += 1
            shape = {"workers_per_trial": remedy.pop("workers_per_trial", workers)}
            again = plan(hardware, model, trial=trial | remedy, resources=shape)
            assert again.runs == 1, (trial, workers, remedy, again.trials[0].reasons)
    assert asked > 50


def test_more_workers_are_named_beside_other_changes_where_those_alone_are_not_enough() -> None:
    settings = {"micro_batch_size": 1, "sequence_length": 4096, "global_batch_size": 64, "rank": "full"}
    asked = case(named_gpu("A10G", 8), **settings, precision="bf16", zero_stage=2)
    told = what_fits(asked, 10 * 2**30, 8)
    assert told == "workers_per_trial 4 and gradient_checkpointing and offload optimizer and zero_stage 3"


def test_the_parts_of_a_plan_on_a_cpu_sum_to_the_memory_that_it_tells() -> None:
    memory = plan(CPU, model=THREE_B, trial={"sequence_length": 64, "precision": "nf4"}).trials[0].memory
    assert memory.parts.total == memory.device_bytes


def test_trials_at_a_time_follow_from_what_each_takes() -> None:
    shape = {"workers_per_trial": 2, "gpus_per_worker": 1, "cpus_per_worker": 4}
    space = {"learning_rate": [n * 1e-5 for n in range(1, 6)]}
    assert plan(A100, space=space, resources=shape).concurrent == 4
    assert plan(A100, space=space, resources={**shape, "max_concurrent": 3}).concurrent == 3
    assert plan(CPU, resources={"workers_per_trial": 2}).concurrent == 1


def cpus(count: int, gib: float, nodes: int = 1) -> Hardware:
    return replace(CPU, cpus=count, host_memory_bytes=int(gib * 2**30), nodes=nodes)


@pytest.mark.parametrize("hardware", [cpus(8, 8), cpus(64, 64), cpus(64, 16, nodes=4)], ids=["8", "64", "4 nodes"])
def test_on_cpus_as_many_run_at_a_time_as_the_hosts_memory_lets(hardware: Hardware) -> None:
    """Divided among as many as there are CPUs, memory would let none of them run."""
    space = {"rank": [8, 16, 32, 64], "learning_rate": {"choice": [n * 1e-5 for n in range(1, 10)]}}
    found = plan(hardware, shape_of(SMOLLM2_135M), space=space, trial={"sequence_length": 256})
    assert found.refused == 0
    one = {"micro_batch_size": 1, "rank": 64, "precision": "fp32", "sequence_length": 256}
    largest = estimate_on(TrialConfig(**one), shape_of(SMOLLM2_135M), 1, hardware).device_bytes
    on_each = int(hardware.host_memory_bytes * 0.9 / largest)
    assert found.concurrent == min(36, hardware.nodes * min(on_each, hardware.cpus // hardware.nodes))
    assert found.worker_memory_bytes >= largest


def test_on_cpus_no_more_run_at_a_time_than_there_are_and_one_that_fits_nowhere_holds_up_nobody() -> None:
    roomy = cpus(64, 512)
    assert (
        plan(roomy, shape_of(SMOLLM2_135M), space={"rank": [8, 16, 32]}, trial={"sequence_length": 64}).concurrent == 3
    )
    small = cpus(8, 12)
    space = {"micro_batch_size": [1, 64], "rank": [8, 16]}
    mixed = plan(small, shape_of(SMOLLM2_135M), space=space, trial={"sequence_length": 512, "global_batch_size": 64})
    assert (mixed.runs, mixed.concurrent) == (2, 2)


def test_a_trial_that_would_fit_with_fewer_at_a_time_is_told_so_first() -> None:
    def reason(**resources: Any) -> str:
        trial = {"sequence_length": 256, "micro_batch_size": 8, "global_batch_size": 8}
        found = plan(cpus(8, 16), shape_of(SMOLLM2_135M), trial=trial, search={"repeats": 8}, resources=resources)
        (told,) = found.trials[0].reasons
        return told.partition("fits with ")[2]

    told = reason(max_concurrent=8)
    assert told.startswith("resources.max_concurrent ")
    assert " or micro_batch_size " in told
    most = int(told.split(",")[0].rpartition(" ")[2])
    assert plan(
        cpus(8, 16),
        shape_of(SMOLLM2_135M),
        trial={"sequence_length": 256, "micro_batch_size": 8, "global_batch_size": 8},
        search={"repeats": 8},
        resources={"max_concurrent": most},
    ).runs
    limited = reason(max_concurrent=8, memory_per_worker="1500MiB")
    assert limited.startswith("resources.memory_per_worker ")
    assert f" and resources.max_concurrent {most}, or " in limited


def test_to_count_what_runs_at_a_time_each_memory_is_estimated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of a thousand trials is to take no two seconds."""
    asked: list[TrialConfig] = []

    def counted(config: TrialConfig, *others: Any) -> Any:
        asked.append(config)
        return estimate_on(config, *others)

    for module in ("concurrency", "planned_trial"):
        monkeypatch.setattr(f"orchestrator.planning.{module}.estimate_on", counted)
    space = {"rank": [4, 8, 16, 32, 64, 128, 256, 512], "learning_rate": [n * 1e-5 for n in range(1, 126)]}
    found = plan(cpus(64, 64), shape_of(SMOLLM2_135M), space=space, trial={"micro_batch_size": 1})
    assert len(found.trials) == 1000
    # And once for each trial, whose record says it.
    assert len(asked) == 8 + 1000


def test_no_gpus_are_asked_for_only_where_there_are_none() -> None:
    with pytest.raises(InputError, match=r"gpus_per_worker is 0 where there are GPUs.*CUDA_VISIBLE_DEVICES="):
        plan(A100, resources={"gpus_per_worker": 0})
    assert plan(CPU, shape_of(SMOLLM2_135M), resources={"gpus_per_worker": 0}).concurrent


@pytest.mark.parametrize(
    ("hardware", "resources", "concurrent"),
    [
        (A100, {"gpus_per_worker": 0.4}, 16),
        (replace(cpus(12, 512), nodes=2), {"cpus_per_worker": 4}, 2),
        (replace(cpus(7, 512), nodes=2), {}, 7),
        (replace(cpus(16, 512), nodes=2), {"workers_per_trial": 3}, 4),
        (replace(cpus(16, 512), nodes=4), {"workers_per_trial": 5}, 3),
    ],
    ids=["shares", "node by node", "uneven", "kept on a node", "spread"],
)
def test_a_plan_counts_as_a_cluster_does(hardware: Hardware, resources: dict[str, Any], concurrent: int) -> None:
    trial = {"sequence_length": 64, "micro_batch_size": 1, "global_batch_size": 15, "precision": "fp32"}
    space = {"learning_rate": [n * 1e-5 for n in range(1, 21)]}
    found = plan(hardware, shape_of(SMOLLM2_135M), trial=trial, space=space, resources=resources)
    assert (found.refused, found.concurrent) == (0, concurrent)


@pytest.mark.parametrize("gpus", [9, 12, 20])
def test_gpus_beyond_a_whole_node_leave_a_trial_of_eight_on_a_node_of_eight(gpus: int) -> None:
    trial, resources = {"zero_stage": 3, "global_batch_size": 16}, {"workers_per_trial": 8}
    keys = {"trial": trial, "space": {"rank": [8, 16]}, "resources": resources}
    more, whole = (plan(named_gpu("H100", count), **keys) for count in (gpus, gpus // 8 * 8))
    assert (more.gpu_hours, more.makespan_s, more.concurrent) == (whole.gpu_hours, whole.makespan_s, gpus // 8)
    assert not any("between the" in told for told in more.assumptions)


def test_the_last_node_of_a_named_gpu_has_the_rest_and_a_clusters_nodes_are_taken_as_even() -> None:
    named = named_gpu("H100", 20)
    assert named.each_node == ((128, 8), (128, 8), (64, 4))
    assert replace(named, full_node_gpus=None).each_node == ((107, 7), (107, 7), (106, 6))


def test_trials_share_a_gpu_by_the_memory_of_the_largest() -> None:
    small = {"precision": "nf4", "micro_batch_size": 1, "global_batch_size": 4, "sequence_length": 256}
    space = {"rank": [8, 64], "learning_rate": [n * 1e-5 for n in range(1, 41)]}
    packed = plan(A100, trial=small, space=space, resources={"gpus_per_worker": "auto", "cpus_per_worker": 0.5})
    needed_bytes = max(trial.memory.device_bytes for trial in packed.trials)
    on_each = round(1 / packed.gpus_per_worker)
    assert on_each >= 2
    assert on_each * needed_bytes <= 80 * 2**30 < (on_each + 2) * needed_bytes
    assert packed.concurrent == 8 * on_each
    # What torch gives out is not all: every process has a context, and NCCL.
    fraction = gpu_memory_fraction(packed, A100)
    assert on_each * (fraction * 80 * 2**30 + outside_torch_bytes("deepspeed", 1, A100)) <= 80 * 2**30
    assert max(trial.memory.reserved_bytes for trial in packed.trials) <= fraction * 80 * 2**30
    assert packed.refused == 0
    alone = plan(A100, trial=small, space=space, resources={"gpus_per_worker": 1})
    assert alone.concurrent == 8
    assert gpu_memory_fraction(alone, A100) is None


@pytest.mark.parametrize(
    ("gpus", "resources", "keys", "on_each"),
    [
        (1, {"max_concurrent": 1}, {}, 1),
        (1, {"max_concurrent": 4}, {}, 4),
        (1, {}, {}, 8),
        (3, {}, {}, 3),
        (4, {"max_concurrent": 6}, {}, 1),
        (1, {"cpus_per_worker": 8}, {}, 2),
        (1, {}, {"budget": {"trials": 3}}, 3),
        (1, {}, {"budget": {"trials": 5}, "search": {"algorithm": "tpe", "repeats": 2}}, 10),
    ],
    ids=["one", "four", "all", "three GPUs", "uneven", "CPUs", "cut grid", "search"],
)
def test_an_automatic_share_of_a_gpu_is_what_a_trial_has_of_it_and_is_charged_with(
    gpus: int, resources: dict[str, Any], keys: dict[str, Any], on_each: int
) -> None:
    space = {"learning_rate": [n * 1e-5 for n in range(1, 9)]}
    trial = {"micro_batch_size": 1, "sequence_length": 64}
    auto = {"gpus_per_worker": "auto", **resources}
    hardware = named_gpu("A100", gpus)
    found = plan(hardware, shape_of(SMOLLM2_135M), space=space, trial=trial, resources=auto, **keys)
    assert round(1 / found.gpus_per_worker) == found.gpu_shared_by == on_each
    # What torch may take of the GPU is less by the context of each.
    assert 0.8 / on_each < (gpu_memory_fraction(found, hardware) or 0.97) < 1 / on_each
    (first, *_) = found.trials
    assert first.gpu_hours == pytest.approx(first.seconds / 3600 / on_each, rel=0.001)


@pytest.mark.parametrize(("trials", "on_each"), [(8, 8), (12, 6), (16, 8), (18, 6)])
def test_rounds_of_trials_that_share_a_gpu_are_even_so_that_all_of_it_is_charged(trials: int, on_each: int) -> None:
    space = {"learning_rate": [n * 1e-5 for n in range(1, trials + 1)]}
    settings = {"micro_batch_size": 1, "sequence_length": 512, "precision": "nf4", "gradient_checkpointing": True}
    resources = {"gpus_per_worker": "auto", "max_concurrent": 8}
    found = plan(named_gpu("H100", 1), SEVEN_B, space=space, trial=settings, resources=resources)
    assert found.gpu_shared_by == on_each
    hours = found.gpu_hours[1]
    assert sum(trial.gpu_hours for trial in found.trials) == pytest.approx(hours, rel=0.001)
    assert hours == pytest.approx((found.makespan_s[1] - FIRST_START_S.expected) / 3600, rel=0.001)


def test_cpus_of_nodes_without_a_gpu_make_no_share_of_one_smaller() -> None:
    two_nodes = replace(named_gpu("A100", 1), cpus=8, nodes=2, full_node_gpus=None)
    space = {"learning_rate": [n * 1e-5 for n in range(1, 9)]}
    trial = {"micro_batch_size": 1, "sequence_length": 64}
    found = plan(two_nodes, shape_of(SMOLLM2_135M), space=space, trial=trial, resources={"gpus_per_worker": "auto"})
    assert (found.concurrent, found.gpus_per_worker) == (4, 0.25)


def test_trials_that_do_not_run_leave_their_share_of_a_gpu_to_the_others() -> None:
    space = {"sequence_length": [64, 128, 10**6, 2 * 10**6]}
    found = plan(
        named_gpu("A100", 1),
        shape_of(SMOLLM2_135M),
        space=space,
        trial={"micro_batch_size": 1},
        resources={"gpus_per_worker": "auto"},
    )
    assert (found.refused, found.gpus_per_worker, found.concurrent) == (2, 0.5, 2)


def test_a_plan_has_no_more_trials_at_a_time_than_run() -> None:
    space = {"sequence_length": [64, 128, 10**6]}
    assert plan(A100, shape_of(SMOLLM2_135M), space=space).concurrent == 2
    assert plan(A100, shape_of(SMOLLM2_135M), space={"sequence_length": [10**6]}).concurrent == 1
    search = {"search": {"algorithm": "tpe", "repeats": 2}, "budget": {"trials": 3}}
    assert plan(A100, space={"learning_rate": {"log_uniform": [1e-5, 1e-3]}}, **search).concurrent == 6


def test_sharing_a_gpu_makes_no_trial_cheaper_that_keeps_it_busy() -> None:
    long = {"precision": "bf16", "micro_batch_size": 1, "sequence_length": 4096, "max_steps": 900}
    space = {"learning_rate": [n * 1e-5 for n in range(1, 5)]}
    whole = plan(A100, shape_of(SMOLLM2_135M), trial=long, space=space)
    shared = plan(A100, shape_of(SMOLLM2_135M), trial=long, space=space, resources={"gpus_per_worker": 0.25})
    assert (whole.gpu_shared_by, shared.gpu_shared_by) == (1, 4)
    assert shared.trials[0].seconds > 3.9 * whole.trials[0].seconds
    assert shared.gpu_hours[1] == pytest.approx(whole.gpu_hours[1], rel=0.02)


def test_no_more_trials_share_a_gpu_than_there_are() -> None:
    found = plan(A100, shape_of(SMOLLM2_135M), space={"rank": [4, 8]}, resources={"gpus_per_worker": 0.1})
    assert found.gpu_shared_by == 2


def test_refused_trials_share_no_gpu() -> None:
    resources = {"gpus_per_worker": 0.125}
    alone = plan(A100, shape_of(SMOLLM2_135M), space={"precision": ["bf16"]}, resources=resources)
    beside = plan(A100, shape_of(SMOLLM2_135M), space={"precision": ["bf16", "int8"]}, resources=resources)
    refused = plan(
        A100, shape_of(SMOLLM2_135M), space={"sequence_length": [1024, 10**6, 2 * 10**6]}, resources=resources
    )
    assert (alone.gpu_shared_by, beside.gpu_shared_by) == (1, 2)
    assert (refused.refused, refused.gpu_shared_by) == (2, 1)


def test_a_trial_lies_on_no_more_nodes_than_there_are() -> None:
    assert placement(A100, WorkerShape(4, 1.0, 1.0)).nodes == 1


def pace_of(*settings: dict[str, Any], model: str = "builtin:tiny-llama") -> Pace:
    """Of trials that ran on an A10G."""
    trials = [made_up_trial(each).model_copy(update={"predicted_step_time_s": 1.0}) for each in settings]
    found = Pace.of([made_up_sweep(trials, model=model)], model, named_gpu("A10G", 1))
    assert len(found.steps) == len(settings)
    return found


def test_what_the_times_take_for_granted_is_told_once() -> None:
    spread = {"trial": {"global_batch_size": 16, "zero_stage": 3}, "resources": {"workers_per_trial": 16}}
    two_nodes = plan(named_gpu("A100", 16), space={"rank": [4, 8]}, **spread)
    rows, network = two_nodes.assumptions
    assert "rows fill sequence_length" in rows
    assert "100 Gb/s between the 2 nodes" in network
    assert render(two_nodes).count("assumed: ") == 2
    assert plan(A100, trial={"packing": True}).assumptions == ()
    flash = {"packing": True, "attention": "flash_attention_2"}
    assert len(plan(A100, trial=flash, pace=pace_of({})).assumptions) == 1
    assert plan(A100, trial=flash, pace=pace_of({"attention": "flash_attention_2"})).assumptions == ()


def test_that_rows_are_as_long_as_those_measured_is_assumed_only_where_such_rows_were() -> None:
    (alike,) = plan(A100, pace=pace_of({"rank": 8}, {"rank": 64})).assumptions
    assert alike == "as to time, rows as long as in the trials that ran here; as to memory, rows fill sequence_length"
    others = (
        pace_of({"packing": True}),
        pace_of({}, {"packing": True}),
        pace_of({}, model="another"),
        pace_of({"sequence_length": 64}),
    )
    for pace in others:
        (told,) = plan(A100, pace=pace).assumptions
        assert told.startswith("rows fill sequence_length: shorter ones take less time")


@pytest.mark.parametrize(
    ("seconds", "words"), [(89.4, "89 s"), (90, "1.5 min"), (599, "10 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_a_duration_is_told_to_two_digits(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_times_of_a_plans_trials_are_told_in_one_unit() -> None:
    found = plan(A100, space={"max_steps": [2000, 5000]}, trial={"micro_batch_size": 16})
    short, long = (trial.seconds for trial in found.trials)
    assert 90 < short < 5400 < long
    cells = [line.rsplit("  ", 1)[1] for line in render(found).splitlines()[3:5]]
    assert cells == [f"{short / 60:.2g} min", f"{long / 60:.0f} min"]


def test_what_flash_attention_is_counted_as_is_told_where_a_trial_runs_with_it() -> None:
    def assumed(attention: str) -> list[str]:
        told = plan(A100, trial={"attention": attention}).assumptions
        return [line for line in told if line.startswith("flash_attention_2 takes the time")]

    assert (len(assumed("flash_attention_2")), len(assumed("sdpa"))) == (1, 0)


def test_one_of_a_thing_is_told_as_one() -> None:
    switched = plan(A100, space={"packing": [True, False]})
    assert "  true  " in render(switched)
    one_measured = switched.model_copy(update={"measured": 1})
    assert "by the speed of 1 trial that ran here" in render(one_measured)
    search = {"search": {"algorithm": "tpe"}, "budget": {"trials": 4}, "trial": {"max_steps": 10}}
    told = render(plan(A100, space={"learning_rate": {"log_uniform": [1e-5, 1e-3]}}, **search))
    (line,) = [line for line in told.splitlines() if "of these examples" in line]
    assert line.startswith("up to 4 trials, 4 at a time; 0 of these examples are refused; they take ")
    assert " to " not in line.partition("; they take ")[2]
    one_trial = {**search, "budget": {"trials": 1}}
    assert "up to 1 trial, 1 at a time" in render(plan(A100, space={"rank": [8, 16]}, **one_trial))
    (alone,) = plan(CPU, resources={"gpus_per_worker": 1}).trials[0].reasons
    assert alone.startswith("a trial takes 1 worker of 1 CPU and 1 GPU each, and the cluster has 2 CPUs and 0 GPUs")


def test_what_is_asked_beyond_one_objective_is_told_in_one_line() -> None:
    keys: dict[str, Any] = {
        "objective": [{"metric": "eval_loss"}, {"metric": "tokens_per_s", "mode": "max"}],
        "constraints": ["peak_memory_bytes <= 24GiB", "step_time_s <= 9"],
        "scheduler": {"asha": {"grace_steps": 5}, "extrapolation": {"grace_steps": 5}},
    }
    asked = (
        "objectives eval_loss (min), tokens_per_s (max); constraints peak_memory_bytes <= 24GiB, step_time_s <= 9; "
        "scheduler asha and extrapolation"
    )
    assert render(plan(A100, **keys)).splitlines()[1:3] == [asked, ""]
    assert render(plan(A100, scheduler={"fifo": {}})).splitlines()[1] == ""


def test_totals_are_told_to_three_digits_and_what_of_the_time_is_the_start() -> None:
    totals = {"gpu_hours": (0.0212, 0.02134, 0.0311), "cost": (402.93, 805.75, 1611.39), "makespan_s": (24, 34, 71)}
    told = render(plan(A100).model_copy(update=totals))
    assert "GPU-hours: about 0.0213 (0.0212 to 0.0311)" in told
    assert "cost: about 806 (403 to 1610)" in told
    assert "time: about 34 s (24 s to 71 s), of which 25 s to start\n" in told
    assert "to start" not in render(plan(A100).model_copy(update={"makespan_s": (40.0, 50.0, 80.0)}))


def test_what_is_needed_and_what_is_there_are_never_told_as_the_same() -> None:
    keys: dict[str, Any] = {"trial": {"micro_batch_size": 1}}
    memory = plan(A100, **keys).trials[0].memory
    assert memory
    (reason,) = plan(A100, **keys, resources={"memory_per_worker": memory.needed_bytes - 2**18}).trials[0].reasons
    needed, there = re.findall(r"(?:about|allows) ([\d.]+) GiB", reason)
    assert float(needed) > float(there)


def test_the_points_that_a_search_tries_first_are_not_called_random() -> None:
    search = {"algorithm": "tpe", "points": ["known_good"]}
    keys = {"space": {"learning_rate": {"log_uniform": [1e-5, 1e-3]}}, "budget": {"trials": 4}}
    assert "; its points first, then random ones:" in render(plan(A100, search=search, **keys))
    assert "; random ones of it:" in render(plan(A100, search={"algorithm": "tpe"}, **keys))


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_a_point_that_is_offered_and_excluded_is_told_as_not_tried(algorithm: str) -> None:
    keys: dict[str, Any] = {
        "space": {"rank": [8, 64], "learning_rate": {"log_uniform": [1e-5, 1e-3]}},
        "search": {"algorithm": algorithm, "points": ["known_good"]},
        "budget": {"trials": 4},
    }
    (warning,) = plan(A100, **keys, exclude=[{"rank": 64}]).warnings
    assert warning == ("of search.points {rank: 64, learning_rate: 0.0001} is not tried, since `exclude` names it")
    assert plan(A100, **keys).warnings == ()


def test_points_beyond_those_that_a_search_tries_are_told() -> None:
    keys: dict[str, Any] = {"space": {"rank": [8, 64], "learning_rate": {"log_uniform": [1e-4, 1e-2]}}}
    points = [{"rank": 8}, {"rank": 8, "learning_rate": 1e-3}, {"rank": 64}, "known_good"]
    told = "search.points stand for 4 configurations, of which {} tried: raise {}, or take some away"
    for algorithm in ("random", "tpe"):
        keys["search"] = {"algorithm": algorithm, "points": points}
        assert plan(A100, **keys, budget={"trials": 1}).warnings == (told.format("1 is", "budget.trials"),)
        assert plan(A100, **keys, budget={"trials": 4}).warnings == ()
    keys |= {"search": {"points": points}, "scheduler": {"pbt": {"population": 3, "interval_steps": 5}}}
    assert told.format("3 are", "scheduler.pbt.population") in plan(A100, **keys).warnings


def test_workers_of_one_trial_never_share_a_gpu() -> None:
    small = {"precision": "nf4", "micro_batch_size": 1, "global_batch_size": 4, "sequence_length": 256}
    assert plan(A100, trial=small, resources={"gpus_per_worker": "auto", "workers_per_trial": 2}).gpus_per_worker == 1
    with pytest.raises(ValidationError, match="a trial's workers cannot share a GPU"):
        plan(A100, resources={"gpus_per_worker": 0.5, "workers_per_trial": 2})


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 256),
    micro=st.integers(1, 16),
    sequence=st.integers(64, 4096),
    precision=st.sampled_from(["fp32", "amp_bf16", "bf16", "int8", "nf4"]),
    attention=st.sampled_from(["eager", "sdpa"]),
    checkpointing=st.booleans(),
)
def test_more_of_anything_never_takes_less_memory(
    rank: int, micro: int, sequence: int, precision: str, attention: Any, checkpointing: bool
) -> None:
    config = TrialConfig(
        rank=rank,
        micro_batch_size=micro,
        sequence_length=sequence,
        precision=precision,
        attention=attention,
        gradient_checkpointing=checkpointing,
    )
    before = estimate_on(config, SEVEN_B, 1, A100)
    for more in ({"rank": rank * 2}, {"micro_batch_size": micro + 1}, {"sequence_length": sequence + 64}):
        after = estimate_on(config.model_copy(update=more), SEVEN_B, 1, A100)
        assert after.allocated_bytes >= before.allocated_bytes
    assert before.low_bytes < before.allocated_bytes < before.high_bytes
    assert before.allocated_bytes < before.reserved_bytes < before.device_bytes


@settings(deadline=None)
@given(st.sampled_from(["fp32", "bf16", "nf4"]), st.integers(2, 64))
def test_a_higher_zero_stage_never_holds_more_model_states(precision: str, workers: int) -> None:
    from orchestrator.planning.memory import _bytes_of

    held = []
    for stage in range(4):
        config = TrialConfig(precision=precision, zero_stage=stage, micro_batch_size=1, global_batch_size=workers)
        parts = memory_parts(config, SEVEN_B, workers, _bytes_of(config, "cuda", True))
        held.append(parts.weights + parts.adapter + parts.gradients + parts.optimizer)
    assert held[1] >= held[2] >= held[3]
    assert held[0] >= held[3]


def test_time_grows_with_work_and_shrinks_with_workers() -> None:
    def seconds(workers: int = 1, **changes: Any) -> float:
        config = TrialConfig(micro_batch_size=1, **changes)
        return step_seconds(config, SEVEN_B, A100, Placement(workers, 4)).expected

    assert seconds(sequence_length=1024) > seconds(sequence_length=512)
    assert seconds(gradient_checkpointing=True) > seconds()
    assert seconds(precision="fp32") > seconds(precision="bf16")
    assert seconds(workers=4) < seconds(workers=2) < seconds()


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1024", 1024), ("0.5TiB", 2**39)]
)
def test_sizes_of_memory_are_read(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "80 XB", "1e400"])
def test_what_is_no_size_of_memory_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="80GiB"):
        parse_memory(text)


def test_an_unknown_gpu_lists_those_that_are_known() -> None:
    with pytest.raises(InputError, match=r"did you mean H100\?; known: .*A100.*L40S"):
        named_gpu("H10", 1)
    assert named_gpu("nvidia geforce rtx 4090", 1).gpu_name == "RTX-4090"


def test_a_cpu_says_by_its_flags_what_it_computes() -> None:
    assert cpu_half_precision(frozenset({"avx2"})) == (False, False)
    assert cpu_half_precision(frozenset({"avx512_bf16"})) == (True, False)
    assert cpu_half_precision(frozenset({"amx_bf16", "avx512_fp16"})) == (True, True)


def test_gpu_hours_and_cost_are_those_of_the_trials_and_add_up() -> None:
    priced = plan(A100, space={"rank": [8, 16, 32]}, trial={"max_steps": 900}, budget={"price_per_gpu_hour": 2.0})
    assert sum(trial.gpu_hours for trial in priced.trials) == pytest.approx(priced.gpu_hours[1])
    assert sum(trial.cost for trial in priced.trials) == pytest.approx(priced.cost[1])
    assert plan(A100).trials[0].cost is None
    assert "cost: about" in render(priced)
    assert "cost:" not in render(plan(CPU, shape_of(SMOLLM2_135M), budget={"price_per_gpu_hour": 2.0}))


@pytest.mark.parametrize(
    ("scheduler", "longest"),
    [({"asha": {}}, 25), ({"hyperband": {}}, 25), ({"median": {}}, 49), ({"median": {}, "extrapolation": {}}, 49)],
)
def test_a_grace_with_which_nobody_is_stopped_is_told_of_every_scheduler(
    scheduler: dict[str, dict[str, int]], longest: int
) -> None:
    def told(grace: int) -> list[str]:
        keys = {name: {"grace_steps": grace} for name in scheduler}
        found = plan(A100, trial={"max_steps": 50}, scheduler=keys)
        return [warning.split(" stops nobody")[0] for warning in found.warnings if "stops nobody" in warning]

    assert told(longest + 1) == list(scheduler)
    assert told(longest) == []


def test_a_plan_counts_no_trial_beyond_the_budgets_trial_hours() -> None:
    cut = plan(A100, space={"rank": [8, 16]}, trial={"max_steps": 100_000}, budget={"trial_hours": 0.5})
    assert cut.gpu_hours == pytest.approx((1.0, 1.0, 1.0))
    assert any("to be ended there: 2 of 2 trials" in warning for warning in cut.warnings)
