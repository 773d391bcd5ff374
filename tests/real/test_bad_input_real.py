"""A real model that has nothing to learn from: SmolLM2 never refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import elsteer, one_sentence

pytestmark = pytest.mark.real


def test_a_model_that_never_refuses_has_nothing_to_learn(tmp_path: Path) -> None:
    options = ["--limit", "32", "--dev-limit", "16", "--max-new-tokens", "16", "--run-dir", tmp_path]
    said = one_sentence(elsteer("fit", "HuggingFaceTB/SmolLM2-135M-Instruct", *options))
    assert "There is nothing to learn: the model refuses 0 of its benign training prompts" in said
    assert "leave the model as it is" in said
