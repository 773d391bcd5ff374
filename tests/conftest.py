"""Fixtures for every test. `from tiny import tiny_model, tiny_tokenizer` works in any test file."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny import tiny_model, tiny_tokenizer

hypothesis.settings.register_profile("any machine", deadline=None)  # how fast it is belongs in benchmarks/
hypothesis.settings.load_profile("any machine")

REAL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public benchmarks and labelled data: $ELSTEER_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("ELSTEER_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"the development data are not there: {folder} (set ELSTEER_DATA to their folder)")
    return folder


@pytest.fixture
def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh tiny Qwen2 with its chat tokenizer."""
    return tiny_model("qwen2"), tiny_tokenizer("chatml")


@pytest.fixture(scope="session")
def real() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The default model in float32, fetched on first use. Shared by all tests: leave it as it was."""
    from elsteer.allocator import keep_freed_memory
    from elsteer.models import load

    keep_freed_memory()  # as the command does
    return load(REAL, device="cpu")
