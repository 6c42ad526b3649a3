"""Base model and adapter: built under any precision and ZeRO stage, and saved whole."""

from __future__ import annotations

import contextlib
import inspect
import logging
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import deepspeed
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AttentionInterface, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.errors import ModelError
from orchestrator.planning.model_families import IMAGE_PARTS
from orchestrator.results.files import let_read, require_there, sync
from orchestrator.training import device as devices
from orchestrator.training.deepspeed_config import ComputeDtype

DTYPES: dict[ComputeDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_IMAGE_PARTS = tuple(part for parts in IMAGE_PARTS.values() for part in parts)
_IMAGE_MODULES = rf".*\b({'|'.join(_IMAGE_PARTS)})\b.*"
TargetModules = Literal["attention", "all-linear"] | tuple[str, ...]


def seed_everything(seed: int) -> None:
    """Adapter, dropout and whatever a library draws; a process forked from a template has its parent's random state."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build(
    config: TrialConfig, folder: Path, dtype: ComputeDtype, device: torch.device, zero3: dict[str, Any] | None
) -> torch.nn.Module:
    """The model as the trial trains it; `zero3` is DeepSpeed's configuration under stage 3, else None.

    Raises:
        ModelError: it cannot be read, or has no such target modules.
    """
    with _loading_into_shards(zero3):
        model = _load(config, folder, dtype, device)
        # Of a model with parts each part has its own.
        model.config.get_text_config().use_cache = False
        fuse_activations(model)
        if config.precision.is_quantized:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if config.gradient_checkpointing:
            # The reentrant kind runs no backward hook of a frozen input, so that ZeRO-3 would lose gradients.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.rank == "full":
            model.requires_grad_(True)
        else:
            # Again, since loading draws more or fewer random numbers under each ZeRO stage.
            seed_everything(config.seed)
            model = _adapted(model, config, dtype)
        _leave_out_images(model)
    built: torch.nn.Module = model.train()
    return built


@contextlib.contextmanager
def _loading_into_shards(zero3: dict[str, Any] | None) -> Iterator[None]:
    if zero3 is None:
        yield
        return
    # Otherwise zero.Init takes the trial for one of a single worker and refuses its batch sizes.
    deepspeed.init_distributed()
    # transformers holds it by a weak reference only: without the variable it would be gone before the model is loaded.
    held = HfDeepSpeedConfig(zero3)
    yield
    del held


def _load(config: TrialConfig, folder: Path, dtype: ComputeDtype, device: torch.device) -> PreTrainedModel:
    wanted: dict[str, Any] = {
        "dtype": DTYPES[dtype],
        "attn_implementation": config.attention,
        "quantization_config": _quantization(config.precision, dtype),
        "use_safetensors": True,
    }
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        AttentionInterface.register("sdpa", attend_without_grouped_queries)
    if device.type == "cuda" and config.zero_stage != 3:
        wanted["device_map"] = {"": device}
    # On a CPU bitsandbytes quantises a weight by way of several copies: with a model of 135M weights 320 to 540 MiB of
    # holes stayed between the quantised ones, more than all of them take.
    quantises_here = device.type == "cpu" and config.precision.is_quantized
    try:
        with devices.giving_back_what_is_freed() if quantises_here else contextlib.nullcontext():
            loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **wanted)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"the model in {folder} cannot be loaded as precision {config.precision} with attention "
            f"{config.attention}: {error}"
        ) from error
    if config.precision is Precision.NF4:
        _make_nf4_trainable(loaded, is_sharded=config.zero_stage == 3)
    if config.precision is Precision.INT8:
        # At every product of a layer that is given bf16 it says that it casts (0.50.2, autograd/_functions.py): log.txt
        # would hold nothing else.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return loaded


def attend_without_grouped_queries(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **more: Any
) -> Any:
    """transformers' `sdpa` for GPUs before Ampere: with a key and a value for each query head.

    They have neither the flash nor the cuDNN kernel, and the memory-efficient one takes no grouped queries, so that
    torch would write the scores out (torch 2.13, sdp_utils.cpp: `check_sm_version`, `check_cudnn_hardware_support`,
    `check_batch_size_and_num_heads_dense<false>`). With a mask transformers repeats them itself (5.23,
    integrations/sdpa_attention.py, `use_gqa_in_sdpa`).
    """
    groups = getattr(module, "num_key_value_groups", 1)
    seen: Any = module
    if mask is None and groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        seen = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(seen, query, key, value, mask, **more)


def _make_nf4_trainable(model: PreTrainedModel, is_sharded: bool) -> None:
    # An extra: only its own users need it.
    from bitsandbytes.nn import Linear4bit

    from orchestrator.training import four_bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            if is_sharded:
                module.__class__ = four_bit.Linear4bit
            # On CPUs with AVX512-BF16 the first evaluation packs the weights anew for a kernel without a backward pass,
            # and training goes on with that: no gradient reaches the layers below (0.50.2, nn/modules.py, forward).
            module.support_avx512bf16_for_cpu = False


def _quantization(precision: Precision, dtype: ComputeDtype) -> BitsAndBytesConfig | None:
    if precision is Precision.INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision is Precision.NF4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[dtype],
            # ZeRO-3 flattens all weights together, so the packed 4-bit ones must look like the rest.
            bnb_4bit_quant_storage=DTYPES[dtype],
        )
    return None


def _adapted(model: PreTrainedModel, config: TrialConfig, dtype: ComputeDtype) -> PeftModel:
    assert config.rank != "full"
    targets = find_target_modules(model, config.target_modules)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=_IMAGE_MODULES if _has_image_part(model) else None,
        use_rslora=config.rslora,
        use_dora=config.dora,
    )
    try:
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(f"the model takes no such adapter: {error}") from error
    # DeepSpeed keeps fp32 masters of half-precision weights by itself; DDP does not, so there the adapter is fp32.
    adapter_dtype = DTYPES[dtype] if config.engine == "deepspeed" else torch.float32
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    return adapted


def _has_image_part(model: torch.nn.Module) -> bool:
    return any(re.fullmatch(_IMAGE_MODULES, name) for name, _ in model.named_modules())


def _leave_out_images(model: torch.nn.Module) -> None:
    """Text never goes through the part of Gemma 3 that looks at images. It goes after the adapter came, so that its
    names, and what it excludes, are those of the whole model, which is what a user loads."""
    for home in list(model.modules()):
        for name, _ in list(home.named_children()):
            if name in _IMAGE_PARTS:
                delattr(home, name)


def fuse_activations(model: torch.nn.Module) -> None:
    """Take torch's kernel for GELU's tanh form, where transformers writes it out in Python (GPT-2, GPT-J, Phi).

    The same function but for rounding, as transformers says of it (5.23, activations.py, GELUTanh); autograd keeps what
    it was given, and not the steps, which are three times as much besides.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(module, name, GELUTanh())


def load_trained(
    config: TrialConfig, folder: Path, weights: Path, dtype: ComputeDtype, device: torch.device
) -> torch.nn.Module:
    """What a trial trained, to generate with: its base in `folder` as the trial had it, with the adapter in `weights`.

    Raises:
        ModelError: it cannot be read.
    """
    whole = config.model_copy(update={"zero_stage": 0})
    loaded: torch.nn.Module = _load(whole, weights if config.trains_all_weights else folder, dtype, device)
    if not config.trains_all_weights:
        loaded = PeftModel.from_pretrained(loaded, str(weights))
    return loaded.eval()


def find_target_modules(model: torch.nn.Module, target_modules: TargetModules) -> list[str] | str:
    """The names that PEFT is given.

    Raises:
        ModelError: the model has no module of such a name; those that it has are named.
    """
    if target_modules == "all-linear":
        return target_modules
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and not re.fullmatch(_IMAGE_MODULES, name)
    ]
    if target_modules == "attention":
        return _attention_projections(model, linear)
    assert not isinstance(target_modules, str)
    missing = [name for name in target_modules if not any(_matches(full, name) for full in linear)]
    if missing:
        present = sorted({full.rpartition(".")[2] for full in linear})
        raise ModelError(f"target_modules: the model has no {', '.join(missing)}; it has {', '.join(present)}")
    return list(target_modules)


