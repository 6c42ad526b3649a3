"""The whole product of settings, families and devices: each case runs, or is refused with a way out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.planning.compatibility import REFUSALS, Case, Rule
from orchestrator.planning.model_shape import shape_of
from tests.compatibility_page import MACHINES
from tests.fast.cases import LLAMA_2_7B

FAMILIES = {
    "llama": shape_of(LLAMA_2_7B),
    "wide heads": shape_of(LLAMA_2_7B | {"head_dim": 288}),
    "gemma2": shape_of(LLAMA_2_7B | {"model_type": "gemma2"}),
    "gemma3": shape_of({"model_type": "gemma3", "text_config": LLAMA_2_7B, "vision_config": {"image_size": 896}}),
    "bloom": shape_of({"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}),
    "gpt2": shape_of({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}),
    "mixtral": shape_of(LLAMA_2_7B | {"model_type": "mixtral", "num_key_value_heads": 8}),
}
BARE = {"has_bitsandbytes": False, "has_flash_attention": False}
DEVICES = [*MACHINES.values(), *(replace(MACHINES[name], **BARE) for name in ("CPU", "Hopper (H100)"))]
SETTINGS: dict[str, list[Any]] = {
    "precision": list(Precision),
    "zero_stage": [0, 1, 2, 3],
    "engine": ["deepspeed", "ddp"],
    "offload": ["none", "optimizer", "optimizer_and_parameters"],
    "attention": ["eager", "sdpa", "flash_attention_2"],
    "optimizer": ["adamw", "adamw_8bit", "sgd"],
    "rank": [8, "full"],
}
MORE: list[dict[str, Any]] = [
    {},
    {"dora": True, "lora_dropout": 0.1, "target_modules": "all-linear"},
    {"packing": True, "rslora": True, "sequence_length": 8192, "target_modules": ("k_porj",), "global_batch_size": 15},
]
"""What few rules ask about, together: a case each of all that they refuse."""
WAYS_OUT = {**SETTINGS, "dora": [False], "rslora": [False], "lora_dropout": [0.0], "packing": [False]} | {
    "target_modules": ["attention"],
    "sequence_length": [512],
    "global_batch_size": [16],
}


def walk() -> Iterator[Case]:
    configs = [
        TrialConfig.model_construct(**(TrialConfig().model_dump() | dict(zip(SETTINGS, values, strict=True)) | more))
        for values in itertools.product(*SETTINGS.values())
        for more in MORE
    ]
    # What the sweep file's own reader makes of it: plain data parallelism shards nothing.
    configs = [config for config in configs if config.engine == "deepspeed" or config.zero_stage == 0]
    for config, shape, device in itertools.product(configs, FAMILIES.values(), DEVICES):
        yield Case(config, shape, device, 2)


def ways_out(case: Case) -> Iterator[tuple[str, Case]]:
    """The same with one setting changed."""
    for name, values in WAYS_OUT.items():
        for value in values:
            yield name, replace(case, config=case.config.model_copy(update={name: value}))


def test_every_case_runs_or_is_told_a_setting_and_a_change_of_it_that_helps() -> None:
    seen: dict[tuple[Rule, str], Case] = {}
    never = {(name, value) for name, values in SETTINGS.items() for value in values}
    for case in walk():
        reasons = [(rule, reason) for rule in REFUSALS if (reason := rule(case))]
        for key in reasons:
            seen.setdefault(key, case)
        if never and not reasons:
            never -= {(name, getattr(case.config, name)) for name in SETTINGS}
    assert not never, "no rule may refuse a value everywhere"
    assert {rule.__name__ for rule, _ in seen} == {rule.__name__ for rule in REFUSALS}
    for (rule, reason), case in seen.items():
        assert reason.split(":")[0].split()[0] in TrialConfig.model_fields, reason
        helps = {name for name, other in ways_out(case) if rule(other) is None}
        assert helps & {name for name in WAYS_OUT if name in reason} or "install" in reason, f"{reason}: {helps}"


def test_every_rule_names_where_it_was_read() -> None:
    for rule in REFUSALS:
        assert rule.__doc__, rule.__name__
        assert rule.__doc__.startswith("Source: "), f"{rule.__name__} says not where its fact is from"
