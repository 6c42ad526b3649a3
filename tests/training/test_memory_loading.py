"""What a CPU's process holds once a quantised model is loaded, in processes of their own."""

from __future__ import annotations

import json
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.memory import _bytes_of, _linear_bytes
from orchestrator.planning.model_shape import shape_of
from orchestrator.training.task import WorkerPlace
from tests.training.conftest import tiny
from tests.training.launch import in_workers


def count_growth(_: WorkerPlace, pipe: Connection, folder: str, config: TrialConfig) -> None:
    """Send the bytes, beside pages of files, by which this process grows while it loads the model."""
    import torch

    from orchestrator.training import device, model

    # A trial has read its data by then, and what it freed of that tells glibc which blocks its heap is to keep.
    torch.zeros(31 * 2**18)
    before = device._status_bytes("RssAnon")
    loaded = model._load(config, Path(folder), "bf16", torch.device("cpu"))
    pipe.send(device._status_bytes("RssAnon") - before)
    del loaded


def test_no_copies_stay_behind_of_weights_that_a_cpu_quantised(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=15, vocab_size=64)).to(torch.bfloat16).save_pretrained(
        tmp_path
    )
    config, shape = tiny(precision="nf4"), shape_of(json.loads((tmp_path / "config.json").read_text()))
    ((grown,),) = in_workers(1, count_growth, str(tmp_path), config)
    assert grown < 3 * _linear_bytes(shape, _bytes_of(config, "cpu", has_bf16=True))
