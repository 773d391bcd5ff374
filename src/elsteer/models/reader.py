"""Reading weights with transformers: folders, hub ids, and GGUF files unpacked into ordinary weights."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import tokenization_auto
from transformers.utils import logging as transformers_logging

__all__ = ["quiet_transformers", "read_model"]


def read_model(
    path: str,
    gguf: Path | None = None,
    *,
    dtype: str | torch.dtype = torch.float32,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer as transformers read them from a folder or hub id, or from a GGUF file, unpacked.

    Code that a repository brings along is not run. Raises what transformers raises: OSError, ValueError and others;
    ValueError too where weights are missing, or a plain word is no token.
    """
    options: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "revision": revision}
    options |= {"output_loading_info": True, "trust_remote_code": False}  # by default, transformers asks on stdin
    if gguf is not None:
        path = str(gguf.parent)
        options |= {"gguf_file": gguf.name, "quantization_config": GgufConfig(dequantize=True)}
    named: dict[str, str | None] = {"gguf_file": gguf.name} if gguf is not None else {"revision": revision}
    # The GGUF reader draws a bar that no setting switches off.
    with redirect_stderr(io.StringIO()) if gguf is not None else nullcontext():
        # Mistral's own tokenizer, where it is installed, has no chat template to know a landscape by.
        own: dict[str, Any] = {"mistral_format": False} if hasattr(tokenization_auto, "_use_mistral_format") else {}
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **own, **named)
        _check_tokenizer(tokenizer)
        try:
            model, report = AutoModelForCausalLM.from_pretrained(path, **options)
        except ValueError as error:
            if "AutoModelForCausalLM" not in str(error):
                raise
            model, report = AutoModelForImageTextToText.from_pretrained(path, **options)
    # transformers fills what is missing with random numbers and goes on.
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} tensors are missing from its weights, such as {missing[0]}")
    return model, tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Where its files are missing, transformers makes a tokenizer with an empty vocabulary and goes on."""
    ids = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    if not ids or set(ids) == {tokenizer.unk_token_id}:
        raise ValueError(
            "its tokenizer does not know the word 'Hello': tokenizer.json, or what else it is made of, is missing"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and advice, which say nothing to a user of elsteer."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
