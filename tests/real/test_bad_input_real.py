"""A real model that has nothing to learn from: SmolLM2 hardly ever refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commands import elsteer, one_sentence

pytestmark = pytest.mark.real


def test_a_model_that_hardly_refuses_has_nothing_to_learn(tmp_path: Path) -> None:
    options = ["--limit", "32", "--dev-limit", "16", "--max-new-tokens", "16", "--run-dir", tmp_path]
    said = one_sentence(elsteer("fit", "HuggingFaceTB/SmolLM2-135M-Instruct", *options))
    # which 32 prompts are drawn depends on all the starter prompts: a lone refusal among them is within reason
    assert re.search(
        "the model refuses (?:[0-7] of its benign training prompts|no benign dev prompt)", said, re.IGNORECASE
    )
    assert "leave the model as it is" in said
