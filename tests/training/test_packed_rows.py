"""In every family packed rows are kept apart, or the plan refuses to pack."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import flash_attention

from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.compatibility import Case, packing_needs_positions
from orchestrator.planning.hardware import named_gpu
from orchestrator.planning.model_families import is_known
from orchestrator.planning.model_shape import shape_of
from tests.training.test_families import UNBUILDABLE, config_of, shapes
from tests.training.test_model_shape_counts import FAMILIES, LLAMA

LARGE = {"emu3", "gemma4_unified"}
"""Models of several parts, which no field makes small; the text part of the latter is one of `AS_LLAMAS`."""
AS_LLAMAS = [kind for kind, s in shapes().items() if not is_known(s.model_type) and kind not in LARGE | UNBUILDABLE]
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SMALL = LLAMA | EXPERTS | {"head_dim": 16, "shared_intermediate_size": 48}
FIRST, SECOND = torch.arange(10, 21)[None], torch.arange(30, 39)[None]
TOGETHER = torch.cat([FIRST, SECOND], 1)
POSITIONS = torch.cat([torch.arange(FIRST.shape[1]), torch.arange(SECOND.shape[1])])[None]


def built(name: str, attention: str) -> Any:
    torch.manual_seed(0)
    if name in FAMILIES:
        kind, settings = FAMILIES[name]
        config = getattr(transformers, f"{kind}Config")(**settings)
    else:
        has = config_of(name).to_dict()
        config = CONFIG_MAPPING[name](**{field: value for field, value in SMALL.items() if field in has})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.config.use_cache = False
    return model


def is_refused(model: Any, attention: str) -> bool:
    shape = replace(shape_of(LLAMA), model_type=model.config.model_type)
    config = TrialConfig.model_validate({"packing": True, "attention": attention})
    return packing_needs_positions(Case(config, shape, named_gpu("H100", 1), 1)) is not None


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*FAMILIES, *AS_LLAMAS])
def test_a_row_packed_behind_another_is_what_it_is_alone_or_packing_is_refused(name: str, attention: str) -> None:
    try:
        model = built(name, attention)
    except ValueError as error:
        pytest.skip(str(error).split(". ")[0])
    takes_positions = {} if model.config.model_type in ("bloom", "mpt") else {"position_ids": POSITIONS}
    packed = model(input_ids=TOGETHER, **takes_positions).logits[:, FIRST.shape[1] :]
    is_apart = torch.allclose(packed, model(input_ids=SECOND).logits, atol=1e-4)
    assert is_apart is not is_refused(model, attention)


@torch.no_grad()
@pytest.mark.parametrize("name", [*FAMILIES, *AS_LLAMAS])
def test_flash_attention_is_told_where_rows_begin_or_packing_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def kernel(query: Any, _key: Any, value: Any, *_: Any, **more: Any) -> torch.Tensor:
        told.append(more.get("position_ids") is not None)
        return query.new_zeros(*query.shape[:3], value.shape[-1])

    # The kernel needs a GPU; what it is given does not.
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda _self, asked, *_a, **_k: asked)
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    model = built(name, "flash_attention_2").bfloat16()
    if not model._supports_flash_attn:
        pytest.skip("transformers has no flash attention for it")
    own = importlib.import_module(type(model).__module__)
    monkeypatch.setattr(own, "_flash_attention_forward", kernel, raising=False)
    model(input_ids=TOGETHER, position_ids=POSITIONS)
    assert told
    assert all(told) is not is_refused(model, "flash_attention_2")
