"""Models that commands load for a landscape, by the name that it has of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from commands import elsteer, one_sentence, save_tiny
from elsteer.commands.shared import load_for
from elsteer.errors import ModelError
from elsteer.landscape import Landscape
from elsteer.models import load, source_of
from landscapes import tiny_landscape


@pytest.fixture
def landscape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Landscape:
    """Of a model that was loaded by a relative path; it is used from another folder."""
    save_tiny(tmp_path / "work" / "models" / "tiny")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    found = tiny_landscape(load("models/tiny", device="cpu")[0])
    monkeypatch.chdir(tmp_path / "elsewhere")
    return found


def test_a_local_model_is_found_from_another_folder(landscape: Landscape, tmp_path: Path) -> None:
    model, _ = load_for(landscape, None, device="cpu")
    assert source_of(model)["name"] == str(tmp_path / "work" / "models" / "tiny")


def test_a_local_model_that_was_moved_is_said_and_not_looked_for_on_the_hub(
    landscape: Landscape, tmp_path: Path
) -> None:
    (tmp_path / "work").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"local model .*models/tiny.*not there.*--model"):
        load_for(landscape, None, device="cpu")
    assert load_for(landscape, str(tmp_path / "moved" / "models" / "tiny"), device="cpu")


def test_a_relative_path_of_an_earlier_version_is_not_looked_for_on_the_hub(
    landscape: Landscape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    landscape.fingerprint = replace(landscape.fingerprint, name="models/tiny")
    landscape.save_pretrained(tmp_path / "landscape")
    said = one_sentence(elsteer("chat", tmp_path / "landscape", "--device", "cpu", input="Hello\n"))
    assert "local model models/tiny" in said
    assert "--model" in said
    monkeypatch.chdir(tmp_path / "work")
    assert load_for(landscape, None, device="cpu")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device-map", "cuda:77"], "'cuda:77'"),
        (["--device", "xpu"], "'xpu'"),
        (["--device", "meta"], "'meta'"),
        (["--dtype", "float8_e4m3fn"], "'float8_e4m3fn'"),
        (["--revision", "v1"], "no revision 'v1'"),
        (["--chat-template", "~nouser/x"], "~nouser/x"),
        (["--model", "~nouser/x"], "~nouser/x"),
        (["--model", "\udcff"], "\\udcff"),
    ],
)
def test_what_cannot_be_loaded_ends_in_a_sentence(
    landscape: Landscape, tmp_path: Path, options: list[str], said: str
) -> None:
    landscape.save_pretrained(tmp_path / "landscape")
    assert said in one_sentence(elsteer("chat", tmp_path / "landscape", *options, input="Hello\n"))


def test_a_damaged_configuration_ends_in_a_sentence(landscape: Landscape, tmp_path: Path) -> None:
    landscape.save_pretrained(tmp_path / "landscape")
    (tmp_path / "work/models/tiny/config.json").write_text("[]", encoding="utf-8")
    assert "config.json is damaged" in one_sentence(elsteer("chat", tmp_path / "landscape", input="Hello\n"))