def _matches(full: str, name: str) -> bool:
    """PEFT's own rule for a list (peft 0.21.2, tuners/tuners_utils.py, check_target_module_exists)."""
    return full == name or full.endswith(f".{name}")


def _attention_projections(model: torch.nn.Module, linear: list[str]) -> list[str]:
    """Every matrix inside a module whose class is called an attention, by the shortest name that means no other."""
    homes = [name for name, module in model.named_modules() if "Attention" in type(module).__name__]
    inside = [name for name in linear if any(name.startswith(f"{home}.") for home in homes)]
    if not inside:
        raise ModelError("target_modules: no attention projections were found; name the modules, or use all-linear")
    outside = {name.rpartition(".")[2] for name in set(linear) - set(inside)}
    names: dict[str, None] = {}
    for full in inside:
        parts = full.split(".")
        # GPT-2 calls a matrix of the feed-forward part c_proj as well: there it takes attn.c_proj.
        names[parts[-1] if parts[-1] not in outside else ".".join(parts[-2:])] = None
    return list(names)


def keeps_packed_rows_apart(model: torch.nn.Module) -> bool:
    """Whether the model takes the position ids by which transformers tells packed rows from each other."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return "position_ids" in inspect.signature(base.forward).parameters


def trainable_parameters(model: torch.nn.Module) -> int:
    """Weights that are trained, counted whole under ZeRO-3 too."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def save(model: torch.nn.Module, folder: Path, writes: bool) -> None:
    """Save the adapter, or the model where all weights are trained; `folder` is replaced as a whole.

    Every worker must call it, since under ZeRO-3 all of them hold parts; the one with `writes` writes.

    Raises:
        StorageError: what it should lie in is gone.
    """
    weights = _whole_weights(model, writes)
    if not writes:
        return
    require_there(folder.parent)
    # One process writes here: what one that was killed left is written over.
    partial = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(partial, ignore_errors=True)
    saved: Any = model
    # Looking for changed embeddings would ask the hub for the base model's configuration.
    more = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    saved.save_pretrained(str(partial), state_dict=weights, **more)
    # A record that names the weights is synced to the disk: they must not be behind it after a power cut.
    for file in partial.iterdir():
        let_read(file)
        sync(file)
    sync(partial)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _whole_weights(model: torch.nn.Module, keeps: bool) -> dict[str, torch.Tensor]:
    """Copies of what is trained, gathered one at a time, for the worker that `keeps` them; PEFT only warns when it is
    given shards."""
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        with _gathered(parameter):
            if keeps:
                weights[name] = parameter.detach().to("cpu", copy=True).contiguous()
        if keeps and weights[name].numel() != getattr(parameter, "ds_numel", parameter.numel()):
            raise RuntimeError(f"{name} was not gathered before saving: a shard is no adapter")
    return weights


def _gathered(parameter: torch.nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    if hasattr(parameter, "ds_id"):
        return deepspeed.zero.GatheredParameters([parameter])  # type: ignore[no-any-return]
    return contextlib.nullcontext()
