"""The parts of the memory estimate against tensors that are really there."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.memory_accuracy import zero2_model_states, zero3_model_states
from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.activations import Widths, layer_bytes_per_token, score_bytes
from orchestrator.planning.memory import MemoryParts, _bytes_of, _weight_copies, memory_parts
from orchestrator.planning.model_shape import ModelShape, shape_of
from orchestrator.training import model as models
from orchestrator.training.deepspeed_config import ComputeDtype
from tests.training.conftest import tiny

CPU = torch.device("cpu")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def shape_in(folder: Path) -> ModelShape:
    return shape_of(json.loads((folder / "config.json").read_text()))


def parts_of(config: TrialConfig, shape: ModelShape, workers: int = 1) -> MemoryParts:
    return memory_parts(config, shape, workers, _bytes_of(config, "cuda", has_bf16=True))


def tensors_of(parameter: Any) -> Iterator[torch.Tensor]:
    """A parameter and what bitsandbytes keeps beside it."""
    yield parameter.data
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        yield state.absmax
        if state.state2 is not None:
            yield state.state2.absmax
    if getattr(parameter, "SCB", None) is not None:
        yield parameter.SCB


def bytes_of(parameters: Iterator[torch.nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for p in parameters for tensor in tensors_of(p))


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    # The tiny matrices make what is one constant a row, or is rounded up a matrix, weigh more than in a real model.
    [("fp32", "fp32", 0.0), ("bf16", "bf16", 0.0), ("nf4", "bf16", 0.01), ("int8", "bf16", 0.06)],
)
def test_frozen_weights_and_adapter_take_what_is_predicted(
    tiny_model: Path, precision: str, dtype: ComputeDtype, tolerance: float
) -> None:
    config = tiny(precision=precision, engine="ddp", target_modules="all-linear")
    built = models.build(config, tiny_model, dtype, CPU, zero3=None)
    parts = parts_of(config, shape_in(tiny_model))
    frozen = bytes_of(p for p in built.parameters() if not p.requires_grad)
    assert parts.weights == pytest.approx(frozen, rel=tolerance + 1e-9)
    assert parts.adapter == bytes_of(p for p in built.parameters() if p.requires_grad)


def test_a_mixtures_experts_stay_as_they_were_under_quantisation(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(built_config("Mixtral", 2), dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = tiny(precision="nf4", engine="ddp")
    frozen = bytes_of(p for p in models.build(config, tmp_path, "bf16", CPU, zero3=None).parameters() if p.ndim > 0)
    parts = parts_of(config, shape_in(tmp_path))
    assert parts.weights + parts.adapter == pytest.approx(frozen, rel=0.001)


@pytest.mark.parametrize(("optimizer", "extra"), [("adamw", 0), ("sgd", 0)])
def test_optimizer_states_and_gradients_take_what_is_predicted(tiny_model: Path, optimizer: str, extra: int) -> None:
    config = tiny(engine="ddp", optimizer=optimizer)
    built = models.build(config, tiny_model, "fp32", CPU, zero3=None)
    trained = [p for p in built.parameters() if p.requires_grad]
    stepping = torch.optim.AdamW(trained) if optimizer == "adamw" else torch.optim.SGD(trained)
    built(input_ids=torch.ones(1, 8, dtype=torch.long)).logits.sum().backward()
    stepping.step()
    states = [v for state in stepping.state.values() for name, v in state.items() if name != "step"]
    parts = parts_of(config, shape_in(tiny_model))
    assert parts.optimizer == sum(v.numel() * v.element_size() for v in states) + extra
    assert parts.gradients == sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None)


SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 704,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    **TOKENS,
}
UNGROUPED = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
# On a CPU dropout keeps its mask in the input's type, where a GPU keeps a byte, and leaves the flash kernel.
UNDROPPED = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
COPIES_ITS_ATTENTION = ("Phi", "Phi3", "StableLm", "GPTNeoX", "Falcon", "Nemotron", "Persimmon")
"""Families that rotate a part of each head and join it again: a CPU's kernel answers in that layout, so that the result
is copied for the next matrix. A GPU's kernels answer in one layout, and autocast copies it anyway."""
SETTINGS: dict[str, dict[str, Any]] = {
    "GPTNeoX": UNGROUPED,
    "GPT2": {"n_embd": 192, "n_head": 6, "vocab_size": 512, **UNDROPPED, **TOKENS},
    "Falcon": UNGROUPED,
    "Gemma": SMALL | {"head_dim": 32},
    "Gemma3Text": SMALL | {"head_dim": 32},
    "Bloom": {"hidden_size": 192, "n_head": 6, "vocab_size": 512, **TOKENS},
    "BioGpt": UNGROUPED,
    "GPTJ": {"n_embd": 192, "n_head": 4, "vocab_size": 512, "rotary_dim": 16, **TOKENS},
    "GPTNeo": {"hidden_size": 192, "num_heads": 6, "vocab_size": 512, **TOKENS},
    "Mpt": {"d_model": 192, "n_heads": 6, "vocab_size": 512, **TOKENS},
    "Nemotron": SMALL | {"head_dim": 32},
    "Persimmon": UNGROUPED,
    "OPT": UNGROUPED | {"ffn_dim": 704, "word_embed_proj_dim": 192, "dropout": 0.0},
}


