"""Landscapes on the hub: the real client over real HTTP, against a small server of our own."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from elsteer.errors import LandscapeError
from elsteer.landscape import Landscape
from fake_hub import WRITER, FakeHub, fake_hub
from landscapes import same_landscape, tiny_landscape


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub() as server:
        _use(monkeypatch, server.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def _use(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    # What HF_ENDPOINT decides when huggingface_hub is imported.
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()


def test_what_is_pushed_comes_back(hub: FakeHub) -> None:
    landscape = tiny_landscape()
    address = landscape.push_to_hub("org/name", token=WRITER, private=True, commit_message="first")
    assert address == f"{hub.address}/org/name"
    assert sorted(hub.commits["org/name"][-1]) == ["README.md", "config.json", "model.safetensors"]
    assert hub.private["org/name"]
    assert hub.messages == ["first"]
    assert 'from_pretrained("org/name")' in hub.commits["org/name"][-1]["README.md"].decode()
    same_landscape(Landscape.from_pretrained("org/name"), landscape)


def test_of_a_local_model_only_the_last_part_of_its_path_is_pushed(hub: FakeHub) -> None:
    landscape = tiny_landscape()
    landscape.fingerprint = replace(landscape.fingerprint, name="/home/someone/secret/tiny", revision="0" * 64)
    landscape.push_to_hub("org/name", token=WRITER)
    assert not any(b"someone" in content for content in hub.commits["org/name"][-1].values())
    found = Landscape.from_pretrained("org/name").fingerprint
    assert found.name == "./tiny"
    assert found.is_local
    assert landscape.fingerprint.name == "/home/someone/secret/tiny"


def test_an_older_revision_can_be_loaded(hub: FakeHub) -> None:
    landscape = tiny_landscape()
    landscape.push_to_hub("org/name", token=WRITER)
    first = hub.sha("org/name")
    landscape.with_rule(eta=0.5).push_to_hub("org/name", token=WRITER)
    assert Landscape.from_pretrained("org/name").rule.eta == 0.5
    assert Landscape.from_pretrained("org/name", revision=first).rule == landscape.rule
    with pytest.raises(LandscapeError, match="without a revision v9"):
        Landscape.from_pretrained("org/name", revision="v9")


def test_only_the_three_files_are_downloaded(hub: FakeHub) -> None:
    tiny_landscape().push_to_hub("org/name", token=WRITER)
    hub.commits["org/name"][-1]["other.bin"] = b"large"
    Landscape.from_pretrained("org/name")
    assert not any("other.bin" in request for request in hub.requests)


def test_one_that_was_loaded_before_loads_while_the_hub_is_gone(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    landscape = tiny_landscape()
    landscape.push_to_hub("org/name", token=WRITER)
    Landscape.from_pretrained("org/name")
    _use(monkeypatch, _dead_address())
    same_landscape(Landscape.from_pretrained("org/name"), landscape)


def test_a_repository_that_is_not_there(hub: FakeHub) -> None:
    with pytest.raises(LandscapeError, match=r"no folder org/none, and the hub at .* has none of that name") as caught:
        Landscape.from_pretrained("org/none")
    assert "\n" not in str(caught.value)


def test_a_repository_that_is_no_landscape(hub: FakeHub) -> None:
    hub.commits["org/model"] = [{"model.safetensors": b"", "config.json": b'{"model_type": "qwen2"}'}]
    with pytest.raises(LandscapeError, match="org/model is no landscape"):
        Landscape.from_pretrained("org/model")


def test_pushing_without_permission_says_to_log_in(hub: FakeHub) -> None:
    for token in ("hf_reader", None):
        with pytest.raises(LandscapeError, match="hf auth login") as caught:
            tiny_landscape().push_to_hub("org/name", token=token)
        assert "\n" not in str(caught.value)
    assert "org/name" not in hub.commits


def test_pushing_to_a_hub_that_fails_is_one_sentence(hub: FakeHub) -> None:
    hub.broken = 400
    with pytest.raises(LandscapeError, match="was not uploaded") as caught:
        tiny_landscape().push_to_hub("org/name", token=WRITER)
    assert "\n" not in str(caught.value)


def test_pushing_to_something_that_is_no_id() -> None:
    with pytest.raises(LandscapeError, match="owner/name"):
        tiny_landscape().push_to_hub("my landscape")


def test_an_unreachable_hub_is_noticed_within_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        for address in (_dead_address(), f"http://127.0.0.1:{silent.getsockname()[1]}"):
            _use(monkeypatch, address)
            begun = time.monotonic()
            with pytest.raises(LandscapeError, match="check the name or the connection") as caught:
                Landscape.from_pretrained("org/name")
            assert time.monotonic() - begun < 6
            assert "\n" not in str(caught.value)
    _use(monkeypatch, _dead_address())
    with pytest.raises(LandscapeError, match="was not uploaded"):
        tiny_landscape().push_to_hub("org/name", token=WRITER)


def _dead_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_files_that_were_altered_on_the_hub_are_an_error(hub: FakeHub) -> None:
    tiny_landscape().push_to_hub("org/name", token=WRITER)
    data = bytearray(hub.commits["org/name"][-1]["model.safetensors"])
    data[-1] ^= 1
    hub.commits["org/name"][-1]["model.safetensors"] = bytes(data)
    with pytest.raises(LandscapeError, match="was altered"):
        Landscape.from_pretrained("org/name")
