"""The peak of a training step: predicted, and counted on fake tensors, which have sizes and no contents.

transformers and PEFT run their own code under torch's FakeTensorMode; whatever an operator returns is alive until its
storage is freed. So a model of any size is counted in a second, without a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.activations import Loop
from orchestrator.planning.memory import WORKSPACE_BYTES, MemoryParts, _bytes_of, memory_parts
from orchestrator.planning.model_shape import shape_of
from orchestrator.training import training_loop
from orchestrator.training.data import Batch

HALF, FULL = torch.bfloat16, torch.float32
LLAMA: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 2000,
}
GROUPED = LLAMA | {"num_key_value_heads": 2}
LARGE_VOCABULARY = LLAMA | {"vocab_size": 64000}
MISTRAL = GROUPED | {"model_type": "mistral", "sliding_window": 256}
GEMMA_3 = MISTRAL | {"model_type": "gemma3_text", "num_hidden_layers": 6, "head_dim": 128}
GPT_2 = {"model_type": "gpt2", "n_embd": 1024, "n_inner": 4096, "n_layer": 4, "n_head": 8, "vocab_size": 2000}
GPT_2 |= dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0)
# An adapter's gradients are counted from the start, though they come later; the worst moment inside a recomputed layer
# is told from a few tensors. Both weigh more in a model this small.
TOO_MUCH = {False: 0.06, True: 0.13}
TOO_LITTLE = 0.02


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators returned and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def add(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            self.add(tensor)
        return out


class FourBitProduct(torch.autograd.Function):
    """What bitsandbytes 0.50's MatMul4Bit allocates where it dequantises: a weight for as long as it is used."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape = shape
        return inputs @ torch.empty(shape, dtype=inputs.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype), None


class EightBitProduct(torch.autograd.Function):
    """What its MatMul8bitLt allocates; it holds its input as an attribute, where no saved-tensor hook sees it."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.held, ctx.shape = inputs, shape
        tokens = inputs.numel() // shape[1]
        quantised = torch.empty((tokens, shape[1]), dtype=torch.int8)
        product = torch.empty((tokens, shape[0]), dtype=torch.int32)
        out = torch.empty((tokens, shape[0]), dtype=torch.float16)
        del quantised, product
        return out.to(inputs.dtype).reshape(*inputs.shape[:-1], shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        weight = torch.empty(ctx.shape, dtype=ctx.held.dtype)
        return gradient.to(ctx.held.dtype) @ weight, None


class QuantisedLinear(torch.nn.Linear):
    kind: str
    whole: tuple[int, int]

    def forward(self, x: torch.Tensor) -> Any:
        if self.kind == "int8":
            return EightBitProduct.apply(x, self.whole)
        return FourBitProduct.apply(x.to(HALF), self.whole).to(x.dtype)


def whole_weight(layer: torch.nn.Module) -> torch.Tensor:
    """What peft 0.21.2's dequantize_module_weight returns: LLM.int8()'s in fp32."""
    if not isinstance(layer, QuantisedLinear):
        return layer.weight  # type: ignore[return-value]
    return torch.empty(layer.whole, dtype=FULL if layer.kind == "int8" else HALF)


def quantise(model: torch.nn.Module, config: TrialConfig) -> None:
    """As transformers does, and prepare_model_for_kbit_training, which DeepSpeed takes back."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name:
            kind, whole = config.precision.value, tuple(layer.weight.shape)
            layer.__class__ = QuantisedLinear
            layer.kind, layer.whole = kind, whole
            layer.weight = torch.nn.Parameter(torch.empty(8, dtype=torch.uint8), requires_grad=False)
    for parameter in model.parameters():
        if config.engine == "ddp" and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def built(config: TrialConfig, settings: dict[str, Any], loop: Loop) -> torch.nn.Module:
    """The model as training/model.py builds it; quantised layers are the stand-ins above."""
    wide = config.precision in ("fp32", "amp_bf16")
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**({"model_type": "llama", "use_cache": False} | settings)),
        dtype=FULL if wide else HALF,
        attn_implementation=config.attention,
    )
    if config.precision.is_quantized:
        quantise(plain, config)
    if config.gradient_checkpointing:
        plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets: Any = config.target_modules
    lora = LoraConfig(
        r=config.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"] if targets == "attention" else targets,
        lora_dropout=config.lora_dropout,
        use_dora=config.dora,
    )
    model = get_peft_model(plain, lora, autocast_adapter_dtype=False)
    for module in model.modules():
        if hasattr(module, "lora_A") and config.precision.is_quantized:
            # peft 0.21.2's layers for bitsandbytes do not cast their input under autocast.
            module.cast_input_dtype_enabled = config.engine != "ddp" or loop == "bare"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(FULL if wide or config.engine == "ddp" else HALF)
    return model.train()


def on_fake_tensors(model: torch.nn.Module) -> list[Any]:
    """Replace the meta tensors of a model by fake ones of a CPU."""
    new: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        for tensors, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for name, old in list(tensors.items()):
                if old is None:
                    continue
                if id(old) not in new:
                    fake = torch.empty(old.shape, dtype=old.dtype)
                    # The old one is held, or its id would come back.
                    new[id(old)] = (torch.nn.Parameter(fake, old.requires_grad) if is_parameter else fake, old)
                tensors[name] = new[id(old)][0]
    return [fake for fake, _ in new.values()]


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )


