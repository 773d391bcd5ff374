"""Settings: read the same from Python, YAML and flags; what makes no sense is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from elsteer.prompts.attacks import fitting_families
from elsteer.settings import CollectSettings, FitSettings, TrainingSettings, TuningSettings


def test_settings_written_as_yaml_are_read_as_they_were() -> None:
    settings = FitSettings(
        seed=3, tuning=TuningSettings(gates=(None, 0.5), etas=(0.1,)), training=TrainingSettings(hidden=())
    )
    text = yaml.safe_dump(json.loads(settings.model_dump_json()), sort_keys=False)
    assert FitSettings.model_validate(yaml.safe_load(text)) == settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"sed": 1},
        {"seed": -1},
        {"seed": 2**32},
        {"dev_share": 0},
        {"dev_share": 1},
        {"limit": 15},
        {"attacks": ["dan"]},
        {"attacks": ["nonsense"]},
        {"attack_share": 0},
        {"collect": {"batch_size": 0}},
        {"collect": {"sytem": "x"}},
        {"training": {"dropout": 1}},
        {"training": {"epochs": 0}},
        {"tuning": {"band_share": 0}},
        {"tuning": {"finalists": 0}},
        {"training": {"refine_band": [12, 22]}},
        {"training": {"refine_band": [0.8, 0.5]}},
        {"training": {"refine_band": [0.5, 0.5]}},
        *({"tuning": {name: []}} for name in ("etas", "steps", "windows", "gates", "guards")),
        {"tuning": {"etas": [0.0]}},
        {"tuning": {"steps": [0]}},
        {"tuning": {"windows": [-1]}},
        {"tuning": {"gates": [25]}},
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FitSettings.model_validate(wrong)


def test_families_of_attacks_may_be_named_all_or_none() -> None:
    assert FitSettings().attacks == fitting_families() == FitSettings(attacks="all").attacks  # type: ignore[arg-type]
    for none in ("none", ["none"], [None], []):
        assert FitSettings(attacks=none).attacks == ()
    assert FitSettings(attacks=["games", "rules"]).attacks == ("games", "rules")


def test_settings_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValidationError):
        FitSettings().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("kind", [FitSettings, CollectSettings, TrainingSettings, TuningSettings])
def test_every_option_says_what_it_does(kind: type[BaseModel]) -> None:
    for name, field in kind.model_fields.items():
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        assert nested or (field.description or "").endswith("."), name
