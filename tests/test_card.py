"""The model card says what a landscape is, for which model, and what was measured."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from elsteer.card import landscape_card
from elsteer.models import MIRRORS, Fingerprint
from elsteer.steering.rule import SteeringRule

MODEL = Fingerprint(
    name="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    revision="abc123",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    num_layers=24,
    hidden_size=896,
    vocab_size=151936,
    template_sha256="f" * 64,
    thinking=None,
    weights={},
)
RULE = SteeringRule((13, 14), eta=0.08, steps=3, window=3, gates={13: -1.25})
FIGURES = [
    {"name": "removed", "value": 0.61, "low": 0.52, "high": 0.69, "n": 250, "note": "rules | judge"},
    {"name": "overhead", "value": 0.02},
    {"name": "broken"},
    "broken",
]


def card(name: str = "org/landscape", model: Fingerprint = MODEL, **options: Any) -> str:
    given: dict[str, Any] = {"rule": RULE, "provenance": {}, "method": "els", **options}
    return landscape_card(name=name, fingerprint=model, **given)


def test_the_hub_reads_its_front_matter() -> None:
    data = ModelCard(card()).data
    assert data.library_name == "elsteer"
    assert data.base_model == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert data.license == "apache-2.0"
    assert "over-refusal" in data.tags
    assert ModelCard(card(provenance={"license": "mit"})).data.license == "mit"


def test_a_model_that_only_the_registry_has_is_named_with_its_revision() -> None:
    assert 'elsteer.load("Qwen/Qwen2.5-Coder-0.5B-Instruct")\n' in card()
    pin = MIRRORS[str(MODEL.name)].sha256
    call = f'elsteer.load("Qwen/Qwen2.5-Coder-0.5B-Instruct", revision="{pin}")\n'
    assert call in card(model=replace(MODEL, revision=pin))


def test_a_relative_path_of_an_earlier_version_is_no_model_of_the_hub() -> None:
    local = replace(MODEL, name="models/tiny", revision="0" * 64)
    text = card(model=local)
    assert ModelCard(text).data.base_model is None
    assert "models/tiny" not in text
    assert "path/to/the/model" in text


def test_it_says_which_model_and_how_it_steers() -> None:
    text = card()
    assert "24 decoder blocks, hidden size 896" in text
    assert "| decoder blocks | 13, 14 |" in text
    assert "0.08 of the root-mean-square distance of the layer's states from their mean" in text
    assert "the first 3 of the answer" in text
    assert "13: -1.25" in text
    assert "2510.08646" in text
    assert "What it must not be used for" in text


def test_the_code_to_use_it_is_python_of_six_lines_after_the_import() -> None:
    code = re.search(r"```python\n(.*?)```", card(), re.DOTALL)
    assert code is not None
    ast.parse(code[1])
    assert len(code[1].splitlines()) == 6
    assert 'elsteer.Landscape.from_pretrained("org/landscape")' in code[1]
    assert 'elsteer.load("Qwen/Qwen2.5-Coder-0.5B-Instruct")' in code[1]


def test_figures_have_their_intervals() -> None:
    text = card(provenance={"figures": FIGURES})
    assert "| `removed` | 0.610 | 0.520 to 0.690 | 250 | rules \\| judge |" in text
    assert "| `overhead` | 0.020 |  |  |  |" in text
    assert "broken" not in text


def test_without_figures_it_says_to_measure() -> None:
    assert "elsteer evaluate" in card()
    assert "elsteer evaluate" in card(provenance={"figures": "none"})


def test_how_it_was_made_is_listed_in_lines() -> None:
    made = {"seed": 0, "training": {"epochs": 40, "auroc": [0.8123456, None]}, "text": "a|b\nc", "long": ["x"] * 500}
    text = card(provenance=made)
    assert "| seed | 0 |" in text
    assert "| training | epochs: 40, auroc: 0.8123, none |" in text
    assert "| text | a\\|b c |" in text
    assert max(len(line) for line in text.splitlines() if line.startswith("| long")) < 300


@pytest.mark.parametrize("name", ["/home/someone/secret project/model", "runs/models/model.gguf", None])
def test_a_local_model_is_no_base_model_and_its_path_is_not_told(name: str | None) -> None:
    text = card(model=replace(MODEL, name=name))
    assert ModelCard(text).data.base_model is None
    assert "someone" not in text
    assert "runs/" not in text
    assert 'elsteer.load("path/to/the/model")' in text


def test_a_local_folder_is_called_by_its_last_part(tmp_path: Path) -> None:
    text = card(name=str(tmp_path / "landscape"))
    assert "# landscape\n" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("name", "read"),
    [("results/landscapes/a", "results/landscapes/a"), ("/home/someone/a", "a"), ("../someone/a", "a"), ("a", "a")],
)
def test_a_folder_below_the_current_one_is_read_by_its_whole_path(name: str, read: str) -> None:
    text = card(name=name)
    assert f'from_pretrained("{read}")' in text
    assert "# a\n" in text
    assert "someone" not in text


def test_strength_zero_and_the_control_are_said_in_bold() -> None:
    assert "**Its strength is 0:**" in card(rule=replace(RULE, strength=0.0))
    assert "**This is a negative control:**" in card(method="random")
    assert "negative control" not in card()
    assert "strength is 0" not in card()
