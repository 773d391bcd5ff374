"""The folder of a landscape: whole or not at all, and nothing that is damaged is taken for good."""

from __future__ import annotations

import errno
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from elsteer import landscape_files
from elsteer.errors import ElsteerError, LandscapeError, RunError
from elsteer.landscape import Landscape
from elsteer.landscape_files import FILES, read_folder, write_folder
from landscapes import same_landscape, tiny_landscape


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_landscape(provenance={"seed": 1}).save_pretrained(tmp_path / "landscape")
    return tmp_path / "landscape"


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def error_of(folder: Path | str, **options: Any) -> str:
    with pytest.raises(LandscapeError) as caught:
        Landscape.from_pretrained(folder, **options)
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".")
    assert len(said) < 500
    return said


# Writing


def test_the_folder_holds_three_files_and_nothing_is_left_beside_it(folder: Path) -> None:
    assert sorted(contents(folder)) == sorted(FILES)
    assert [entry.name for entry in folder.parent.iterdir()] == ["landscape"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_the_same_landscape_gives_the_same_bytes(folder: Path) -> None:
    before = contents(folder)
    tiny_landscape(provenance={"seed": 1}).save_pretrained(folder)
    assert contents(folder) == before


def test_a_landscape_that_is_there_is_replaced(folder: Path) -> None:
    tiny_landscape().with_rule(eta=0.5).save_pretrained(folder)
    assert Landscape.from_pretrained(folder).rule.eta == 0.5
    assert [entry.name for entry in folder.parent.iterdir()] == ["landscape"]


def test_folders_on_the_way_are_made_and_an_empty_one_is_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "landscape"):
        tiny_landscape().save_pretrained(path)
        assert sorted(contents(path)) == sorted(FILES)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(LandscapeError, match="holds no landscape"):
        tiny_landscape().save_pretrained(tmp_path / "thesis")
    assert contents(tmp_path / "thesis") == {"chapter.txt": b"years of work"}


def test_a_model_folder_is_left_alone_though_its_files_have_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(LandscapeError, match="holds no landscape"):
        tiny_landscape().save_pretrained(tmp_path / "model")
    assert contents(tmp_path / "model")["model.safetensors"] == b"weights"


def test_a_landscape_with_other_files_beside_is_left_alone(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(LandscapeError, match=r"notes\.txt"):
        tiny_landscape().with_rule(eta=0.5).save_pretrained(folder)
    assert contents(folder) == before


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LandscapeError, match="is a file"):
        tiny_landscape().save_pretrained(tmp_path / "file")
    with pytest.raises(LandscapeError, match="could not be written"):
        tiny_landscape().save_pretrained(tmp_path / "file" / "landscape")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_to_a_landscape_stays_a_link(folder: Path) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    tiny_landscape().with_rule(eta=0.5).save_pretrained(link)
    assert link.is_symlink()
    assert Landscape.from_pretrained(folder).rule.eta == 0.5


@pytest.mark.parametrize("at", ["write_atomic", "write_json", "_swap"])
@pytest.mark.parametrize("existing", [True, False])
def test_interrupted_while_saving_the_old_one_is_still_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at: str, existing: bool
) -> None:
    path = folder if existing else folder.with_name("new")
    before = contents(folder)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(landscape_files, at, interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny_landscape().with_rule(eta=0.5).save_pretrained(path)
    assert contents(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["landscape"]


def test_interrupted_between_the_two_renames_the_old_one_comes_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = contents(folder), Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_landscape().with_rule(eta=0.5).save_pretrained(folder)
    assert contents(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["landscape"]


def test_killed_between_the_two_renames_the_old_one_is_found_and_the_next_save_tidies_up(folder: Path) -> None:
    folder.rename(folder.with_name(".landscape.old"))  # as a kill leaves it
    same_landscape(Landscape.from_pretrained(folder), tiny_landscape(provenance={"seed": 1}))
    tiny_landscape().with_rule(eta=0.5).save_pretrained(folder)
    assert Landscape.from_pretrained(folder).rule.eta == 0.5
    assert [entry.name for entry in folder.parent.iterdir()] == ["landscape"]


def test_killed_after_the_two_renames_the_new_one_counts(folder: Path) -> None:
    tiny_landscape().with_rule(eta=0.9).save_pretrained(folder.with_name(".landscape.old"))
    assert Landscape.from_pretrained(folder).rule.eta == 0.3
    tiny_landscape().with_rule(eta=0.5).save_pretrained(folder)
    assert Landscape.from_pretrained(folder).rule.eta == 0.5
    assert [entry.name for entry in folder.parent.iterdir()] == ["landscape"]


def test_a_full_disk_is_one_sentence_and_the_old_one_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match="No space left"):
        tiny_landscape().with_rule(eta=0.5).save_pretrained(folder)
    assert contents(folder) == before


# Reading


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "There is no landscape at" in error_of(tmp_path / "none")
    assert "hub id" in error_of("runs/one/landscape")
    assert "hub id" in error_of("none")


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    assert "is a file" in error_of(folder / "config.json")


def test_a_folder_has_no_revisions(folder: Path) -> None:
    assert "revision" in error_of(folder, revision="v1")


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in error_of(folder)


def test_the_folder_of_a_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    assert "is no landscape" in error_of(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": 1}{'])
def test_a_config_that_is_not_json(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    assert "not JSON" in error_of(folder)


def test_a_newer_format_says_to_upgrade(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"format": "elsteer-landscape", "format_version": 2}))
    said = error_of(folder)
    assert "format 2" in said
    assert "pip install --upgrade elsteer" in said


def test_a_config_of_today_has_all_that_is_needed(folder: Path) -> None:
    config = config_of(folder)
    assert config["format_version"] == 1
    assert set(config) == {
        *("format", "format_version", "elsteer_version", "method", "rule", "fingerprint", "provenance", "tensors")
    }
    assert config["tensors"]["shapes"]["layers.1.weight"] == [16, 32]


def wrong(entries: list[str], values: list[Any], allowed: list[tuple[str, Any]]) -> list[Any]:
    """Each entry with each value, but for those that are allowed."""
    kept = {(entry, repr(value)) for entry, value in allowed}
    pairs = [(entry, value) for entry in entries for value in values if (entry, repr(value)) not in kept]
    return [pytest.param(entry, value, id=f"{entry}-{str(value)[:12]}") for entry, value in pairs]


PARTS = ["format", "format_version", "method", "rule", "fingerprint", "provenance", "tensors"]
RULE_ENTRIES = ["layers", "eta", "steps", "window", "gates", "guard", "strength"]
MODEL_ENTRIES = ["architecture", "num_layers", "hidden_size", "weights", "template_sha256"]


@pytest.mark.parametrize(
    ("at", "value"),
    wrong(
        PARTS,
        [None, 1, "text", [], {}, [1, "a"], {"a": {}}, True],
        [("format_version", 1), ("provenance", {}), ("provenance", {"a": {}})],
    ),
)
def test_wrong_kinds_in_the_config(folder: Path, at: str, value: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), at: value}))
    error_of(folder)


