"""What libraries say by themselves, kept from the user's terminal."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without their words of kernels and devices, and their bars: a model is only made or merged here, not trained."""
    from transformers.utils import logging as transformers_logging

    from orchestrator.training.device import has_gpu

    accelerator, has_bars = os.environ.get("DS_ACCELERATOR"), transformers_logging.is_progress_bar_enabled()
    # Told, DeepSpeed, which PEFT imports, does not say what it found.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_gpu() else "cpu")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        if has_bars:
            transformers_logging.enable_progress_bar()
        if accelerator is None:
            # Workers inherit the environment, and may have other devices.
            del os.environ["DS_ACCELERATOR"]
