"""The model's tokenizer, without torch where that can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PLAIN = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
"""What a tokenizer_config.json names whose tokenizer.json says all (transformers 5.23)."""


def load_tokenizer(model: str | Path, **options: Any) -> Any:
    """As AutoTokenizer loads it from a folder or the hub, which takes torch to find out its class: 5 s of CPU.

    Raises:
        OSError, ValueError: there is none, or it cannot be read.
    """
    if _is_plain(Path(model)):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(model, **options)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, **options)


def _is_plain(folder: Path) -> bool:
    if not (folder / "tokenizer.json").is_file():
        return False
    try:
        described = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and described.get("tokenizer_class") in PLAIN and "auto_map" not in described