@pytest.mark.parametrize(
    ("entry", "value"),
    wrong(
        RULE_ENTRIES,
        [None, "text", [1], {"a": 1}, -1, True, 1e999, 10**400],
        [("gates", None), ("guard", True), ("layers", [1])],
    ),
)
def test_wrong_kinds_in_the_rule(folder: Path, entry: str, value: Any) -> None:
    config = config_of(folder)
    config["rule"][entry] = value
    (folder / "config.json").write_text(json.dumps(config))
    error_of(folder)


@pytest.mark.parametrize(
    ("entry", "value"),
    wrong(
        MODEL_ENTRIES,
        [None, 1.5, [1], {"a": ["x"]}, -1, "text"],
        [("architecture", "text"), ("template_sha256", "text")],
    ),
)
def test_wrong_kinds_in_the_fingerprint(folder: Path, entry: str, value: Any) -> None:
    config = config_of(folder)
    config["fingerprint"][entry] = value
    (folder / "config.json").write_text(json.dumps(config))
    error_of(folder)


def test_tensors_that_are_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in error_of(folder)


@pytest.mark.parametrize("kept", [0, 7, 8, 300, -1])
def test_tensors_that_were_cut_short(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "bytes instead of" in error_of(folder)


def test_tensors_with_one_bit_turned(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    assert "was altered" in error_of(folder)


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """The folder with changed tensors, of which config.json gives the right hash and shapes."""
    config, tensors = read_folder(folder)
    change(tensors)
    write_folder(folder, {key: value for key, value in config.items() if not key.startswith("format")}, tensors, "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("layers.1.bias"), "bias is missing"),
        (lambda t: t.pop("guards.1"), "layer 1 has none"),
        (lambda t: t.pop("layers.1.weight"), "no weight matrix"),
        (lambda t: t.update({"layers.1.extra": torch.zeros(2)}), "extra"),
        (lambda t: t.update({"stray": torch.zeros(2)}), "stray"),
        (lambda t: t.update({"layers.x.bias": torch.zeros(2)}), "layers.x.bias"),
        (lambda t: t.update({"layers.1.mean": torch.zeros(33)}), "mean is"),
        (lambda t: t.update({"guards.1": torch.zeros(33, 1)}), "guard of layer 1"),
        (lambda t: t["layers.2.read_out"].fill_(float("nan")), "not finite"),
        (lambda t: t["layers.2.weight"][0].fill_(float("inf")), "not finite"),
        (lambda t: t["guards.2"].fill_(float("nan")), "not finite"),
        (lambda t: t["layers.1.scale"].zero_(), "scale"),
        (lambda t: t.update({"layers.1.bias": t["layers.1.bias"].double()}), "float64"),
        (lambda t: t.update({f"layers.9.{k[9:]}": v for k, v in t.items() if k[:9] == "layers.1."}), "layer 9"),
        (lambda t: t.clear(), "layer 1"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[Any], None], said: str) -> None:
    rewritten(folder, change)
    assert said in error_of(folder)


def test_shapes_that_are_not_those_of_the_config(folder: Path) -> None:
    config = config_of(folder)
    config["tensors"]["shapes"]["layers.1.weight"] = [16, 64]
    (folder / "config.json").write_text(json.dumps(config))
    assert "layers.1.weight is [16, 32] where config.json says [16, 64]" in error_of(folder)


def replaced(folder: Path, data: bytes) -> None:
    """The folder with other bytes for its tensors, of which config.json gives the right hash."""
    import hashlib

    (folder / "model.safetensors").write_bytes(data)
    config = config_of(folder)
    config["tensors"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "config.json").write_text(json.dumps(config))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("data", [pickle.dumps(Bomb()), b"", b"\xff" * 64, save({})])
def test_a_file_that_is_no_safetensors_is_never_unpickled(folder: Path, data: bytes) -> None:
    replaced(folder, data)
    error_of(folder)


def test_every_error_is_one_for_the_user() -> None:
    assert issubclass(LandscapeError, ElsteerError)
