"""The model provider `elsteer` of Inspect."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from elsteer.errors import LandscapeError, SteeringError
from elsteer.models import encode_chat
from landscapes import tiny_landscape
from tiny import tiny_model, tiny_tokenizer

pytest.importorskip("inspect_ai", reason="inspect-ai is not installed: pip install 'elsteer[inspect]'")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.tool import ToolInfo

from elsteer.plugins.inspect import ElsteerAPI

STRENGTH = 6.0
CHAT = [ChatMessageSystem(content="Be brief."), ChatMessageUser(content="Name a tree.")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its landscape as folders."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model(max_position_embeddings=512)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    tiny_landscape(model).save_pretrained(folder / "landscape")
    return folder


def answer(saved: Path, strength: float, tokens: int = 8, **config: Any) -> Any:
    api = ElsteerAPI(str(saved / "model"), landscape=str(saved / "landscape"), strength=strength, device="cpu")
    asked = GenerateConfig(max_tokens=tokens, **config)
    return asyncio.run(api.generate(list(CHAT), [], "none", asked))


def expected(strength: float | None) -> tuple[list[int], str]:
    """Prompt ids and the text that the model generates by itself."""
    model, tokenizer = tiny_model(max_position_embeddings=512), tiny_tokenizer()
    ids = encode_chat(tokenizer, [{"role": one.role, "content": one.text} for one in CHAT])
    if strength is not None:
        tiny_landscape(model).attach(model, strength)
    made = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    return ids, str(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)).strip()


def test_an_answer_is_that_of_the_steered_model(saved: Path) -> None:
    found = answer(saved, STRENGTH)
    ids, text = expected(STRENGTH)
    assert found.completion == text
    assert found.usage.input_tokens == len(ids)
    assert found.usage.total_tokens == len(ids) + found.usage.output_tokens
    assert found.stop_reason == "max_tokens"
    assert answer(saved, 0.0).completion == expected(None)[1] != text


def test_a_chat_is_asked_as_in_the_fit(saved: Path, tmp_path: Path) -> None:
    collect = {"collect": {"system": "Be kind.", "thinking": False}}
    tiny_landscape(tiny_model(max_position_embeddings=512), provenance={"settings": collect}).save_pretrained(tmp_path)
    api = ElsteerAPI(str(saved / "model"), landscape=str(tmp_path), device="cpu")
    assert api.thinking is False
    assert ElsteerAPI(str(saved / "model"), landscape=str(tmp_path), device="cpu", thinking=True).thinking is True
    user = ChatMessageUser(content="Name a tree.")
    counts = [
        asyncio.run(api.generate(chat, [], "none", GenerateConfig(max_tokens=2))).usage.input_tokens
        for chat in ([user], list(CHAT))
    ]
    kind, brief = ("Be kind.", "Be brief.")
    expected_counts = [
        len(encode_chat(tiny_tokenizer(), [{"role": "user", "content": user.text}], system=words))
        for words in (kind, brief)
    ]
    assert counts == expected_counts, "the fit's system prompt, unless the chat has one"


def test_sampling_goes_by_the_seed_and_a_stop_sequence_stops(saved: Path) -> None:
    one, same, other = (answer(saved, 0.0, 16, temperature=1.0, seed=seed).completion for seed in (1, 1, 2))
    assert one == same != other
    text = answer(saved, 0.0).completion
    letter = next(character for character in text[1:] if character.isascii())
    cut = answer(saved, 0.0, stop_seqs=[letter])
    assert cut.completion == text[: text.index(letter)].rstrip()
    assert cut.stop_reason == "stop"


def test_a_stop_sequence_is_found_within_a_token(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token may hold a stop sequence and more: what comes after it, and it itself, is cut."""
    api = ElsteerAPI(str(saved / "model"), landscape=str(saved / "landscape"), strength=0.0, device="cpu")
    monkeypatch.setattr(api.tokenizer, "decode", lambda *_, **__: "one two### three")
    config = GenerateConfig(max_tokens=8, stop_seqs=["#"])
    found = asyncio.run(api.generate(list(CHAT), [], "none", config))
    assert (found.completion, found.stop_reason) == ("one two", "stop")


