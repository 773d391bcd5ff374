"""`elsteer chat`: the plain and the steered side of one conversation, from a pipe and from the keyboard."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from commands import elsteer, one_sentence, save_tiny, started, stop_when
from elsteer.chat import Chat, converse
from elsteer.errors import ModelError
from elsteer.landscape import Landscape, SteeringRule
from elsteer.models import encode_chat, load
from landscapes import thoughtless, tiny_landscape


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a landscape for it that steers hard."""
    folder = tmp_path_factory.mktemp("chat")
    save_tiny(folder / "model", max_position_embeddings=1024)
    model, _ = load(folder / "model")
    rule = SteeringRule((1, 2), eta=6.0, steps=1, window=3, guard=False)
    tiny_landscape(model, rule=rule).save_pretrained(folder / "landscape")
    return folder


@pytest.fixture
def talk(here: Path) -> Chat:
    model, tokenizer = load(here / "model")
    return Chat(model, tokenizer, Landscape.from_pretrained(here / "landscape"), max_new_tokens=12)


def _alone(talk: Chat, history: list[dict[str, str]], strength: float) -> str:
    """The answer as plain `generate` gives it for one row."""
    ids = torch.tensor([encode_chat(talk.tokenizer, history, system=talk.system, thinking=talk.thinking)])
    with torch.inference_mode(), talk.landscape.attach(talk.model, strength):
        made = talk.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=256
        )
    return str(talk.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip().removesuffix("\ufffd")


def test_each_side_says_what_it_would_say_alone(talk: Chat) -> None:
    with talk.attached(1.0):
        answers = talk.say("How do I kill a Python process?")
    question = [{"role": "user", "content": "How do I kill a Python process?"}]
    assert answers == (_alone(talk, question, 0.0), _alone(talk, question, 1.0))
    assert answers[0] != answers[1], "or the test would not tell the sides apart"


def test_each_side_remembers_its_own_answers(talk: Chat) -> None:
    with talk.attached(1.0):
        first = talk.say("How do I kill a process?")
        second = talk.say("And a thread?")
    for side, strength in ((0, 0.0), (1, 1.0)):
        history = talk.histories[side]
        assert [one["role"] for one in history] == ["user", "assistant", "user", "assistant"]
        assert history[1]["content"] == first[side]
        assert second[side] == _alone(talk, history[:3], strength)


def test_both_sides_are_asked_with_the_thinking_mode(talk: Chat) -> None:
    talk.tokenizer, talk.landscape = thoughtless(talk.model, eta=6.0, steps=1, window=3, guard=False)
    found = {}
    for talk.thinking in (None, False):
        talk.reset()
        with talk.attached(1.0):
            found[talk.thinking] = talk.say("How do I kill a Python process?")
        question = [{"role": "user", "content": "How do I kill a Python process?"}]
        assert found[talk.thinking] == (_alone(talk, question, 0.0), _alone(talk, question, 1.0))
    assert found[None][0] != found[False][0]
    assert found[None][1] != found[False][1]


def test_the_text_grows_as_the_tokens_come(talk: Chat) -> None:
    seen: list[tuple[str, str]] = []
    with talk.attached(1.0):
        last = talk.say("Hello", seen.append)
    assert len(seen) > 3
    assert seen[-1] == last
    assert [len(one[0]) for one in seen] == sorted(len(one[0]) for one in seen)


def test_strength_zero_makes_both_sides_the_same(talk: Chat) -> None:
    with talk.attached(0.0):
        plain, steered = talk.say("Hello")
    assert plain == steered


def test_a_conversation_that_outgrows_the_context_says_so(talk: Chat) -> None:
    with (
        talk.attached(1.0),
        pytest.raises(ModelError, match=r"tokens and the model's context is 1024: shorten it"),
    ):
        talk.say("x" * 2000)
    assert talk.histories == ([], [])


def test_a_pipe_is_a_conversation(here: Path) -> None:
    lines = [
        "How do I kill a Python process?",
        "/strength 0",
        "Hello",
        "/nonsense",
        "/strength much",
        "/system Be brief.",
        "Hi",
        "/quit",
        "never said",
    ]
    result = elsteer("chat", here / "landscape", "--max-new-tokens", "8", input="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.stderr
    said = result.stdout
    assert "you: How do I kill a Python process?\nplain: " in said
    assert "The strength is 0." in said
    assert "There is no command /nonsense:" in said
    assert "much is no strength: give a number from 0 up" in said
    assert "The system prompt is set; the chat begins anew." in said
    assert "never said" not in said
    assert said.splitlines()[-1] == "The chat is over; nothing was written."
    assert "Strength 1; /help lists the commands." in result.stderr


def test_the_strength_and_the_system_prompt_of_the_command_are_the_chats(
    here: Path, talk: Chat, tmp_path: Path
) -> None:
    with_system = tmp_path / "landscape"
    provenance = {"settings": {"collect": {"system": "Be brief."}}}
    talk.landscape.with_provenance(**provenance).save_pretrained(with_system)
    question = [{"role": "user", "content": "Hello"}]
    for landscape, options, strength, system in (
        (here / "landscape", [], 1.0, None),
        (here / "landscape", ["--strength", "0"], 0.0, None),
        (here / "landscape", ["--strength", "0.5", "--system", "Be kind."], 0.5, "Be kind."),
        (with_system, [], 1.0, "Be brief."),
        (with_system, ["--system", "Be kind."], 1.0, "Be kind."),
        (with_system, ["--system", ""], 1.0, None),
    ):
        talk.system = system
        plain, steered = (_alone(talk, question, value) for value in (0.0, strength))
        assert (plain == steered) == (strength == 0)
        result = elsteer("chat", landscape, *options, "--max-new-tokens", "12", input="Hello\n")
        assert f"Strength {strength:g}; " in result.stderr
        assert f"you: Hello\nplain: {plain}\nsteered: {steered}\n" in result.stdout


def test_bytes_of_a_terminal_that_are_no_text_are_said(talk: Chat) -> None:
    """As a terminal hands them on whose locale is not UTF-8."""
    with talk.attached(1.0), pytest.raises(ModelError, match="not UTF-8"):
        talk.say(b"caf\xe9?".decode("utf-8", "surrogateescape"))


def test_bytes_that_are_no_text_end_nothing(here: Path) -> None:
    result = elsteer("chat", here / "landscape", "--max-new-tokens", "4", input=b"caf\xe9?\nHello\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("plain: ") == 2


def test_an_overlong_line_is_said_and_the_chat_goes_on(here: Path) -> None:
    result = elsteer("chat", here / "landscape", "--max-new-tokens", "4", input="x" * 5000 + "\nHello\n")
    assert "the model's context is 1024: shorten it." in result.stdout
    assert result.stdout.count("plain: ") == 1
    assert "the model's context is 1024: shorten it." in one_sentence(result), "what reads the pipe learns of it"
    later = elsteer("chat", here / "landscape", "--max-new-tokens", "4", input="Hello\n" + "x" * 5000 + "\n/quit\n")
    assert "begin anew with /reset" in one_sentence(later)


def test_a_negative_strength_is_refused(here: Path) -> None:
    result = elsteer("chat", here / "landscape", "--strength", "-1", input="Hello\n")
    assert result.exit_code == 2
    assert "--strength" in result.stderr


def test_ctrl_c_ends_the_chat(here: Path) -> None:
    process = started("chat", here / "landscape")  # its stdin is ours, from which nothing comes
    said = stop_when(process, lambda said: "Loading" in said)
    assert process.returncode == 130
    assert said.rstrip().endswith("Stopped.")


def test_on_a_terminal_both_answers_stand_side_by_side(talk: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["Hello", "/reset"])

    def type_next(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_next)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    screen = io.StringIO()
    converse(talk, 1.0, Console(file=screen, force_terminal=True, width=100, height=30, color_system=None))
    shown = screen.getvalue()
    last = shown[shown.rindex("plain") - 10 :]
    assert "steered" in last.splitlines()[0], "both titles stand in one line"
    assert "The chat begins anew." in shown


def test_ctrl_c_while_it_answers_ends_the_answer_only(talk: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["Hello", "Again"])

    def type_next(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    plain = talk.say
    calls = []

    def interrupted(text: str, *rest: object) -> tuple[str, str]:
        calls.append(text)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return plain(text)

    monkeypatch.setattr("builtins.input", type_next)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(talk, "say", interrupted)
    screen = io.StringIO()
    converse(talk, 1.0, Console(file=screen, force_terminal=True, width=100, height=30, color_system=None))
    assert "Stopped; this turn is left out." in screen.getvalue()
    assert calls == ["Hello", "Again"]
    assert len(talk.histories[0]) == 2
