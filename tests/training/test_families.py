"""What the plan believes of families is what transformers' classes are, of every causal model that has a shape."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from orchestrator.errors import ModelError
from orchestrator.planning.causal_models import CAUSAL_HEADS
from orchestrator.planning.compatibility import (
    FLASH_WITHOUT_POSITIONS,
    MASK_WITHOUT_POSITIONS,
    WITHOUT_FLASH_ATTENTION,
    WITHOUT_POSITIONS,
    WITHOUT_SDPA,
)
from orchestrator.planning.model_families import UNCOUNTED_FAMILIES, is_known
from orchestrator.planning.model_shape import ModelShape, lora_parameters, shape_of, targeted

CLASSES: Any = AutoModelForCausalLM._model_mapping
HEADS = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
GIVEN = dict.fromkeys(("hunyuan_v1_dense", "ministral", "nemotron"), HEADS)
"""What config classes leave out that their own models need."""
NO_CONFIG = {"gemma4_assistant"}
UNBUILDABLE = {"cohere_compass_text", "dots1"}
"""transformers' own defaults, or the meta device, do not build them."""


@functools.cache
def read() -> tuple[dict[str, ModelShape], dict[str, str]]:
    """The shape of every causal model by its config class's defaults, or why it has none."""
    found, refused = {}, {}
    for kind in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NO_CONFIG):
        try:
            found[kind] = shape_of(config_of(kind).to_dict())
        except ModelError as error:
            refused[kind] = str(error)
    return found, refused


def shapes() -> dict[str, ModelShape]:
    return read()[0]


def config_of(kind: str) -> Any:
    return CONFIG_MAPPING[kind](**GIVEN.get(kind, {}))


def class_of(kind: str) -> Any:
    return CLASSES[CONFIG_MAPPING[kind]]


def families_where(holds: Any) -> set[str]:
    return {shape.model_type for kind, shape in shapes().items() if holds(class_of(kind))}


def test_the_causal_models_are_those_that_transformers_maps() -> None:
    assert CAUSAL_HEADS == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def test_the_families_without_a_kernel_are_those_whose_classes_declare_none() -> None:
    assert len(shapes()) > 70
    assert families_where(lambda model: not model._supports_sdpa) == WITHOUT_SDPA
    assert families_where(lambda model: not model._supports_flash_attn) == WITHOUT_FLASH_ATTENTION


def test_the_families_without_positions_are_those_whose_forward_takes_none() -> None:
    def takes_none(model: Any) -> bool:
        return "position_ids" not in inspect.signature(model.forward).parameters

    assert families_where(takes_none) == WITHOUT_POSITIONS


def test_every_model_that_has_a_shape_can_be_checkpointed() -> None:
    assert families_where(lambda model: not model.supports_gradient_checkpointing) == set()


def test_no_rule_names_a_family_that_has_no_shape() -> None:
    known = {shape.model_type for shape in shapes().values()}
    assert known >= MASK_WITHOUT_POSITIONS | FLASH_WITHOUT_POSITIONS


def test_what_is_refused_by_its_type_is_a_causal_model_of_transformers() -> None:
    refused = read()[1]
    for kind, part in UNCOUNTED_FAMILIES.items():
        assert f"has {part}, which no estimate counts yet" in refused[kind]


def test_nobody_is_told_to_take_what_transformers_writes_who_did() -> None:
    told = {kind: reason for kind, reason in read()[1].items() if "a config.json that transformers writes" in reason}
    assert all("or another model" in reason for reason in told.values())


def test_the_parameters_of_every_model_that_has_a_shape_are_near_what_transformers_builds() -> None:
    """Counted as a Llama or by its own; Gemma 3's part for images, which is not trained, is left out."""
    off = {}
    for kind, shape in shapes().items():
        if kind in UNBUILDABLE:
            continue
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(kind), attn_implementation="eager")
        built = sum(p.numel() for name, p in model.named_parameters() if ".vision_tower." not in name)
        if abs(shape.parameters / built - 1) > 0.03:
            off[kind] = shape.parameters / built
    assert off == {}


# PEFT warns that the rank of fused experts matches none of its modules, and applies it all the same.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
def test_adapters_of_a_mixtures_experts_are_counted_where_peft_makes_them() -> None:
    """Of those that are counted as Llamas; what is beside the experts may be a little else."""
    off = {}
    for kind, shape in shapes().items():
        if not shape.experts or is_known(shape.model_type) or kind in UNBUILDABLE:
            continue
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(kind), attn_implementation="eager")
            adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        if not 0.6 < lora_parameters(8, targeted(shape, "all-linear")) / trainable < 1.1:
            off[kind] = lora_parameters(8, targeted(shape, "all-linear")) / trainable
    assert off == {}
