"""DeepSpeed's AdamW for CPUs steps offloaded weights where it was built ahead for this machine, torch's elsewhere."""

from __future__ import annotations

import importlib.machinery
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config.trial_config import TrialConfig
from orchestrator.doctor import Answer, _why
from orchestrator.training import cpu_adam
from orchestrator.training.cpu_adam import BuiltAhead, can_load
from orchestrator.training.deepspeed_config import deepspeed_config

IMAGE = BuiltAhead(has_cpu_adam=True, device="cuda", torch="2.13")
HASWELL = frozenset({"sse4_2", "avx", "avx2", "fma", "f16c"})


def test_what_the_image_was_built_with_is_loaded_on_its_device_with_its_torch() -> None:
    assert can_load(IMAGE, "cuda", "2.13.0+cu130", HASWELL)
    assert can_load(replace(IMAGE, device="cpu"), "cpu", "2.13.1", HASWELL | {"avx512f"})


@pytest.mark.parametrize(
    ("built", "device", "torch_version", "flags"),
    [
        (None, "cuda", "2.13.0", HASWELL),
        (replace(IMAGE, has_cpu_adam=False), "cuda", "2.13.0", HASWELL),
        (IMAGE, "cpu", "2.13.0", HASWELL),
        (IMAGE, "cuda", "2.1.3", HASWELL),
        (IMAGE, "cuda", "", HASWELL),
        (IMAGE, "cuda", "2.13.0", HASWELL - {"fma"}),
        (IMAGE, "cuda", "2.13.0", frozenset({"asimd", "sve"})),
    ],
    ids=["no-deepspeed", "not-built", "other-device", "other-torch", "no-torch", "old-cpu", "arm"],
)
def test_what_would_compile_or_could_not_run_is_not_loaded(
    built: BuiltAhead | None, device: str, torch_version: str, flags: frozenset[str]
) -> None:
    assert not can_load(built, device, torch_version, flags)


def test_an_installation_says_what_it_has_without_being_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = tmp_path / "deepspeed" / "__init__.py"
    init.parent.mkdir()
    init.write_text("raise AssertionError('loaded')")
    spec = importlib.machinery.ModuleSpec("deepspeed", None, origin=str(init))
    monkeypatch.setattr(cpu_adam.importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(cpu_adam, "cpu_flags", lambda: HASWELL)
    assert not cpu_adam.is_here("cuda", "2.13.0")
    # As deepspeed 0.19.8 writes it.
    told = (
        "installed_ops={'fused_adam': False, 'cpu_adam': 1}\naccelerator_name='cuda'\ntorch_info={'version': '2.13'}\n"
    )
    init.with_name("git_version_info_installed.py").write_text(told)
    assert cpu_adam.is_here("cuda", "2.13.0")
    assert not cpu_adam.is_here("cpu", "2.13.0")


def adamw(has_cpu_adam: bool, **settings: object) -> dict[str, object]:
    config = TrialConfig.model_validate({"zero_stage": 2, "micro_batch_size": 1, "weight_decay": 0.1, **settings})
    found: dict[str, object] = deepspeed_config(config, 1, "bf16", True, has_cpu_adam)["optimizer"]["params"]
    return found


def test_only_what_is_offloaded_is_stepped_by_it_with_the_same_settings() -> None:
    torchs, deepspeeds = adamw(False, offload="optimizer"), adamw(True, offload="optimizer")
    assert (torchs.pop("torch_adam"), torchs.pop("fused")) == (True, True)
    assert deepspeeds == torchs
    assert adamw(True)["torch_adam"]
    assert adamw(True, offload="optimizer", optimizer="sgd") == adamw(False, offload="optimizer", optimizer="sgd")


def test_doctor_says_which_one_it_is_where_something_is_offloaded() -> None:
    offload = Answer(setting="offload", value="optimizer", runs=True)
    assert _why(offload, True) == "AdamW is DeepSpeed's, built ahead"
    assert _why(offload, False) == "AdamW is torch's"
    assert _why(Answer(setting="offload", value="none", runs=True), True) == ""