def counted_peak(
    config: TrialConfig, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, loop: Loop = "trainer"
) -> int:
    """Bytes over the model's own at the peak of a forward and backward pass."""
    # Whether rows are packed depends on contents, which fake tensors do not have.
    monkeypatch.setattr(
        "transformers.masking_utils.find_packed_sequence_indices",
        lambda position_ids: torch.zeros_like(position_ids) if config.packing else None,
    )
    monkeypatch.setattr("peft.tuners.lora.dora.dequantize_module_weight", whole_weight)
    with torch.device("meta"):
        model = built(config, settings, loop)
    alive, fake = AliveBytes(), FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        for tensor in on_fake_tensors(model):
            alive.add(tensor)
    own, shape = alive.now, (config.micro_batch_size, config.sequence_length)
    is_cast = config.precision != "fp32" and config.engine == "ddp" and loop == "trainer"
    autocast = config.precision.is_autocast or is_cast
    with fake, alive:
        ids, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        places = {"position_ids": torch.zeros(shape, dtype=torch.long)} if config.packing else {}
        with torch.autocast("cpu", dtype=HALF) if autocast else contextlib.nullcontext():
            held = [model(input_ids=ids, **places).logits]
        loss = loss_of(held[0], labels) if loop == "bare" else loss_of(held.pop(), labels)
        loss.backward()
    return alive.peak - own


def predicted(config: TrialConfig, settings: dict[str, Any], loop: Loop = "trainer") -> MemoryParts:
    shape = shape_of(AutoConfig.for_model(**({"model_type": "llama"} | settings)).to_dict())
    width = _bytes_of(config, "cuda", has_bf16=True, loop=loop)
    if config.lora_dropout or config.attention == "eager":
        # A CPU's dropout remembers numbers, where a GPU's keeps truth values, and its softmax makes no product.
        width = replace(width, on_gpu=False)
    return memory_parts(config, shape, 1, width)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointed"])