def test_an_answer_ends_where_the_model_s_context_does(saved: Path) -> None:
    found = answer(saved, 0.0, tokens=4000)
    assert found.usage.total_tokens == 512
    assert found.stop_reason == "model_length"
    api = ElsteerAPI(str(saved / "model"), landscape=str(saved / "landscape"), device="cpu")
    long = [ChatMessageUser(content="word " * 600)]
    none = asyncio.run(api.generate(long, [], "none", GenerateConfig(max_tokens=8)))
    assert (none.completion, none.stop_reason) == ("", "model_length")


def test_inspect_s_cache_tells_strengths_and_landscapes_apart(saved: Path, tmp_path: Path) -> None:
    """Its key holds the name, the base_url and the configuration."""
    tiny_landscape(tiny_model(max_position_embeddings=512), hidden=(4,)).save_pretrained(tmp_path)
    apis = [
        ElsteerAPI(str(saved / "model"), landscape=str(folder), strength=strength, thinking=thinking, device="cpu")
        for folder, strength, thinking in (
            (saved / "landscape", 1.0, None),
            (saved / "landscape", 0.0, None),
            (tmp_path, 1.0, None),
            (saved / "landscape", 1.0, False),
            (saved / "landscape", 1.0, None),
        )
    ]
    told = [api.base_url for api in apis]
    assert told[0] == told[4]
    assert len(set(told)) == 4


def test_inspect_finds_it_by_name_and_runs_a_task_on_it(saved: Path, tmp_path: Path) -> None:
    text = expected(STRENGTH)[1]
    task = Task(dataset=[Sample(input=list(CHAT), target=text)], scorer=includes(ignore_case=False))
    model = get_model(
        f"elsteer/{saved / 'model'}",
        landscape=str(saved / "landscape"),
        strength=STRENGTH,
        device="cpu",
        config=GenerateConfig(max_tokens=8),
    )
    (log,) = eval(task, model=model, log_dir=str(tmp_path), display="none")
    assert log.status == "success"
    assert log.samples[0].output.completion == text
    assert log.results.scores[0].metrics["accuracy"].value == 1.0


def test_what_is_not_supported_is_refused(saved: Path) -> None:
    model, landscape = str(saved / "model"), str(saved / "landscape")
    with pytest.raises(SteeringError, match="needs a landscape"):
        ElsteerAPI(model)
    with pytest.raises(SteeringError, match="does not know -M peft"):
        ElsteerAPI(model, landscape=landscape, peft="x")
    with pytest.raises(SteeringError, match=r"strength is one finite number.*not 'much'"):
        ElsteerAPI(model, landscape=landscape, strength="much")
    with pytest.raises(SteeringError, match="thinking is true or false, not 'maybe'"):
        ElsteerAPI(model, landscape=landscape, thinking="maybe")
    with pytest.raises(LandscapeError, match="nowhere"):
        ElsteerAPI(model, landscape=str(saved / "nowhere"))
    with pytest.raises(SteeringError, match="log probabilities"):
        answer(saved, 1.0, logprobs=True)
    with pytest.raises(SteeringError, match="several choices"):
        answer(saved, 1.0, num_choices=2)
    api = ElsteerAPI(model, landscape=landscape, device="cpu")
    tool = ToolInfo(name="add", description="Adds.")
    with pytest.raises(SteeringError, match="tools"):
        asyncio.run(api.generate(list(CHAT), [tool], "auto", GenerateConfig()))
    picture = ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AAAA")])
    with pytest.raises(SteeringError, match="text of"):
        asyncio.run(api.generate([picture], [], "none", GenerateConfig()))
