"""Loading from a folder, a GGUF file and the hub's cache; what is wrong is said in one sentence."""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import PreTrainedModel

from elsteer.errors import ModelError
from elsteer.models import decoder_blocks, fingerprint, load, source_of
from elsteer.models.hub import hub_problem
from tiny import tiny_gguf, tiny_model, tiny_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.tensor([[1, 2, 3, 4]])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_model("qwen2").to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A port that refuses at once, and an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("ELSTEER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def cached(folder: Path, name: str) -> Path:
    """Put the model into the hub's local cache, as its client does."""
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def test_a_folder_is_loaded_ready_to_be_steered(folder: Path) -> None:
    model, tokenizer = load(folder, device="cpu")
    assert not model.training
    # Frozen weights make torch copy the output matrix for every row of a batch: a forward pass took 30 s instead of 2.
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "<pad>"
    written = tiny_model("qwen2").to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, written[name].float()) for name, value in model.state_dict().items())
    source = source_of(model)
    assert (source["name"], source["origin"]) == (str(folder), "folder")
    assert source["revision"] == source_of(load(str(folder))[0])["revision"]


def test_another_model_in_the_folder_has_another_revision(folder: Path) -> None:
    before = source_of(load(folder, device="cpu")[0])["revision"]
    tiny_model("qwen2", seed=1).save_pretrained(folder)
    assert source_of(load(folder, device="cpu")[0])["revision"] != before


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_dtype_can_be_chosen(folder: Path, dtype: str | torch.dtype) -> None:
    assert load(folder, dtype=dtype, device="cpu")[0].dtype == torch.bfloat16


def test_a_device_map_can_be_given(folder: Path) -> None:
    model, _ = load(folder, device_map={"": "cpu"})
    assert model.device.type == "cpu"
    assert model.dtype == torch.float32
    with pytest.raises(ModelError, match="not both"):
        load(folder, device="cpu", device_map="auto")


def test_a_tokenizer_without_a_pad_token_pads_with_eos(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    _, loaded = load(folder, device="cpu")
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id


def test_a_chat_template_can_be_given(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0]['content'] }}!")
    assert load(folder, device="cpu", chat_template=file)[1].chat_template == "{{ messages[0]['content'] }}!"
    file.write_text("  ")
    for wrong in (file, tmp_path / "missing.jinja", tmp_path):
        with pytest.raises(ModelError, match="chat template"):
            load(folder, device="cpu", chat_template=wrong)


def test_a_gguf_file_is_unpacked_to_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    want = tiny_gguf(tmp_path / "tiny.gguf")
    for name in (tmp_path / "tiny.gguf", tmp_path):
        model, tokenizer = load(name, device="cpu")
        # The weights to the bit; the sums of a product may be taken in another order (models/linear.py).
        weights, wanted = model.state_dict(), want.state_dict()
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[key], wanted[key]) for key in wanted)
        torch.testing.assert_close(logits(model), logits(want), atol=1e-5, rtol=1e-5)
        assert source_of(model)["origin"] == "gguf"
        assert len(source_of(model)["revision"] or "") == 64
        assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert capsys.readouterr().err == ""


def test_several_gguf_files_in_a_folder_are_not_guessed_among(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match="there are 2"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 1000, 100_000])
def test_weights_that_are_cut_short_are_an_error(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match="damaged or cut short"):
        load(folder, device="cpu")


@pytest.mark.parametrize("keep", [0, 30, 100, 100_000, 239_000])
def test_a_gguf_file_that_is_cut_short_is_an_error(tmp_path: Path, keep: int) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        load(tmp_path / "cut.gguf", device="cpu")


def test_missing_tensors_are_an_error_and_not_random_numbers(folder: Path) -> None:
    tiny_model("qwen2", num_hidden_layers=3).save_pretrained(folder.parent / "smaller")
    shutil.copy(folder.parent / "smaller" / "model.safetensors", folder)
    with pytest.raises(ModelError, match=r"tensors are missing from its weights, such as model\.layers\.3"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"model_type": "nosuch"}', "nosuch"),
        ('{"model_type": "qwen2", "hidden_size": "wide"}', "wide"),
        ('{"mod', "JSON"),
        ("{}", "model"),
        (None, "config.json"),
    ],
)
def test_a_folder_that_is_no_model_is_an_error(folder: Path, config: str | None, said: str) -> None:
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=said):
        load(folder, device="cpu")


def test_what_is_not_a_model_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for name in (tmp_path / "notes.txt", tmp_path / "missing.gguf", "./missing", "a/b/c", "", "~/nothing/here", "a b"):
        with pytest.raises(ModelError):
            load(name)
    for options in ({"dtype": "float33"}, {"dtype": "int8"}, {"device": "toaster"}):
        with pytest.raises(ModelError, match=r"float33|int8|toaster"):
            load(folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_a_gpu_that_is_not_there_is_said(folder: Path) -> None:
    with pytest.raises(ModelError, match="no GPU"):
        load(folder, device="cuda")


def test_the_hubs_cache_is_used_when_the_hub_is_away(folder: Path) -> None:
    cached(folder, "someone/tiny")
    for revision in (None, "main", COMMIT):
        model, _ = load("someone/tiny", revision=revision, device="cpu")
        assert source_of(model) == {"name": "someone/tiny", "revision": COMMIT, "origin": "hub"}
    with pytest.raises(ModelError, match="not in the local hub cache at revision v2"):
        load("someone/tiny", revision="v2", device="cpu")


def test_a_snapshot_in_the_cache_that_is_not_whole_is_said(folder: Path) -> None:
    (cached(folder, "someone/tiny") / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"could not be loaded.*model\.safetensors"):
        load("someone/tiny", device="cpu")


def test_a_gated_model_says_how_to_get_access(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers raises an OSError of many sentences, from what the hub said."""
    cached(folder, "someone/gated")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(sys.modules["elsteer.models.load"], "read_model", refuse)  # load is also a function
    with pytest.raises(ModelError, match=r"someone/gated is gated.*ask for access on .*/someone/gated and log in"):
        load("someone/gated", device="cpu")


def test_all_that_was_tried_stands_in_one_sentence() -> None:
    with pytest.raises(ModelError) as error:
        load("someone/nothing")
    for part in ("no such local file or folder", "127.0.0.1:9 could not be reached", "local hub cache", "no registry"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_that_refuses_is_noticed_at_once() -> None:
    begin = time.monotonic()
    assert "could not be reached" in (hub_problem() or "")
    assert time.monotonic() - begin < 2


def test_a_hub_that_never_answers_is_given_up_within_5_seconds(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    begin = time.monotonic()
    with pytest.raises(ModelError, match=silent):
        load("someone/nothing")
    assert time.monotonic() - begin < 5


def test_nothing_is_sent_in_offline_mode(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    begin = time.monotonic()
    assert "HF_HUB_OFFLINE" in (hub_problem() or "")
    assert time.monotonic() - begin < 0.5


def test_a_model_that_elsteer_did_not_load_says_what_its_configuration_knows() -> None:
    assert source_of(tiny_model()) == {"name": None, "revision": None, "origin": None}


def test_the_path_of_the_blocks_is_said_once_and_holds_everywhere(folder: Path) -> None:
    model, tokenizer = load(folder, blocks="model.layers")
    assert decoder_blocks(model) is model.model.layers
    assert fingerprint(model, tokenizer).num_layers == len(model.model.layers)
    with pytest.raises(ModelError):
        load(folder, blocks="model.nowhere")