@pytest.mark.parametrize(
    ("settings", "precision", "engine"),
    [
        (LLAMA, "bf16", "deepspeed"),
        (LARGE_VOCABULARY, "bf16", "deepspeed"),
        (GROUPED, "bf16", "ddp"),
        (LLAMA, "fp32", "ddp"),
        (LLAMA, "amp_bf16", "ddp"),
        (GROUPED, "nf4", "deepspeed"),
        (GROUPED, "nf4", "ddp"),
        (LARGE_VOCABULARY, "nf4", "ddp"),
        (LLAMA, "int8", "deepspeed"),
        (GROUPED, "int8", "ddp"),
    ],
)
def test_a_steps_peak_is_what_is_predicted(
    settings: dict[str, Any], precision: str, engine: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = {"precision": precision, "engine": engine, "gradient_checkpointing": checkpointing}
    assert_peak_is_told(settings, trial, monkeypatch)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointed"])
@pytest.mark.parametrize(
    ("settings", "precision", "engine"),
    [
        (LARGE_VOCABULARY, "bf16", "deepspeed"),
        (LARGE_VOCABULARY, "bf16", "ddp"),
        (GROUPED, "bf16", "ddp"),
        (LLAMA, "fp32", "ddp"),
        (LARGE_VOCABULARY, "amp_bf16", "ddp"),
        (LLAMA, "nf4", "ddp"),
        (LARGE_VOCABULARY, "nf4", "ddp"),
    ],
)
def test_without_autocast_and_with_logits_held_a_step_takes_what_is_told_of_a_bare_loop(
    settings: dict[str, Any], precision: str, engine: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = {"precision": precision, "engine": engine, "gradient_checkpointing": checkpointing}
    assert_peak_is_told(settings, trial, monkeypatch, "bare")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointed"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_in_a_bare_loop_an_activation_written_in_python_keeps_four_tensors(
    precision: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = {"precision": precision, "gradient_checkpointing": checkpointing, "target_modules": ["c_attn"]}
    assert_peak_is_told(GPT_2, trial, monkeypatch, "bare")


def assert_peak_is_told(
    settings: dict[str, Any], trial: dict[str, Any], monkeypatch: pytest.MonkeyPatch, loop: Loop = "trainer"
) -> None:
    fixed = {"zero_stage": 0, "micro_batch_size": 2, "global_batch_size": 2, "sequence_length": 512}
    config = TrialConfig.model_validate(fixed | trial)
    parts = predicted(config, settings, loop)
    counted = counted_peak(config, settings, monkeypatch, loop)
    error = (parts.activations + parts.logits + parts.gradients) / counted - 1
    assert -TOO_LITTLE <= error <= TOO_MUCH[config.gradient_checkpointing]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointed"])
@pytest.mark.parametrize(
    ("settings", "trial"),
    [
        pytest.param(GROUPED, {"attention": "eager"}, id="eager attention repeats keys and values"),
        pytest.param(GROUPED, {"attention": "eager", "precision": "fp32"}, id="eager attention in fp32"),
        pytest.param(GROUPED, {"packing": True}, id="packed rows have a mask, and repeat keys and values"),
        pytest.param(MISTRAL, {}, id="so has a sequence longer than the window"),
        pytest.param(GEMMA_3, {}, id="which not all layers have"),
    ],
)
def test_a_steps_peak_has_what_the_kernel_asks_for(
    settings: dict[str, Any], trial: dict[str, Any], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_peak_is_told(settings, trial | {"gradient_checkpointing": checkpointing}, monkeypatch)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointed"])
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize(
    ("settings", "precision", "engine"),
    [
        (LLAMA, "bf16", "deepspeed"),
        (GROUPED, "bf16", "ddp"),
        (LLAMA, "fp32", "ddp"),
        (LLAMA, "amp_bf16", "ddp"),
        (GROUPED, "nf4", "deepspeed"),
        (GROUPED, "nf4", "ddp"),
        (LLAMA, "int8", "deepspeed"),
    ],
)
def test_a_steps_peak_has_what_doras_magnitudes_and_norms_take(
    settings: dict[str, Any],
    precision: str,
    engine: Any,
    dropout: float,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trial = {"precision": precision, "engine": engine, "gradient_checkpointing": checkpointing}
    dora = {"dora": True, "lora_dropout": dropout, "target_modules": "all-linear"}
    assert_peak_is_told(settings, trial | dora, monkeypatch)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointed"])
def test_doras_identity_as_wide_as_the_input_counts_where_tokens_are_few(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dora = {"dora": True, "target_modules": "all-linear", "sequence_length": 64}
    assert_peak_is_told(LLAMA, dora | {"gradient_checkpointing": checkpointing}, monkeypatch)


def test_checkpointing_really_keeps_what_an_int8_product_was_given() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    layer.to("cpu").requires_grad_(False)
    seen: list[weakref.ref[torch.Tensor]] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(x)
        seen.append(weakref.ref(inner))
        return layer(inner)  # type: ignore[no-any-return]

    out = torch.utils.checkpoint.checkpoint(block, torch.randn(4, 64, requires_grad=True), use_reentrant=False)
    assert seen[0]() is not None, "bitsandbytes lets go now: drop memory._escaping_bytes"
    del out


def test_an_int8_product_on_a_cpu_really_is_in_half_under_autocast() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    with torch.autocast("cpu", dtype=HALF):
        assert layer.to("cpu")(torch.randn(4, 64, requires_grad=True)).dtype == HALF


def profiled_peak(work: Callable[[], None]) -> int:
    """Bytes that torch allocated at most beyond those before, as its own profiler tells: no mode is in the way of
    gradients that are added in place."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def stepped_once(model: Any, optimizer: str) -> torch.optim.Optimizer:
    """An optimizer that has its states, and computes many tensors at once, as it does on a GPU."""
    made = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    stepping = made(model.parameters(), foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepping.step()
    stepping.zero_grad(set_to_none=True)
    return stepping


def beside_what_stays(config: TrialConfig, settings: dict[str, Any]) -> int:
    parts = predicted(config, settings)
    return parts.activations + parts.logits + parts.gradients + parts.framework - WORKSPACE_BYTES


NARROW = LARGE_VOCABULARY | {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2}
ALL_WEIGHTS = {"rank": "full", "precision": "fp32", "engine": "ddp", "micro_batch_size": 1}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "head is the embedding"])
def test_a_whole_step_of_all_weights_takes_what_is_predicted(tied: bool, optimizer: Any, micro_batches: int) -> None:
    settings = NARROW | {"tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", use_cache=False, **settings)).train()
    stepping = stepped_once(model, optimizer)

    def step() -> None:
        ids = torch.zeros((1, 16), dtype=torch.long)
        for _ in range(micro_batches):
            loss_of(model(input_ids=ids).logits, ids).backward()
        stepping.step()

    trial = ALL_WEIGHTS | {"optimizer": optimizer, "sequence_length": 16, "global_batch_size": micro_batches}
    counted = beside_what_stays(TrialConfig.model_validate(trial), settings)
    assert counted == pytest.approx(profiled_peak(step), rel=0.05)


def test_the_training_loops_logits_are_gone_when_weights_are_stepped() -> None:
    # So many that an eighth of the step's bytes would be theirs, and the step still takes most.
    tokens, settings = 64, NARROW | {"tie_word_embeddings": False}
    config = TrialConfig.model_validate(ALL_WEIGHTS | {"sequence_length": tokens, "global_batch_size": 1})
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", use_cache=False, **settings)).train()
    stepping = stepped_once(model, "adamw")
    engine = SimpleNamespace(forward=lambda input_ids: model(input_ids=input_ids).logits)
    run: Any = SimpleNamespace(config=config, device="cpu", engine=engine, alive=lambda: None)
    ids = np.zeros((1, tokens), dtype=np.int64)

    def step() -> None:
        training_loop._cross_entropy(run, Batch(ids, ids, None)).backward()
        stepping.step()

    assert beside_what_stays(config, settings) == pytest.approx(profiled_peak(step), rel=0.02)
