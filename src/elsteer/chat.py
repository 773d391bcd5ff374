"""`elsteer chat`: one conversation answered by the plain and by the steered model, side by side, as the tokens come.

Both answers are the two rows of one batch, told apart by their strength (0 and the user's), so that they stream at the
same time and cost one generation. Each side keeps its own history.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from elsteer.completions import end_ids
from elsteer.errors import ElsteerError, ModelError
from elsteer.landscape import Landscape
from elsteer.models import context_length, encode_chat, left_pad
from elsteer.steering import Steering

__all__ = ["Chat", "converse"]

HELP = """/strength 0.5   scale the steps of the steered side; 0 is the plain model
/system TEXT    set the system prompt of both sides (no text: none) and begin anew
/reset          forget what was said
/quit           leave"""
OnText = Callable[[tuple[str, str]], None]


class _Pair(BaseStreamer):
    """Collects the tokens of two rows and tells their texts after each step."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: set[int], on_text: OnText) -> None:
        self.tokenizer, self.ends, self.on_text = tokenizer, ends, on_text
        self.tokens: tuple[list[int], list[int]] = ([], [])
        self._ended = [False, False]
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """The prompts first, which are left out, then one token a row."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for row, token in enumerate(value.reshape(-1).tolist()):
            if not self._ended[row]:
                self._ended[row] = token in self.ends
                self.tokens[row].append(token)
        self.on_text(self.texts())

    def end(self) -> None:
        """Nothing is left to tell."""

    def texts(self) -> tuple[str, str]:
        """What both sides have said so far. Half a character (its other bytes are to come) is held back."""
        one, two = (
            str(self.tokenizer.decode(row, skip_special_tokens=True)).strip().removesuffix("\N{REPLACEMENT CHARACTER}")
            for row in self.tokens
        )
        return one, two


@dataclass
class Chat:
    """A conversation with both sides. Steer with `with chat.attached(strength):` around `say`.

    system, thinking: as in fitting. histories: the messages of the plain and of the steered side.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    landscape: Landscape
    system: str | None = None
    thinking: bool | None = None
    max_new_tokens: int = 256
    histories: tuple[list[dict[str, str]], list[dict[str, str]]] = field(default_factory=lambda: ([], []))

    def attached(self, strength: float) -> Steering:
        """The handle that steers the second row. Raises LandscapeError, SteeringError."""
        return self.landscape.attach(self.model, torch.tensor([0.0, strength]), tokenizer=self.tokenizer)

    def reset(self) -> None:
        """Forget what was said."""
        for history in self.histories:
            history.clear()

    def say(self, text: str, on_text: OnText = lambda texts: None) -> tuple[str, str]:
        """The answers of both sides to `text`, which join their histories; on_text((plain, steered)) as they grow.

        Ctrl-C ends the answers where they are and is passed on, with the turn left out of the histories. Raises ModelError
        where the conversation is longer than the context.
        """
        turns = [[*history, {"role": "user", "content": text}] for history in self.histories]
        rows = [encode_chat(self.tokenizer, turn, system=self.system, thinking=self.thinking) for turn in turns]
        longest, limit = max(map(len, rows)), context_length(self.model)
        if longest >= limit:
            way = "begin anew with /reset" if self.histories[0] else "shorten it"
            raise ModelError(f"This conversation has {longest} tokens and the model's context is {limit}: {way}.")
        pad = self.tokenizer.pad_token_id
        ids, mask = left_pad(rows, 0 if pad is None else int(pad))
        pair = _Pair(self.tokenizer, end_ids(self.model, self.tokenizer), on_text)
        options: dict[str, Any] = {"max_new_tokens": min(self.max_new_tokens, limit - longest), "do_sample": False}
        with torch.inference_mode():
            self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                streamer=pair,
                pad_token_id=0 if pad is None else int(pad),
                **options,
            )
        answers = pair.texts()
        for history, answer in zip(self.histories, answers, strict=True):
            history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answers


def converse(chat: Chat, strength: float, console: Console) -> None:
    """Read lines from the keyboard (or a pipe) and show both answers, until /quit or the end of the input.

    Raises LandscapeError or SteeringError where the landscape cannot be attached. Errors in a turn are said, and it goes on; of
    a pipe the last one is raised at the end.
    """
    live = console.is_terminal and sys.stdin.isatty()
    failed: ElsteerError | None = None
    with chat.attached(strength) as steering:
        for line in _lines(console, live):
            word, _, rest = line.partition(" ")
            try:
                if word == "/quit":
                    break
                if word.startswith("/"):
                    console.print(_command(chat, steering, word, rest.strip()), soft_wrap=True)
                elif line:
                    _turn(chat, line, console, live)
            except ElsteerError as error:
                failed = None if live else error
                console.print(str(error), style="red", soft_wrap=True)
            except KeyboardInterrupt:
                if not live:
                    raise
                console.print("Stopped; this turn is left out.")
    if failed is not None:
        raise failed


def _lines(console: Console, live: bool) -> Iterator[str]:
    if not live:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        for line in sys.stdin:
            console.print(f"you: {line.strip()}", soft_wrap=True)
            yield line.strip()
        return
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401 - gives input() the arrow keys
    while True:
        try:
            yield input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return


def _command(chat: Chat, steering: Steering, word: str, rest: str) -> str:
    """Do what a line that begins with / asks for; what to say of it."""
    if word == "/strength":
        try:
            value = float(rest)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            return f"{rest or 'Nothing'} is no strength: give a number from 0 up, such as /strength 0.5."
        steering.strength = torch.tensor([0.0, value])
        return f"The strength is {value:g}."
    if word == "/system":
        chat.system = rest or None
        chat.reset()
        return "The system prompt is set; the chat begins anew." if rest else "No system prompt; the chat begins anew."
    if word == "/reset":
        chat.reset()
        return "The chat begins anew."
    return HELP if word == "/help" else f"There is no command {word}:\n{HELP}"


def _turn(chat: Chat, line: str, console: Console, live: bool) -> None:
    if not live:
        plain, steered = chat.say(line)
        console.print(f"plain: {plain}\nsteered: {steered}", soft_wrap=True)
        return
    with Live(_columns(("", "")), console=console, transient=True, refresh_per_second=12) as view:
        room = max(6, console.height - 6) * max(20, console.width // 2 - 6)  # characters of a column that are in sight
        answers = chat.say(line, lambda texts: view.update(_columns((texts[0][-room:], texts[1][-room:]))))
    console.print(_columns(answers))


def _columns(texts: tuple[str, str]) -> Table:
    table = Table.grid(expand=True, padding=(0, 1))
    for _ in texts:
        table.add_column(ratio=1)
    table.add_row(
        Panel(Text(texts[0]), title="plain", title_align="left", border_style="dim"),
        Panel(Text(texts[1]), title="steered", title_align="left", border_style="green"),
    )
    return table