def built_config(kind: str, layers: int) -> Any:
    settings = {"use_cache": False, **SETTINGS.get(kind, SMALL)}
    if kind == "GPTNeo":
        settings["attention_types"] = [[["global"], layers]]
    return getattr(transformers, f"{kind}Config")(num_hidden_layers=layers, **settings)


class Kept:
    """A tensor that autograd was given to keep, gone as soon as autograd lets go of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # With its history a saved result would hold itself.
        self.tensor = tensor.detach()


def kept_bytes(kind: str, layers: int, config: TrialConfig, length: int = 64) -> int:
    """Bytes of all that autograd keeps of a forward pass of two sequences, besides the weights."""
    built = built_config(kind, layers)
    full = config.trains_all_weights
    model: Any = AutoModelForCausalLM.from_config(built, attn_implementation=config.attention).to(torch.bfloat16)
    models.fuse_activations(model)
    if not full:
        targets = models.find_target_modules(model, config.target_modules)
        # PEFT looks for all linear layers of what it is told is a decoder beside its head.
        lora = LoraConfig(
            r=8, target_modules=targets, lora_dropout=config.lora_dropout, use_dora=config.dora, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        adapter = torch.float32 if config.engine == "ddp" else torch.bfloat16
        for parameter in model.parameters():
            parameter.data = parameter.data.to(adapter if parameter.requires_grad else torch.bfloat16)
    return kept_by(model, config, length)


def kept_by(model: Any, config: TrialConfig, length: int = 64) -> int:
    """The same of this model, which is built already."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        kept.add(held := Kept(tensor))
        return held

    full = config.trains_all_weights
    inner: Any = model if full else model.get_base_model()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.engine == "ddp" and not full)
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        out = getattr(inner, inner.base_model_prefix)(input_ids=torch.ones(2, length, dtype=torch.long))
    storages = {held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage() for held in kept}
    del out
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("Llama", 0.002),
        ("Mistral", 0.002),
        ("Qwen2", 0.002),
        ("Qwen3", 0.004),
        ("Starcoder2", 0.003),
        ("Phi", 0.003),
        ("Phi3", 0.003),
        ("StableLm", 0.003),
        ("GPTNeoX", 0.003),
        ("GPT2", 0.002),
        ("OPT", 0.003),
        ("Falcon", 0.05),
        ("Olmo", 0.003),
        ("Olmo2", 0.003),
        ("Gemma", 0.004),
        ("Gemma3Text", 0.01),
        ("Cohere", 0.003),
        ("Mixtral", 0.06),
        ("Arcee", 0.003),
        ("Apertus", 0.006),
        ("Jais2", 0.003),
        ("Nemotron", 0.006),
        ("NanoChat", 0.008),
        ("Persimmon", 0.012),
    ],
)
def test_a_layer_keeps_what_is_predicted_for_the_backward_pass(kind: str, tolerance: float, engine: str) -> None:
    config = tiny(precision="bf16", engine=engine)
    copied = 2 * SMALL["hidden_size"] if engine == "deepspeed" and kind in COPIES_ITS_ATTENTION else 0
    assert predicted_kept(kind, config) + copied == pytest.approx(measured_kept(kind, config), rel=tolerance)


