"""Who steps: a DeepSpeed engine, or plain data parallelism, behind one small interface."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch.nn.parallel import DistributedDataParallel

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.training.deepspeed_config import ComputeDtype, scales_loss
from orchestrator.training.model import DTYPES


class Engine(Protocol):
    """What the training loop asks of an engine.

    Gradients are summed over micro-batches and averaged over workers.
    """

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits: (sequences, longest, vocabulary)."""

    def micro_batch(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """What a micro-batch's forward and backward pass stand in; workers exchange gradients in the last one."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar."""

    def step(self, learning_rate: float) -> float | None:
        """Clip, update the weights, forget the gradients.

        Returns the norm before clipping; None where it overflowed, so that the weights stayed as they were.
        """

    def state(self) -> dict[str, Any]:
        """This worker's part of what the next step depends on: tensors and plain values, nested, not copied."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up the state that an engine had whose configuration differed in CHANGEABLE at most; settings stay."""


class DeepSpeedEngine:
    """DeepSpeed with any ZeRO stage."""

    def __init__(self, model: torch.nn.Module, config: TrialConfig, settings: dict[str, Any]) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        own = _adamw_8bit(trained, config) if config.optimizer == "adamw_8bit" else None
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=own, config=settings)
        self._trained = trained
        if config.zero_stage == 0:
            # The half-precision optimizer without ZeRO makes a step on zero gradients to allocate its states, which
            # shifts Adam's bias correction and decays the weights in fp32 (deepspeed 0.19.8, fp16/unfused_optimizer.py,
            # initialize_optimizer_states).
            self._engine.basic_optimizer.state.clear()
            if self._engine.optimizer is not self._engine.basic_optimizer:
                self._engine.optimizer.refresh_fp32_params()

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """See Engine."""
        return self._engine(**inputs).logits  # type: ignore[no-any-return]

    def micro_batch(self, is_last: bool) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """DeepSpeed counts micro-batches itself."""
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine."""
        if not self._engine.zero_optimization():
            # DeepSpeed 0.19.8 scales it under ZeRO and autocast alone (engine.py, backward), and divides the gradients
            # by the scale all the same (fp16/unfused_optimizer.py, step); its pull request 8393 would mend it.
            loss = loss * getattr(self._engine.optimizer, "loss_scale", 1.0)
        # The loss is a share of the global batch's already: nothing is left to divide by the accumulation.
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            # It counts the micro-batch; weights change on the last one only.
            self._engine.step()

    def step(self, learning_rate: float) -> float | None:
        """See Engine."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # Without ZeRO DeepSpeed 0.19.8 tells the norm of scaled gradients, or none (engine.py, _take_model_step).
        own_norm = None if self._engine.zero_optimization() else _norm(self._trained) / self._gradient_scale()
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if own_norm is None else own_norm
        if norm is None or not self._engine.was_step_applied():
            return None
        return _finite(norm)

    def state(self) -> dict[str, Any]:
        """See Engine. DeepSpeed's own files would be pickles: its optimizer's state goes into ours."""
        optimizer, scaler = self._engine.optimizer, self._engine.torch_autocast_z0_gradscaler
        kept = {key: value for key, value in optimizer.state_dict().items() if key not in _NOT_KEPT}
        return {
            # Under ZeRO-3 nobody holds whole weights: they come back from the fp32 partitions.
            "weights": {} if self._engine.zero_optimization_partition_weights() else self._weights,
            "optimizer": kept,
            "loss_scaler": _plain(vars(optimizer.loss_scaler)) if hasattr(optimizer, "loss_scaler") else {},
            "autocast_scaler": scaler.state_dict() if scaler else {},
            "counters": {name: getattr(self._engine, name) for name in _COUNTERS},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """See Engine."""
        _copy(state["weights"], self._weights)
        optimizer, scaler = self._engine.optimizer, self._engine.torch_autocast_z0_gradscaler
        clips_to = getattr(optimizer, "clip_grad", None)
        # What the state tells of settings is another trial's, or another optimizer's: `cpu_adam` is not in every image.
        settings = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
        kept = dict(state["optimizer"])
        if hasattr(optimizer, "loss_scaler"):
            vars(optimizer.loss_scaler).update(state["loss_scaler"])
            kept["loss_scaler"] = optimizer.loss_scaler
        if self._engine.zero_optimization():
            # It takes the states of all workers and looks at its own.
            all_states = [kept] * self._engine.dp_world_size
            with _as_partitions(self._engine):
                optimizer.load_state_dict(all_states, load_from_fp32_weights=True)
        else:
            optimizer.load_state_dict(kept)
        if clips_to is not None:
            optimizer.clip_grad = clips_to
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            weights = group["params"]
            group.clear()
            group.update(own, params=weights)
        if isinstance(self._engine.basic_optimizer, DeepSpeedCPUAdam):
            _count_steps(self._engine.basic_optimizer)
        if scaler:
            scaler.load_state_dict(state["autocast_scaler"])
        for name, value in state["counters"].items():
            setattr(self._engine, name, value)

    def _gradient_scale(self) -> float:
        """Of the next step, without ZeRO."""
        if scaler := self._engine.torch_autocast_z0_gradscaler:
            return float(scaler.get_scale())
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))


