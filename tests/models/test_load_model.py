"""Loading from a folder, a GGUF file and the hub's cache; what is wrong is said in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import close_session, constants
from transformers import AutoModelForCausalLM, PreTrainedModel

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


def test_a_folder_without_a_tokenizer_is_an_error(folder: Path) -> None:
    """transformers makes one with an empty vocabulary, and every prompt would be no token at all."""
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"tokenizer.*'Hello'.*tokenizer\.json"):
        load(folder, device="cpu")


def test_a_local_model_goes_by_its_whole_path(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A landscape of it is used from elsewhere, too, where a relative path would be looked for on the hub."""
    tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "linked.gguf").symlink_to("tiny.gguf")  # as in the hub's cache, where the file itself has no suffix
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model", "./model/", "~/model", folder):
        assert source_of(load(name, device="cpu")[0])["name"] == str(folder)
    for name in ("tiny.gguf", "linked.gguf"):
        assert source_of(load(name, device="cpu")[0])["name"] == str(tmp_path / name)


def test_a_model_that_transformers_read_from_a_folder_goes_by_its_whole_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    model = AutoModelForCausalLM.from_pretrained(folder.name)
    assert source_of(model) == {"name": str(folder), "revision": None, "origin": None}


def test_a_gguf_file_behind_a_link_of_another_name_is_loaded(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "0123abcd")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "tiny.gguf").symlink_to(tmp_path / "0123abcd")
    for name in (tmp_path / "linked", tmp_path / "linked" / "tiny.gguf"):
        assert source_of(load(name, device="cpu")[0])["origin"] == "gguf"


def test_a_local_model_has_no_revision_but_its_own(folder: Path, tmp_path: Path) -> None:
    own = source_of(load(folder, device="cpu")[0])["revision"]
    assert source_of(load(folder, revision=own, device="cpu")[0])["revision"] == own
    tiny_gguf(tmp_path / "tiny.gguf")
    for name in (folder, tmp_path / "tiny.gguf"):
        with pytest.raises(ModelError, match=r"local model.*no revision 'v2'.*--revision"):
            load(name, revision="v2", device="cpu")


def own_code(folder: Path, file: str, **entries: object) -> None:
    """A model (or tokenizer) whose repository brings its code along; where that runs, it leaves a file."""
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    (folder / "own.py").write_text(f"open({str(folder / 'it ran')!r}, 'w')\nclass Own: pass\n")


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        (
            "config.json",
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}},
        ),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}),
    ],
)
def test_a_models_own_code_is_never_run_and_nothing_is_asked(
    folder: Path, file: str, entries: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    own_code(folder, file, **entries)
    if file == "tokenizer_config.json":
        load(folder, device="cpu")  # transformers makes its own kind of tokenizer from tokenizer.json
    else:
        with pytest.raises(ModelError, match=r"code of its own, which elsteer does not run.*load it yourself"):
            load(folder, device="cpu")
    assert not (folder / "it ran").exists()


def test_an_own_model_of_a_known_type_is_not_asked_about(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    own_code(folder, "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    load(folder, device="cpu")
    assert not (folder / "it ran").exists()


@pytest.mark.parametrize(
    "address", ["socks5://127.0.0.1:9", "nonsense", "http://[", "http://127.0.0.1:99999", "ftp://x"]
)
def test_a_proxy_that_cannot_be_used_is_said(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ALL_PROXY", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, address)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    close_session()
    try:
        begin = time.monotonic()
        assert "could not be reached (" in (hub_problem() or "")
        assert time.monotonic() - begin < 3.9
    finally:
        close_session()


@pytest.mark.parametrize(
    "where", ["cuda", "cuda:1", "meta", "xpu", "toaster", "disk", {"": "xpu"}, {"": 0}, {"": "meta"}]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_a_device_map_that_cannot_be_had_is_said(folder: Path, where: str | dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"^(Device )?'(cuda|cuda:1|meta|xpu|toaster|disk|0)'"):
        load(folder, device_map=where)


@pytest.mark.parametrize("device", ["xpu", "meta", "hpu", "vulkan"])
def test_a_device_that_is_not_there_is_said(folder: Path, device: str) -> None:
    with pytest.raises(ModelError, match=f"'{device}'.*use cpu"):
        load(folder, device=device)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", torch.float8_e5m2, "float4_e2m1fn_x2"])
def test_a_dtype_that_nothing_is_computed_in_is_refused(folder: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(ModelError, match="is no dtype for a model"):
        load(folder, dtype=dtype, device="cpu")


@pytest.mark.parametrize("content", [b"", b"junk" * 50])
def test_a_bin_of_weights_that_is_damaged_is_said(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        load(folder, device="cpu")


def test_a_bin_of_weights_that_is_cut_short_is_said(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("qwen2").state_dict(), folder / "pytorch_model.bin")
    assert load(folder, device="cpu")
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="damaged or cut short"):
        load(folder, device="cpu")


@pytest.mark.parametrize("kind", ["dangling", "folder"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_is_none_is_said(folder: Path, file: str, kind: str) -> None:
    (folder / file).unlink()
    (folder / file).symlink_to("/nowhere/at/all") if kind == "dangling" else (folder / file).mkdir()
    with pytest.raises(ModelError, match=str(folder)):
        load(folder, device="cpu")


@pytest.mark.parametrize("content", ["[]", "null", "3", '"a"', "", "{", b"\xff\xfe{}"])
def test_a_configuration_that_is_no_object_is_said(folder: Path, content: str | bytes) -> None:
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    "entries",
    [
        {"hidden_size": 0},
        {"num_attention_heads": 0},
        {"model_type": ["qwen2"]},
        {"dtype": "foo"},
        {"quantization_config": []},
        {"auto_map": 3},
    ],
)
def test_entries_of_a_configuration_that_make_no_sense_are_said(folder: Path, entries: dict[str, object]) -> None:
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **entries}))
    with pytest.raises(ModelError, match=str(folder)) as error:
        load(folder, device="cpu")
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["[]", "null"])
def test_other_files_that_are_no_object_are_said(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(ModelError, match=str(folder)):
        load(folder, device="cpu")


def test_a_path_that_cannot_be_is_said(folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(folder, odd)
    for name in ("~nouser/x", "~nouser", "a\0b", "x" * 300, "/" + "x" * 5000, "\udcff", odd):
        with pytest.raises(ModelError) as error:
            load(name, device="cpu")
        assert len(str(error.value)) < 600
        str(error.value).encode()
    for template in ("~nouser/x", "a\0b", "x" * 300):
        with pytest.raises(ModelError, match="chat template"):
            load(folder, device="cpu", chat_template=template)


def test_a_full_memory_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")):

        def full(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(sys.modules["elsteer.models.load"], "read_model", full)
        with pytest.raises(ModelError, match=r"memory.*--dtype bfloat16"):
            load(folder, device="cpu")


@pytest.mark.parametrize("number", [1, 2])
def test_a_part_of_a_split_gguf_is_said(tmp_path: Path, number: int) -> None:
    (tmp_path / f"tiny-0000{number}-of-00002.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / f"tiny-0000{number}-of-00002.gguf"):
        with pytest.raises(ModelError, match=rf"part {number} of 2.*llama-gguf-split --merge"):
            load(name, device="cpu")
    (tmp_path / f"tiny-0000{3 - number}-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"llama-gguf-split --merge"):
        load(tmp_path, device="cpu")


def test_a_gguf_of_one_part_is_loaded(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny-00001-of-00001.gguf")
    load(tmp_path, device="cpu")