DORA = {"dora": True, "target_modules": "all-linear"}


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2"])
def test_dora_keeps_what_its_magnitudes_are_multiplied_with(kind: str, engine: str, dropout: float) -> None:
    config = tiny(precision="bf16", engine=engine, lora_dropout=dropout, **DORA)
    width = replace(_bytes_of(config, "cuda", has_bf16=True), on_gpu=not dropout)
    assert predicted_kept(kind, config, width) == pytest.approx(measured_kept(kind, config), rel=0.005)


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_dora_with_dropout_keeps_the_dequantised_weights(engine: str, dropout: float, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = tiny(precision="nf4", engine=engine, lora_dropout=dropout, **DORA)
    kept = []
    for layers in (2, 3):
        folder = tmp_path / str(layers)
        AutoModelForCausalLM.from_config(built_config("Llama", layers), dtype=torch.bfloat16).save_pretrained(folder)
        built = models.build(config, folder, "bf16", CPU, zero3=None)
        if engine == "deepspeed":
            built.to(torch.bfloat16)  # as its engine does
        kept.append(kept_by(built, config))
    width = replace(_bytes_of(config, "cuda", has_bf16=True), on_gpu=not dropout)
    assert predicted_kept("Llama", config, width) == pytest.approx((kept[1] - kept[0]) / (2 * 64), rel=0.015)


def measured_kept(kind: str, config: TrialConfig) -> float:
    """Bytes that a layer keeps, a token of two sequences of 64."""
    return (kept_bytes(kind, 3, config) - kept_bytes(kind, 2, config)) / (2 * 64)


def predicted_kept(kind: str, config: TrialConfig, width: Widths | None = None) -> float:
    shape = shape_of(built_config(kind, 3).to_dict())
    width = width or _bytes_of(config, "cuda", has_bf16=True)
    of_64 = config.model_copy(update={"sequence_length": 64})
    copies = _weight_copies(of_64, shape, width, 1) / (2 * 64)
    return layer_bytes_per_token(of_64, shape, width) + score_bytes(of_64, shape, width) / 64 + copies


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
def test_adapters_on_a_mixtures_experts_keep_all_experts_weights_once_more() -> None:
    config = tiny(precision="bf16", engine="ddp", target_modules="all-linear")
    assert predicted_kept("Mixtral", config) == pytest.approx(measured_kept("Mixtral", config), rel=0.06)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("GPT2", 0.005), ("Bloom", 0.005), ("BioGpt", 0.005), ("GPTNeo", 0.005), ("GPTJ", 0.009), ("Mpt", 0.005)],
)
def test_eager_attention_keeps_its_scores_in_the_types_of_the_family(kind: str, tolerance: float) -> None:
    config = tiny(precision="bf16", engine="deepspeed", attention="eager")
    width = replace(_bytes_of(config, "cuda", has_bf16=True), on_gpu=False)
    assert predicted_kept(kind, config, width) == pytest.approx(measured_kept(kind, config), rel=tolerance)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma3Text", "Olmo2", "Olmo", "NanoChat", "Apertus"])
def test_a_trained_norm_keeps_what_its_gain_is_multiplied_with(kind: str) -> None:
    config = tiny(precision="bf16", rank="full")
    assert predicted_kept(kind, config) == pytest.approx(measured_kept(kind, config), rel=0.006)


@pytest.mark.parametrize(
    "changes", [{"target_modules": "all-linear"}, {"rank": "full"}, {"target_modules": ("q_proj", "v_proj")}], ids=str
)
def test_what_is_trained_decides_what_is_kept(changes: dict[str, Any]) -> None:
    config = tiny(precision="bf16", **changes)
    assert predicted_kept("Llama", config) == pytest.approx(measured_kept("Llama", config), rel=0.002)


T5_3B = transformers.T5Config(
    d_model=1024, d_kv=128, num_heads=32, d_ff=16384, num_layers=24, num_decoder_layers=24, vocab_size=32128
)


@pytest.fixture(scope="module")
def t5_3b() -> tuple[int, int]:
    """Its parameters, and those of its largest layer."""
    with torch.device("meta"):
        model: torch.nn.Module = transformers.T5Model(T5_3B)
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    return sum(p.numel() for p in model.parameters()), largest


def test_deepspeeds_documented_figures_for_t5_3b_are_its_formulas(t5_3b: tuple[int, int]) -> None:
    """Source: DeepSpeed's documentation, "Memory requirements": 8 GPUs, nothing offloaded, live model and rounded."""
    parameters, largest = t5_3b
    assert zero2_model_states(parameters, 8) / 2**30 == pytest.approx(15.93, abs=0.005)
    assert zero3_model_states(parameters, largest, 8) / 2**30 == pytest.approx(6.10, abs=0.005)
    assert zero2_model_states(2_851_000_000, 8) / 2**30 == pytest.approx(15.93, abs=0.005)
    assert zero3_model_states(2_851_000_000, 32_000_000, 8) / 2**30 == pytest.approx(6.09, abs=0.005)


@pytest.mark.parametrize(
    ("stage", "offload", "documented_gib"),
    [
        (2, "optimizer", 5.31),
        # The documented 15.93 less 2 bytes a weight of unsharded gradients, which ZeRO-2 frees bucket by bucket.
        (2, "none", 15.93 - 5.31),
        # Less 0.12 for gathering the largest layer, which is communication here.
        (3, "optimizer", 0.79 - 0.12),
        (3, "none", 6.10 - 0.12),
    ],
)
def test_full_training_takes_the_model_states_that_deepspeed_documents(
    t5_3b: tuple[int, int], stage: int, offload: str, documented_gib: float
) -> None:
    """Source: the same table. Model states alone, in half precision, of a decoder that has t5-3b's parameters."""
    config = tiny(rank="full", precision="bf16", zero_stage=stage, offload=offload)
    llama = transformers.LlamaConfig(hidden_size=1024, intermediate_size=16384, num_hidden_layers=46, vocab_size=32128)
    shape = shape_of(llama.to_dict())
    parts = parts_of(config, shape, workers=8)
    states = parts.weights + parts.gradients + parts.optimizer
    assert states / shape.parameters * t5_3b[0] / 2**30 == pytest.approx(documented_gib, abs=0.01)
