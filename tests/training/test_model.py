"""The adapter: its size, its places, and what is saved of it."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from orchestrator.errors import ModelError
from orchestrator.planning.model_shape import lora_parameters, shape_of, targeted
from orchestrator.training import model as models
from tests.training.conftest import tiny
from tests.training.launch import make_task, run_trial

CPU = torch.device("cpu")
LLAMA_2_7B = LlamaConfig()  # transformers' own defaults are that model's
LLAMA_3_2_3B = LlamaConfig(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    ("config", "rank", "published"), [(LLAMA_2_7B, 8, 4_194_304), (LLAMA_3_2_3B, 32, 9_175_040)], ids=["7B", "3B"]
)
def test_adapters_of_published_models_have_their_published_sizes(
    config: LlamaConfig, rank: int, published: int
) -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        lora = LoraConfig(r=rank, target_modules=models.find_target_modules(base, ("q_proj", "v_proj")))
        adapted = get_peft_model(base, lora)
    assert models.trainable_parameters(adapted) == published


@pytest.mark.parametrize("target_modules", ["attention", "all-linear", ("q_proj", "down_proj")])
def test_the_adapter_has_as_many_parameters_as_peft_counts(tiny_model: Path, target_modules: str) -> None:
    built = models.build(tiny(target_modules=target_modules), tiny_model, "fp32", CPU, zero3=None)
    assert isinstance(built, PeftModel)
    assert models.trainable_parameters(built) == built.get_nb_trainable_parameters()[0]


SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(num_hidden_layers=1), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (GPT2Config(**SMALL), {"c_attn", "attn.c_proj"}),
        (GPTNeoXConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2), {"query_key_value", "dense"}),
    ],
    ids=["llama", "gpt2", "gpt-neox"],
)
def test_attention_means_every_projection_of_the_attention_and_nothing_else(
    config: PreTrainedConfig, expected: set[str]
) -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    assert set(models.find_target_modules(base, "attention")) == expected


def test_target_modules_that_the_model_has_not_are_refused_with_those_it_has(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(ModelError, match=r"no c_attn; it has .*q_proj"):
        models.find_target_modules(model, ("q_proj", "c_attn"))
    assert models.find_target_modules(model, ("q_proj", "self_attn.v_proj")) == ["q_proj", "self_attn.v_proj"]


def test_alpha_and_rslora_reach_the_adapter(tiny_model: Path) -> None:
    def scaling(**changes: object) -> float:
        built = models.build(tiny(rank=16, **changes), tiny_model, "fp32", CPU, zero3=None)
        return next(module.scaling["default"] for module in built.modules() if hasattr(module, "lora_A"))

    assert scaling(alpha="2x") == 2
    assert scaling(alpha=8) == 0.5
    assert scaling(alpha=8, rslora=True) == 2


def test_an_int8_models_products_fill_no_log(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    functions = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").autograd._functions

    def product() -> None:
        layer = bitsandbytes_layer()
        inputs = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
        functions.MatMul8bitLt.apply(inputs, layer.weight, None, None, layer.state)

    with caplog.at_level(logging.WARNING, functions.__name__):
        product()
    assert "inputs will be cast" in caplog.text, "bitsandbytes tells nothing now: drop the logger's level"
    caplog.clear()
    level = logging.getLogger(functions.__name__).level
    try:
        models.build(tiny(precision="int8"), tiny_model, "bf16", CPU, zero3=None)
        product()
    finally:
        logging.getLogger(functions.__name__).setLevel(level)
    assert caplog.text == ""


def bitsandbytes_layer() -> Any:
    from bitsandbytes.nn import Linear8bitLt

    layer = Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": torch.randn(32, 64)})
    layer.to("cpu")
    layer(torch.randn(2, 64))
    return layer


@pytest.mark.parametrize("workers", [1, 2])
def test_an_adapter_trained_under_zero_3_is_saved_whole(
    workers: int, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    saved = {}
    for stage in (0, 3):
        task = make_task(tiny(zero_stage=stage), tiny_model, tiny_data, tmp_path / str(stage))
        outcome = run_trial(task, workers)
        assert outcome.end.status == "completed", outcome.log
        assert sorted(path.name for path in outcome.folder.adapter.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        saved[stage] = load_file(outcome.folder.adapter / "adapter_model.safetensors")
    assert saved[0].keys() == saved[3].keys()
    for name, weights in saved[0].items():
        torch.testing.assert_close(saved[3][name], weights, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_on_the_disk_before_it_takes_its_place(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.build(tiny(), tiny_model, "fp32", CPU, zero3=None)
    folder = tmp_path / "adapter"
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, folder.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    models.save(model, folder, writes=True)
    files = {(file.name, False) for file in folder.iterdir()}
    assert set(synced[:-1]) == {*files, (".adapter.new", False)}
    assert synced[-1] == (tmp_path.name, True)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_an_adapter_may_be_read_by_whom_the_umask_lets(umask: int, mode: int, tiny_model: Path, tmp_path: Path) -> None:
    model = models.build(tiny(), tiny_model, "fp32", CPU, zero3=None)
    before = os.umask(umask)
    try:
        models.save(model, tmp_path / "adapter", writes=True)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "adapter").iterdir()} == {mode}


def test_a_worker_that_writes_nothing_keeps_no_copy_of_what_is_trained(tiny_model: Path) -> None:
    model = models.build(tiny(), tiny_model, "fp32", CPU, zero3=None)
    assert len(models._whole_weights(model, keeps=True)) == sum(p.requires_grad for p in model.parameters())
    assert models._whole_weights(model, keeps=False) == {}


@pytest.mark.parametrize("stage", [2, 3])
def test_the_saved_adapter_reproduces_the_best_evaluation(
    stage: int, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    outcome = run_trial(make_task(tiny(zero_stage=stage), tiny_model, tiny_data, tmp_path / "trial"))
    assert outcome.end.progress
    assert outcome.end.progress.best
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded = PeftModel.from_pretrained(base, outcome.folder.adapter).eval()
    assert _eval_loss(loaded, tiny_data) == pytest.approx(outcome.end.progress.best.eval_loss, rel=1e-4)


@torch.no_grad()
def _eval_loss(model: torch.nn.Module, folder: Path) -> float:
    """One row at a time, with transformers' own loss: nothing of ours but the data."""
    from orchestrator.training import data

    dataset = data.load(folder, "eval", 32, packing=False)
    total = 0.0
    for sequence in range(len(dataset)):
        batch = data.collate(dataset, data.np.array([sequence]), packing=False, pad_token=1)
        labels = torch.from_numpy(batch.labels)
        loss = model(input_ids=torch.from_numpy(batch.input_ids), labels=labels).loss
        total += loss.item() * dataset.sequence_labels[sequence]
    return total / dataset.sequence_labels.sum()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_whole_model_is_saved_where_all_weights_are_trained(
    stage: int, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny(zero_stage=stage, rank="full", learning_rate=1e-3)
    outcome = run_trial(make_task(config, tiny_model, tiny_data, tmp_path / "trial"), workers=2)
    assert outcome.end.progress
    assert outcome.end.progress.best
    loaded = AutoModelForCausalLM.from_pretrained(outcome.folder.adapter)
    assert _eval_loss(loaded, tiny_data) == pytest.approx(outcome.end.progress.best.eval_loss, rel=1e-4)


@pytest.mark.parametrize(("attention", "kind"), [("sdpa", "llama"), ("eager", "llama"), ("sdpa", "gemma 3")])
def test_packed_rows_do_not_see_each_other(
    attention: str, kind: str, tiny_model: Path, tiny_data: Path, gemma_3: Path
) -> None:
    from orchestrator.training import data

    folder = gemma_3 if kind == "gemma 3" else tiny_model

    # As the loop builds it: with a cache for generation transformers would not look for packed rows.
    model = models.build(tiny(attention=attention), folder, "fp32", CPU, zero3=None).eval()
    dataset = data.load(tiny_data, "train", 64, packing=True)
    several = data.np.flatnonzero(data.np.diff(dataset.bounds) > 1)[:3]
    batch = data.collate(dataset, several, packing=True, pad_token=1)
    with torch.no_grad():
        packed = model(
            input_ids=torch.from_numpy(batch.input_ids), position_ids=torch.from_numpy(batch.position_ids)
        ).logits
    for line, sequence in enumerate(several):
        place = 0
        for row in range(dataset.bounds[sequence], dataset.bounds[sequence + 1]):
            length = int(dataset.lengths[row])
            alone = torch.from_numpy(batch.input_ids[line : line + 1, place : place + length])
            with torch.no_grad():
                expected = model(input_ids=alone).logits[0]
            torch.testing.assert_close(packed[line, place : place + length], expected, rtol=1e-4, atol=1e-4)
            place += length


def test_the_evaluation_does_not_depend_on_packing(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    # No learning: only then are two differently cut trainings the same model.
    still = {"learning_rate": 1e-12, "max_steps": 1, "packing": False}
    plain = run_trial(make_task(tiny(**still), tiny_model, tiny_data, tmp_path / "plain"))
    packed = run_trial(make_task(tiny(**{**still, "packing": True}), tiny_model, tiny_data, tmp_path / "packed"))
    assert packed.points[0].eval_loss == pytest.approx(plain.points[0].eval_loss, rel=1e-6)


@pytest.fixture(scope="module")
def gemma_3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the 4B and larger ones are published: a language model, and a part that looks at images."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    folder = tmp_path_factory.mktemp("gemma-3")
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "target_modules",
    [
        "attention",
        "all-linear",
        ("q_proj", "down_proj"),
        ("model.language_model.layers.1.mlp.up_proj", "0.mlp.up_proj"),
    ],
)
def test_of_gemma_3_the_language_model_is_trained_as_counted_and_its_adapter_fits_the_whole_model(
    target_modules: str | tuple[str, ...], gemma_3: Path, tmp_path: Path
) -> None:
    shape = shape_of(AutoConfig.from_pretrained(gemma_3).to_dict())
    built: Any = models.build(tiny(target_modules=target_modules), gemma_3, "fp32", CPU, zero3=None)
    targets = targeted(shape, target_modules)
    assert models.trainable_parameters(built) == lora_parameters(8, targets)
    assert sum(p.numel() for p in built.parameters() if not p.requires_grad) == shape.parameters
    ids = torch.arange(5, 21)[None]
    built(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in built.parameters() if p.requires_grad), "plain data parallelism would hang"
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        expected = built.eval()(input_ids=ids).logits
    models.save(built, tmp_path / "adapter", writes=True)

    whole = AutoModelForCausalLM.from_pretrained(gemma_3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    assert [name for name, _ in loaded.named_modules() if "vision" in name and "lora" in name] == []
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "without grouped queries"])
def test_before_ampere_a_model_with_grouped_queries_hands_each_head_its_own_key_and_computes_the_same(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double().eval()
    ids = torch.arange(16)[None]
    expected = model(ids).logits
    heads = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **more: Any) -> torch.Tensor:
        heads.append((query.shape[1], key.shape[1], value.shape[1], more.get("enable_gqa", False)))
        return kernel(query, key, value, **more)

    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    if attention != "sdpa":
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", models.attend_without_grouped_queries)
    assert torch.allclose(model(ids).logits, expected, rtol=1e-9, atol=1e-12)
    assert heads == [(4, 2, 2, True) if attention == "sdpa" else (4, 4, 4, False)]


@pytest.mark.parametrize(("capability", "repeats"), [((7, 5), True), ((8, 0), False)], ids=["T4", "A100"])
def test_grouped_queries_are_repeated_on_gpus_before_ampere_alone(
    capability: tuple[int, int], repeats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda folder, **wanted: torch.nn.Identity())
    of_transformers = AttentionInterface._global_mapping["sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", of_transformers)
    models._load(tiny(precision="fp16"), tmp_path, "fp16", torch.device("cuda", 0))
    used = AttentionInterface._global_mapping["sdpa"]
    assert used is (models.attend_without_grouped_queries if repeats else of_transformers)


def test_activations_that_transformers_writes_out_become_torchs_kernel_of_the_same_function() -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).double().eval()
    ids = torch.arange(16)[None]
    with torch.no_grad():
        before = model(ids).logits
        models.fuse_activations(model)
        after = model(ids).logits
    assert "NewGELUActivation" not in {type(module).__name__ for module in model.modules()}
    assert torch.allclose(before, after, rtol=1e-9, atol=1e-12)