# An object, which stands beside its plain values; and where DeepSpeed's universal checkpoints would find a weight.
_NOT_KEPT = ("loss_scaler", "param_slice_mappings")
_COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")


@contextlib.contextmanager
def _as_partitions(engine: Any) -> Iterator[None]:
    """ZeRO-3 keeps small weights gathered between steps; they are loaded as the partitions that they are kept in."""
    if not engine.zero_optimization_partition_weights():
        yield
        return
    engine.optimizer.checkpoint_event_prologue()
    yield
    engine.optimizer.checkpoint_event_epilogue()


def _count_steps(optimizer: DeepSpeedCPUAdam) -> None:
    """Bring it to where its loaded states were when they were saved, by it or by torch's AdamW.

    It counts with a number, torch with a tensor. Its bias corrections are products over the steps that it has made, and
    a power at a step that does not follow the last one, which differs in the last bit (deepspeed 0.19.8, cpu_adam.h,
    `IncrementStep`): so it makes as many steps on nothing, in 1 µs each.
    """
    for state in optimizer.state.values():
        state["step"] = int(state["step"])
    made = max((state["step"] for state in optimizer.state.values()), default=0)
    (beta1, beta2), nothing = optimizer.defaults["betas"], torch.empty(0)
    for step in range(1, made + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, beta1, beta2, 0.0, 0.0, True, nothing, nothing, nothing, nothing
        )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers among them: a scaler holds its dtype too, which follows from the configuration."""
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float)}


@torch.no_grad()
def _copy(saved: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    for name, weight in saved.items():
        weights[name].copy_(weight)


class DdpEngine:
    """torch's DistributedDataParallel: every worker holds everything."""

    def __init__(
        self, model: torch.nn.Module, config: TrialConfig, dtype: ComputeDtype, device: torch.device, workers: int
    ) -> None:
        if not config.precision.is_quantized:
            model.to(device)
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._trained, self._weight_decay = list(self._weights.values()), config.weight_decay
        self._optimizer = _optimizer(self._trained, config)
        self._max_grad_norm = config.max_grad_norm
        self._autocast = _autocast(config, dtype, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=scales_loss(config.precision, dtype))
        self._model = model
        if workers > 1:
            self._model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """See Engine."""
        with self._autocast:
            return self._model(**inputs).logits  # type: ignore[no-any-return]

    def micro_batch(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """See Engine."""
        if is_last or not isinstance(self._model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._model.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float | None:
        """See Engine."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return _finite(norm)

    def state(self) -> dict[str, Any]:
        """See Engine."""
        optimizer, scaler = self._optimizer.state_dict(), self._scaler.state_dict()
        return {"weights": self._weights, "optimizer": optimizer, "scaler": scaler}

    def load_state(self, state: dict[str, Any]) -> None:
        """See Engine."""
        _copy(state["weights"], self._weights)
        self._optimizer.load_state_dict(state["optimizer"])
        for group in self._optimizer.param_groups:
            group["weight_decay"] = self._weight_decay
        self._scaler.load_state_dict(state["scaler"])


def _autocast(config: TrialConfig, dtype: ComputeDtype, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if config.precision.is_autocast:
        chosen = torch.bfloat16 if config.precision is Precision.AMP_BF16 else torch.float16
        return torch.autocast(device.type, dtype=chosen)
    if dtype != "fp32" and not config.trains_all_weights:
        # The adapter is fp32, and so are the norms and embeddings that prepare_model_for_kbit_training left: without
        # autocast its products would be too, and under quantisation attention.
        return torch.autocast(device.type, dtype=DTYPES[dtype])
    return contextlib.nullcontext()


def _optimizer(trained: list[torch.nn.Parameter], config: TrialConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw_8bit":
        return _adamw_8bit(trained, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)


def _adamw_8bit(trained: list[torch.nn.Parameter], config: TrialConfig) -> torch.optim.Optimizer:
    import bitsandbytes  # an extra: only its own users need it

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        trained, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    return optimizer


def _norm(parameters: list[torch.nn.Parameter]) -> float:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # In fp32, since that of fp16 ends at 65,504.
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _finite(norm: torch.Tensor | float) -> float | None:
    value = float(norm)
    return value if math.isfinite(value) else None
